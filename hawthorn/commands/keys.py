"""`hawthorn keys`: make the identities of a deployment, let SuperNodes in, and shut them out."""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hawthorn.engines._supernode import parse_partitions
from hawthorn.keys import DAYS, KeyFolder, make_keys
from tasks.errors import EngineError

if TYPE_CHECKING:
    from hawthorn.engines._superlink import SuperLink

app = typer.Typer(help="Certificates, SuperNode keys and tokens of a deployment; alone: make them in ./keys.")

Folder = Annotated[Path, typer.Argument(help="Folder of the keys.")]
Address = Annotated[str, typer.Option(help="HOST:PORT of the SuperLink's Control API.")]


@app.callback(invoke_without_command=True)
def alone(context: typer.Context) -> None:
    """Make certificates, SuperNode keys and tokens in ./keys, or do what a subcommand says."""
    if context.invoked_subcommand is None:
        make()


@app.command()
def make(
    folder: Folder = Path("keys"),
    clients: Annotated[str, typer.Option(help="How many SuperNodes get keys, or which: 8 or 8-11.")] = "8",
    names: Annotated[
        list[str] | None,
        typer.Option("--name", help="Host name or address of the services, as clients use it; repeatable."),
    ] = None,
    days: Annotated[int, typer.Option(help="How long certificates are valid.")] = DAYS,
    renew: Annotated[bool, typer.Option("--renew", help="Make the services' certificates anew.")] = False,
    env: Annotated[
        Path | None, typer.Option(help="Also write the user of the containers to this file, such as .env.")
    ] = None,
) -> None:
    """Make an authority, certificates, SuperNode keys and tokens: what is missing, the rest stays."""
    ids = range(int(clients)) if clients.strip().isdigit() else parse_partitions(clients)
    made = make_keys(folder, clients=ids, names=names or (), days=days, renew=renew)
    print(f"{folder}: {len(made.written)} files written, {len(made.kept)} kept")
    print(f"authority/ca.key signs identities: keep it off the machines of the federation ({folder / 'authority'})")
    if env is not None:
        print(f"{env}: {_write_env(env, folder)}")


@app.command()
def register(
    folder: Folder = Path("keys"),
    superlink: Address = "127.0.0.1:9093",
    ca: Annotated[Path | None, typer.Option(help="Authority to trust, if not the folder's.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the SuperLink.")] = 60.0,
) -> None:
    """Let the SuperNodes in whose public keys are in the folder."""
    keys = KeyFolder(folder)
    public = [keys.public_bytes(client) for client in keys.clients()]
    link = _connect(superlink, ca or keys.ca, timeout)
    new = link.register(public)
    print(f"{superlink}: {len(public)} SuperNode keys known, {new} of them new", flush=True)
    link.close()


@app.command()
def unregister(
    client: Annotated[str, typer.Argument(help="Client id, or a range as 6-7.")],
    folder: Annotated[Path, typer.Option("--keys", help="Folder of the keys.")] = Path("keys"),
    superlink: Address = "127.0.0.1:9093",
    ca: Annotated[Path | None, typer.Option(help="Authority to trust, if not the folder's.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the SuperLink.")] = 60.0,
) -> None:
    """Shut SuperNodes out: theirs end within a minute and are not let in again with that key."""
    keys = KeyFolder(folder)
    link = _connect(superlink, ca or keys.ca, timeout)
    for number in parse_partitions(client):
        was = link.unregister(keys.public_bytes(number))
        print(f"client {number}: {'shut out' if was else 'was not registered'}")
    link.close()


def _connect(address: str, ca: Path, timeout: float) -> "SuperLink":
    from hawthorn.engines._superlink import SuperLink

    link, deadline = SuperLink(address, ca), time.monotonic() + timeout
    while not link.is_up():
        if time.monotonic() > deadline:
            raise EngineError(f"no SuperLink with a certificate of {ca} answers at {address} within {timeout:g} s")
        time.sleep(0.2)
    return link


def _write_env(path: Path, folder: Path) -> str:
    """Write who the containers run as: the caller or, for root, the image's own user, to whom the keys are given."""
    uid, gid = os.getuid(), os.getgid()
    if uid == 0:
        uid = gid = 10001
        for found in (folder, *folder.rglob("*")):
            if "authority" not in found.parts:
                os.chown(found, uid, gid)
    lines = path.read_text().splitlines() if path.exists() else []
    names = ("HAWTHORN_UID=", "HAWTHORN_GID=", "HAWTHORN_KEYS=")
    kept = [line for line in lines if not line.startswith(names)]
    path.write_text(
        "\n".join([*kept, f"HAWTHORN_UID={uid}", f"HAWTHORN_GID={gid}", f"HAWTHORN_KEYS={folder.absolute()}"]) + "\n"
    )
    return f"containers run as user {uid}"
