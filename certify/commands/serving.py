"""The commands of the service: serve, status."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from certify.commands.console import console, errors, told
from certify.commands.options import choice


@told
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 50051,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    store: Annotated[Path, typer.Option(help="Folder for models, points and results.")] = Path("certify-store"),
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token clients must send; else HAWTHORN_CERTIFY_TOKEN.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The service's certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Clients must show a certificate of this one.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without TLS.")] = False,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Prometheus metrics; else none.")] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running work when it is told to end.")] = 30.0,
    log_level: Annotated[Any, choice("DEBUG", "INFO", "WARNING", "ERROR", help="How much is logged.")] = "INFO",
) -> None:
    """Serve certification over gRPC until SIGTERM or Ctrl-C."""
    from certify.service.serve import serve as serve_forever

    finished = serve_forever(
        host=host, port=port, device=device, store=store, token=_token(token_file), tls_cert=tls_cert, tls_key=tls_key,
        tls_client_ca=tls_client_ca, insecure=insecure, metrics_port=metrics_port, queue_size=queue_size,
        workers=workers, grace=grace, log_level=log_level,
    )  # fmt: skip
    raise typer.Exit(0 if finished else 1)


@told
def status(
    address: Annotated[str, typer.Option(help="Host and port of the service.")] = "127.0.0.1:50051",
    token_file: Annotated[Path | None, typer.Option(help="File with the token; else HAWTHORN_CERTIFY_TOKEN.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS with the system's authorities.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="Authority of the service's certificate, PEM.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="This client's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a service what it runs on and allows; exit code 1 where it does not answer or refuses."""
    from google.protobuf.json_format import MessageToDict

    from certify.service.client import CertifyClient, ServiceError

    known: dict[str, Any] = {"tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    try:
        with CertifyClient(address, token=_token(token_file), timeout=timeout, attempts=2, **known) as client:
            info = MessageToDict(client.info(), preserving_proto_field_name=True)
    except ServiceError as error:
        errors.print(f"{address}: not well; {error}", style="bold red", soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"address": address, **info}, indent=2))
        return
    console.print(f"{address}: serving", style="green")
    for name, value in info.items():
        console.print(f"  {name.replace('_', ' ')}: {value}", soft_wrap=True)


def _token(file: Path | None) -> str | None:
    """Return the token of a file or of the environment; never one of the command line, which others can see."""
    from tasks.errors import ConfigError

    if file is None:
        return os.environ.get("HAWTHORN_CERTIFY_TOKEN") or None
    try:
        return file.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is no text" if isinstance(error, ValueError) else error.strerror
        raise ConfigError(f"cannot read the token file {file}: {reason}") from None
