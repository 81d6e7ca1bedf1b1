"""Who may ask: a bearer token, and TLS around it; `interceptors` compares the token.

A token in the clear is everyone's token, so it is taken and sent without TLS on the loopback interface alone.
"""

import ipaddress
from pathlib import Path

import grpc

from tasks.errors import ConfigError


def is_loopback(host: str) -> bool:
    """True for names and addresses that never leave this machine."""
    name = host.strip("[]").lower()
    if name == "localhost" or host.startswith(("unix:", "unix-abstract:")):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_token(token: str | None) -> str | None:
    """Return the token; `ConfigError` for one that cannot travel or protects nothing."""
    if token is None:
        return None
    if not (16 <= len(token) <= 4096 and token.isascii() and token.isprintable() and " " not in token):
        raise ConfigError(
            f"a token is 16 to 4096 printable ASCII characters without spaces, got {len(token)} characters; "
            "make one with: python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token


def check_exposure(
    host: str, *, tls: bool, token: str | None, insecure: bool, client_ca: bool = False
) -> None:  # fmt: skip
    """Raise `ConfigError` where a service at `host` would be open to a network without protection.

    TLS alone hides what travels but asks nobody who they are: a token or certificates of clients do.
    """
    if is_loopback(host):
        return
    if tls:
        if token is None and not client_ca and not insecure:
            raise ConfigError(
                f"{host} is reachable from outside and TLS alone lets anyone in: give a token (--token-file) or "
                "--tls-client-ca, or say --insecure where the network itself is private"
            )
        return
    if token is not None:
        raise ConfigError(
            f"a token in the clear on {host} can be read by anyone: give --tls-cert and --tls-key as well"
        )
    if not insecure:
        raise ConfigError(
            f"{host} is reachable from outside: give --tls-cert and --tls-key (and a token), listen on 127.0.0.1, "
            "or say --insecure where the network itself is private"
        )


def server_credentials(
    cert: Path | None, key: Path | None, client_ca: Path | None = None
) -> grpc.ServerCredentials | None:
    """Return TLS credentials from PEM files, None without any; with `client_ca` clients must show a certificate."""
    if cert is None and key is None:
        if client_ca is not None:
            raise ConfigError("--tls-client-ca needs --tls-cert and --tls-key as well")
        return None
    if cert is None or key is None:
        raise ConfigError("TLS needs both --tls-cert and --tls-key")
    roots = None if client_ca is None else _pem(client_ca, b"CERTIFICATE")
    pair = (_pem(key, b"PRIVATE KEY"), _pem(cert, b"CERTIFICATE"))
    return grpc.ssl_server_credentials([pair], roots, require_client_auth=client_ca is not None)


def channel_credentials(ca: Path | None, cert: Path | None, key: Path | None) -> grpc.ChannelCredentials:
    """Return a client's TLS credentials from PEM files; without `ca` the roots that gRPC comes with."""
    if (cert is None) != (key is None):
        raise ConfigError("a client certificate needs both tls_cert and tls_key")
    roots = None if ca is None else _pem(ca, b"CERTIFICATE")
    chain = None if cert is None else _pem(cert, b"CERTIFICATE")
    return grpc.ssl_channel_credentials(roots, None if key is None else _pem(key, b"PRIVATE KEY"), chain)


def _pem(path: Path, kind: bytes) -> bytes:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if b"-----BEGIN " not in content or kind + b"-----" not in content:
        raise ConfigError(f"{path} must be a PEM file with a {kind.decode().lower()}")
    return content
