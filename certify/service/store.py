"""The folder of the service: uploaded files by their hash, finished results and saved progress by their request's.

Everything is written beside its place, flushed to the disk and renamed into it, so a kill leaves either all of a file
or nothing of it; what was half written is swept away at the next start. Results and progress carry a hash of their
content: a file that rotted is worked out anew rather than believed. Nothing is ever unpickled.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Literal

from tasks.errors import ConfigError, DataError

Kind = Literal["models", "sets"]
Written = Literal["results", "progress"]
SHA256 = re.compile(r"[0-9a-f]{64}")
_DIGEST = 32


class StoreFullError(DataError):
    """The store or its disk has no room for what should be written."""


class Incoming:
    """An upload on its way: bytes are hashed as they are written; `commit` or nothing is kept."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self._path = file, path
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append `chunk`; raises `StoreFullError` where the disk is full."""
        try:
            self._file.write(chunk)
        except OSError as error:
            raise StoreFullError(f"the upload cannot be written: {error.strerror}; free space on the disk") from None
        self._digest.update(chunk)
        self.num_bytes += len(chunk)

    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def path(self) -> Path:
        """Where the bytes lie until they are committed; flushed, so that they can be read."""
        self._file.flush()
        return self._path


class Store:
    """One folder, used by one service at a time."""

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        for name in ("models", "sets", "results", "progress", "incoming"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise ConfigError(f"another service uses the store {folder}; give this one a --store of its own") from None
        self._lock = threading.Lock()
        self._reserved = 0
        self._in_use: dict[Path, int] = {}
        self._sweep()

    def close(self) -> None:
        """Let another service use the folder."""
        self._lock_file.close()

    def _sweep(self) -> None:
        for path in (self.folder / "incoming").glob("*"):
            path.unlink()

    def path(self, kind: Kind | Written, sha256: str) -> Path:
        """Return where the file of a hash lies or would lie."""
        if SHA256.fullmatch(sha256) is None:
            raise DataError(f"an id is 64 lower-case hexadecimal digits, got {sha256[:80]!r}")
        return self.folder / kind / sha256

    def has(self, kind: Kind, sha256: str) -> bool:
        """True where the file is there; it then counts as just used."""
        try:
            os.utime(self.path(kind, sha256))
        except FileNotFoundError:
            return False
        return True

    @contextlib.contextmanager
    def use(self, kind: Kind, sha256: str) -> Iterator[Path]:
        """Keep an uploaded file from being evicted; raises `FileNotFoundError` where there is none."""
        path = self.path(kind, sha256)
        with self._lock:
            os.utime(path)
            self._in_use[path] = self._in_use.get(path, 0) + 1
        try:
            yield path
        finally:
            with self._lock:
                self._in_use[path] -= 1
                if not self._in_use[path]:
                    del self._in_use[path]

    @contextlib.contextmanager
    def receive(self, num_bytes: int) -> Iterator[Incoming]:
        """Reserve room for an upload of `num_bytes` and give a place to write it; what is not committed is removed."""
        self._reserve(num_bytes)
        number, name = tempfile.mkstemp(dir=self.folder / "incoming")
        try:
            with os.fdopen(number, "wb") as file:
                yield Incoming(file, Path(name))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            with self._lock:
                self._reserved -= num_bytes

    def commit(self, kind: Kind, incoming: Incoming) -> str:
        """Put a received file in its place and return its hash; one that was there already stays."""
        sha256 = incoming.sha256()
        path = self.path(kind, sha256)
        _flush(incoming.path)
        os.replace(incoming.path, path)
        _flush(path.parent)
        return sha256

    def write(self, kind: Written, sha256: str, content: bytes) -> None:
        """Keep `content` under a request's hash, whole or not at all; raises `StoreFullError` on a full disk."""
        path = self.path(kind, sha256)
        try:
            number, beside = tempfile.mkstemp(dir=self.folder / "incoming")  # two writers of one place do not meet
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(hashlib.sha256(content).digest() + content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(beside, path)
                _flush(path.parent)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(beside)
                raise
        except OSError as error:
            raise StoreFullError(f"cannot write {kind} into the store: {error.strerror}; free space") from None

    def read(self, kind: Written, sha256: str) -> bytes | None:
        """Return what `write` kept; None where there is nothing, or nothing that can be believed."""
        try:
            content = self.path(kind, sha256).read_bytes()
        except FileNotFoundError:
            return None
        digest, content = content[:_DIGEST], content[_DIGEST:]
        return content if hashlib.sha256(content).digest() == digest else None

    def remove(self, kind: Written, sha256: str) -> None:
        """Forget what was kept under a request's hash."""
        self.path(kind, sha256).unlink(missing_ok=True)

    def num_bytes(self) -> int:
        """Return the bytes of everything in the folder."""
        return sum(size for _, _, size in self._files("models", "sets", "results", "progress"))

    def _files(self, *kinds: str) -> list[tuple[float, Path, int]]:
        found = []
        for kind in kinds:
            for entry in os.scandir(self.folder / kind):
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    status = entry.stat()
                    found.append((status.st_mtime, Path(entry.path), status.st_size))
        return found

    def _reserve(self, num_bytes: int) -> None:
        """Make room by removing saved progress, then the uploads unused for longest, which clients send again."""
        with self._lock:
            excess = self.num_bytes() + self._reserved + num_bytes - self.max_bytes
            for _, path, size in sorted(self._files("progress")) + sorted(self._files("models", "sets")):
                if excess <= 0:
                    break
                if path not in self._in_use:
                    path.unlink(missing_ok=True)
                    excess -= size
            if excess > 0 or shutil.disk_usage(self.folder).free < num_bytes:
                raise StoreFullError(
                    f"the store has no room for {num_bytes} bytes (limit {self.max_bytes}, results are never removed): "
                    "try again when running work is done, raise --max-store-bytes or clear the folder's results"
                )
            self._reserved += num_bytes


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
