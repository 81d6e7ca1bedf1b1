"""`hawthorn client`: one SuperNode, honest or malicious, started by hand against a running federation."""

import os
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from client.attack import read_attack
from hawthorn.engines._supernode import Node, claim, parse_partitions, print_line, run_node
from hawthorn.keys import KeyFolder
from tasks.errors import ConfigError


def client(
    superlink: Annotated[str, typer.Option(help="HOST:PORT of the SuperLink's fleet API.")],
    partition: Annotated[str, typer.Option(help="Client id, which share of the data this is; with --claims a range.")],
    attack: Annotated[str, typer.Option(help="Be malicious: for example 'sign_flip() | scale_update(factor=5)'.")] = "",
    keys: Annotated[Path | None, typer.Option(help="Folder made by `hawthorn keys`: ca.pem, nodes/client-N.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Authority to trust, instead of that of --keys.")] = None,
    key: Annotated[Path | None, typer.Option(help="Private key to show, instead of that of --keys.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS and no key: only on one machine.")] = False,
    num_clients: Annotated[int, typer.Option(help="Clients in the federation, if the app asks for it.")] = 0,
    claims: Annotated[
        Path | None, typer.Option(help="Folder of locks: take the first id of the range that nobody holds.")
    ] = None,
    health: Annotated[str, typer.Option(help="Answer gRPC health checks at this HOST:PORT.")] = "",
    data_dir: Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")] = None,
    logs: Annotated[Path | None, typer.Option(help="Folder for logs of helpers; default: a temporary one.")] = None,
) -> None:
    """Run one client of a federation until Ctrl-C; with --attack a malicious one."""
    read_attack(attack)
    ids = parse_partitions(partition)
    if len(ids) > 1 and claims is None:
        raise ConfigError(f"--partition {partition} names {len(ids)} clients: give --claims FOLDER, or one id")
    if insecure and (keys or ca or key):
        raise ConfigError("--insecure and --keys, --ca or --key contradict each other; leave one out")
    if not insecure and keys is None and ca is None:
        raise ConfigError("give --keys FOLDER (made by `hawthorn keys`), or --ca and --key, or say --insecure")
    if data_dir:
        os.environ["HAWTHORN_DATA"] = os.path.abspath(os.path.expanduser(data_dir))
    number, lock = (ids[0], None) if claims is None else claim(ids, claims)
    folder = KeyFolder(keys) if keys else None
    node = Node(
        superlink=superlink,
        client=number,
        num_clients=num_clients,
        attack=attack,
        ca=_absolute(ca or (folder.ca if folder else None)),
        key=_absolute(key or (folder.node_key(number) if folder else None)),
        health=health,
    )
    with tempfile.TemporaryDirectory(prefix="hawthorn-client-") as own:
        code = run_node(node, logs or Path(own), print_line)
    if lock is not None:
        lock.close()
    if code != 0:
        print_line(
            f"client {number}: the SuperNode ended with code {code}; if the SuperLink refused its key, register it "
            "(hawthorn keys register), or wait until it has missed the node that had it before (20 s)"
        )
    raise typer.Exit(code if 0 <= code < 256 else 1)


def _absolute(path: Path | None) -> Path | None:
    return None if path is None else path.expanduser().absolute()
