"""Identities of a deployment: an authority, certificates of its services, keys of its SuperNodes, the certify token.

    ca.pem                     what every process trusts
    authority/ca.key           signs certificates; never goes to a machine that only runs something
    superlink/, certify/       cert.pem and key.pem for TLS; certify/token, superlink/superexec.secret
    nodes/client-7             a SuperNode's private key: goes to that node alone
    public/client-7.pub        its public key, which the SuperLink is told

SuperNode keys are those that Flower's node authentication takes: NIST P-384 in OpenSSH's form. Making keys again adds
what is missing (another client, an expired certificate) and leaves the rest, so that no node is locked out. Secrets
are readable by their owner alone.
"""

import contextlib
import datetime as dt
import ipaddress
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from tasks.errors import ConfigError

SERVICES = {"superlink": ("superlink", "superlink-control"), "certify": ("certify",)}  # and the names they go by
LOCAL_NAMES = ("localhost", "127.0.0.1")
DAYS, AUTHORITY_DAYS = 365, 3650
EARLIER = dt.timedelta(hours=1)  # certificates are valid a little before they are made: clocks differ
RENEW = dt.timedelta(days=14)  # a certificate that ends sooner is made anew
NAME = r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_]([A-Za-z0-9_-]{0,62}))*"


@dataclass(frozen=True)
class KeyFolder:
    """Where the identities of one deployment lie."""

    path: Path

    @property
    def ca(self) -> Path:
        return self.path / "ca.pem"

    @property
    def authority_key(self) -> Path:
        return self.path / "authority" / "ca.key"

    @property
    def token(self) -> Path:
        return self.path / "certify" / "token"

    @property
    def superexec_secret(self) -> Path:
        return self.path / "superlink" / "superexec.secret"

    def certificate(self, service: str) -> Path:
        """The certificate of a service of `SERVICES`."""
        return self.path / service / "cert.pem"

    def key(self, service: str) -> Path:
        """The private key of a service's certificate."""
        return self.path / service / "key.pem"

    def node_key(self, client: int) -> Path:
        """The private key of a client's SuperNode."""
        return self.path / "nodes" / f"client-{client}"

    def public_key(self, client: int) -> Path:
        """The public key of a client's SuperNode."""
        return self.path / "public" / f"client-{client}.pub"

    def clients(self) -> list[int]:
        """Return the clients whose public keys are here, sorted."""
        found = (re.fullmatch(r"client-(\d+)\.pub", path.name) for path in (self.path / "public").glob("*.pub"))
        return sorted(int(match[1]) for match in found if match)

    def public_bytes(self, client: int) -> bytes:
        """Return a client's public key as Flower's Control API takes it; `ConfigError` if it is none."""
        path = self.public_key(client)
        try:
            key = serialization.load_ssh_public_key(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}; hawthorn keys make makes it") from None
        except ValueError as error:
            raise ConfigError(f"{path} is no OpenSSH public key: {error}") from None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise ConfigError(f"{path} must be an elliptic-curve key (ecdsa-sha2-nistp384), got {type(key).__name__}")
        return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


@dataclass
class Made:
    """What a call of `make_keys` wrote, and what it found."""

    written: list[Path] = field(default_factory=list)
    kept: list[Path] = field(default_factory=list)


def make_keys(
    path: Path | str,
    *,
    clients: int | Iterable[int] = 0,
    names: Sequence[str] = (),
    days: int = DAYS,
    renew: bool = False,
) -> Made:
    """Make what is missing in a key folder; `renew` makes the services' certificates anew.

    `names` are host names and addresses under which the services are reached besides their own names, localhost and
    127.0.0.1. `clients` is a number of clients or their ids.
    """
    if days < 1:
        raise ConfigError(f"days must be 1 or more, got {days}")
    folder, made = KeyFolder(Path(path)), Made()
    ids = range(clients) if isinstance(clients, int) else sorted(set(clients))
    wanted = [_general_name(name) for name in names]  # a wrong name is told before anything is written
    folder.path.mkdir(parents=True, exist_ok=True)
    authority, key = _authority(folder, made)
    for service, called in SERVICES.items():
        own = [_general_name(name) for name in (*called, *LOCAL_NAMES)]
        every = list(dict.fromkeys([*own, *wanted]))
        if renew or not _still_good(folder.certificate(service), authority, every, days):
            _write_service(folder, service, authority, key, every, days)
            made.written += [folder.certificate(service), folder.key(service)]
        else:
            made.kept.append(folder.certificate(service))
    _secret(folder.token, secrets.token_urlsafe(32).encode(), made)
    _secret(folder.superexec_secret, secrets.token_urlsafe(48).encode(), made)
    for client in ids:
        _node(folder, client, made)
    return made


