"""Files of certificates: a header line, then one certificate per line, in JSON.

A finished file is renamed into place; a file that grows with the work is appended to by whole lines, each flushed to
the disk, so that a kill leaves at most one half line at the end, which resuming cuts off. The reader takes nothing on
trust: a line that is no certificate, of another model or of other data, twice there, or half there is refused with its
number. What it cannot see, a number changed for another one, is `certify.verify`'s to find.
"""

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from certify.files.header import Header
from certify.files.settings import ZonotopeSettings
from certify.record import Certificate
from tasks.errors import CertificationError, RecordError

Key = tuple[int, float]  # the point's place among the points, and eps where there are several
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # escapes of surrogates: in pairs they are a character, alone they are none


@dataclass(frozen=True)
class CertificateFile:
    """A file as read back: header and certificates, in the order of their lines (the first has line 2)."""

    path: Path
    header: Header
    certificates: tuple[Certificate, ...]

    @property
    def missing(self) -> int:
        """Certificates that a complete file has and this one has not."""
        return self.header.num_certificates - len(self.certificates)

    @property
    def keys(self) -> set[Key]:
        """Which points (and radii) are there."""
        return {key_of(self.header, certificate) for certificate in self.certificates}

    def true_label(self, certificate: Certificate) -> int:
        """Return the class of a certificate's point in its data set."""
        return self.header.points.labels[certificate.sample or 0]

    def index(self, certificate: Certificate) -> int:
        """Return the index of a certificate's point in its data set."""
        return self.header.points.indices[certificate.sample or 0]


def key_of(header: Header, certificate: Certificate) -> Key:
    """Return what tells a certificate from the others of its file: of votes the point, of bounds eps as well.

    `_fits` refuses whatever would be the same eps under another key, such as a whole number.
    """
    eps = certificate.parameters.get("eps") if isinstance(header.settings, ZonotopeSettings) else 0.0
    return certificate.sample if certificate.sample is not None else -1, eps if type(eps) is float else -1.0


def read(path: Path, *, cut: bool = False) -> CertificateFile:
    """Read a file; `RecordError` names the first damaged line. With `cut`, a half line at the end is left out."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise RecordError(f"cannot read {path}: {error.strerror}") from None
    if not content.strip():
        raise RecordError(f"{path} is empty; a file of certificates starts with a header")
    lines = content.split(b"\n")
    if (rest := lines.pop()) and not (cut and lines):
        raise RecordError(f"{path}, line {len(lines) + 1}: cut off after {len(rest)} bytes; run the command again")
    with _at(path, 1):
        header = Header.from_json(_text(lines[0]))
    certificates, seen = [], set()
    for number, line in enumerate(lines[1:], start=2):
        with _at(path, number):
            certificate = Certificate.from_json(_text(line))
            _fits(header, certificate)
            if (key := key_of(header, certificate)) in seen:
                raise RecordError(f"point {key[0]} is there twice")
        seen.add(key)
        certificates.append(certificate)
    return CertificateFile(Path(path), header, tuple(certificates))


def write(path: Path, header: Header, certificates: Sequence[Certificate]) -> None:
    """Write a whole file; it takes its place complete or not at all."""
    lines = [header.to_json(), *(certificate.to_json() for certificate in certificates)]
    _replace(Path(path), "".join(f"{line}\n" for line in lines).encode())


class Appender:
    """Adds certificates to a file as they are made; use it in a `with` block."""

    def __init__(self, path: Path, header: Header, *, force: bool = False) -> None:
        """Open `path`; one of the same work is taken up where it ended, another is refused unless `force`."""
        self.path, self._header = Path(path), header
        earlier = None if force else existing(self.path, header)
        if earlier is None:
            write(self.path, header, ())
        elif (kept := _whole_lines(self.path)) is not None:
            _replace(self.path, kept)  # a half line at the end
        self.done = earlier.keys if earlier is not None else set()
        self._file = self.path.open("ab")

    def add(self, certificates: Sequence[Certificate]) -> None:
        """Append certificates and wait until they are on the disk."""
        content = "".join(f"{certificate.to_json()}\n" for certificate in certificates).encode()
        with _disk(self.path):
            self._file.write(content)
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done.update(key_of(self._header, certificate) for certificate in certificates)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "Appender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def existing(path: Path, header: Header) -> CertificateFile | None:
    """Return the file at `path` if it is of the same work, None where there is none; others raise `RecordError`."""
    if not path.exists():
        return None
    advice = "name another file with --out, or say --force to replace it"
    try:
        earlier = read(path, cut=True)
    except RecordError as error:
        raise RecordError(f"{error}. {path} is there already; {advice}") from None
    if not earlier.header.same_work(header):
        raise RecordError(f"{path} holds certificates of another model, other points or other settings; {advice}")
    return earlier


def _fits(header: Header, certificate: Certificate) -> None:
    """Raise `RecordError` where a certificate is not one of this header's."""
    for name, wanted in (("model_sha256", header.model.sha256), ("data_sha256", header.points.sha256)):
        if (found := getattr(certificate, name)) != wanted:
            raise RecordError(f"{name} is {found[:12]}..., the header says {wanted[:12]}...")
    if certificate.sample is None or certificate.sample >= header.num_points:
        raise RecordError(f"sample must be from 0 to {header.num_points - 1}, got {certificate.sample}")
    if not isinstance(header.settings, ZonotopeSettings):
        return
    if type(eps := certificate.parameters.get("eps")) is not float or eps not in header.settings.eps:
        raise RecordError(f"eps must be one of {header.settings.eps}, written as these are, got {eps!r}")


@contextlib.contextmanager
def _at(path: Path, number: int) -> Iterator[None]:
    try:
        yield
    except (RecordError, CertificationError, ValueError, ArithmeticError, RecursionError) as error:
        raise RecordError(f"{path}, line {number}: {error}") from None


def _text(line: bytes) -> str:
    """Return a line as text that can be printed again, also what it escapes."""
    text = line.decode("utf-8")
    if _HALF.search(text):
        json.dumps(json.loads(text), ensure_ascii=False).encode("utf-8")
    return text


def _whole_lines(path: Path) -> bytes | None:
    """Return the whole lines of a file that ends in half of one; None where it does not."""
    content = path.read_bytes()
    return None if content.endswith(b"\n") else content[: content.rfind(b"\n") + 1]


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = " (the disk is full)" if error.errno == errno.ENOSPC else ""
        raise RecordError(f"cannot write {path}: {error.strerror}{full}") from None


def _replace(path: Path, content: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    with _disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