def _authority(folder: KeyFolder, made: Made) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    if folder.ca.exists() != folder.authority_key.exists():
        there, gone = (folder.ca, folder.authority_key)[:: 1 if folder.ca.exists() else -1]
        raise ConfigError(f"{there} is there and {gone} is not: put it back, or make keys in an empty folder")
    if folder.ca.exists():
        made.kept.append(folder.ca)
        key = serialization.load_pem_private_key(folder.authority_key.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return x509.load_pem_x509_certificate(folder.ca.read_bytes()), key
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Hawthorn authority {secrets.token_hex(4)}")])
    usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)  # certificates and lists alone
    certificate = (
        _builder(name, name, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _secret(folder.authority_key, _pem(key), made)
    _write(folder.ca, certificate.public_bytes(serialization.Encoding.PEM), 0o644)
    made.written.append(folder.ca)
    return certificate, key


def _write_service(
    folder: KeyFolder,
    service: str,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    names: list[x509.GeneralName],
    days: int,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, service)])
    usage = x509.KeyUsage(True, False, False, False, False, False, False, False, False)  # signatures alone
    certificate = (
        _builder(subject, authority.subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write(folder.key(service), _pem(key), 0o600)
    _write(folder.certificate(service), certificate.public_bytes(serialization.Encoding.PEM), 0o644)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - EARLIER)
        .not_valid_after(now + dt.timedelta(days=days))
    )


def _still_good(path: Path, authority: x509.Certificate, names: list[x509.GeneralName], days: int) -> bool:
    """Return whether a certificate is there with its key and all `names`, of this authority and not about to end."""
    if not (path.exists() and path.with_name("key.pem").exists()):
        return False
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        key = serialization.load_pem_private_key(path.with_name("key.pem").read_bytes(), None)
    except (ValueError, TypeError):
        return False  # what a kill in the middle of writing, or a mishap, has left
    if key.public_key() != certificate.public_key():
        return False
    held = set(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    left = certificate.not_valid_after_utc - dt.datetime.now(dt.UTC)
    enough = min(RENEW, dt.timedelta(days=days) / 2)
    return held >= set(names) and left > enough and certificate.issuer == authority.subject


def _node(folder: KeyFolder, client: int, made: Made) -> None:
    if client < 0:
        raise ConfigError(f"a client id is 0 or more, got {client}")
    private, public = folder.node_key(client), folder.public_key(client)
    if public.exists():  # the private key may have gone to its node already
        made.kept.append(public)
        return
    if private.exists():
        key = serialization.load_ssh_private_key(private.read_bytes(), None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        form = (serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
        _secret(private, key.private_bytes(*form), made)
    line = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    _write(public, line + f" client-{client}\n".encode(), 0o644)
    made.written.append(public)


def _general_name(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"a name is a host name or an IP address, without scheme and port; got {name!r}")
    return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _secret(path: Path, content: bytes, made: Made) -> None:
    """Write a secret unless it is there."""
    if path.exists():
        made.kept.append(path)
        return
    _write(path, content, 0o600)
    made.written.append(path)


def _write(path: Path, content: bytes, mode: int) -> None:
    """Write a file in one step; it never exists with more rights than `mode`."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if mode == 0o600 else 0o755)
    draft = path.with_name(f".{path.name}.partial")
    draft.unlink(missing_ok=True)
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
    os.replace(draft, path)
