"""The folder of the service: uploaded files by their hash, finished results and saved progress by their request's.

Everything is written beside its place, flushed to the disk and renamed into it, so a kill leaves either all of a file
or nothing of it; what was half written is swept away at the next start. Results and progress carry a hash of their
content: a file that rotted is worked out anew rather than believed. Nothing is ever unpickled.

There are two quotas, so that neither fills the other's: one of uploads, one of results and progress. What is unused
for longest makes room, for clients send an upload again and a result is worked out again; an upload on its way takes
room by the bytes that came, never by those announced, and removes nothing before all of it is there and was checked.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
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

    def __init__(self, file: BinaryIO, path: Path, take: Callable[[int], None]) -> None:
        self._file, self._path, self._take = file, path, take
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def write(self, chunk: bytes) -> None:
        """Append `chunk`; raises `StoreFullError` where the disk, or the room for uploads on their way, is full."""
        self._take(len(chunk))
        self.num_bytes += len(chunk)
        try:
            self._file.write(chunk)
        except OSError as error:
            raise StoreFullError(f"the upload cannot be written: {error.strerror}; free space on the disk") from None
        self._digest.update(chunk)

    def sha256(self) -> str:
        return self._digest.hexdigest()

    @property
    def path(self) -> Path:
        """Where the bytes lie until they are committed; flushed, so that they can be read."""
        self._file.flush()
        return self._path


class Store:
    """One folder, used by one service at a time."""

    def __init__(self, folder: Path, *, max_bytes: int, max_result_bytes: int | None = None) -> None:
        """Open `folder` for uploads of `max_bytes` in all; results have `max_result_bytes`, as many unless told."""
        self.folder, self.max_bytes = folder, max_bytes
        self.max_result_bytes = max_bytes if max_result_bytes is None else max_result_bytes
        for name in ("models", "sets", "results", "progress", "incoming"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self._lock_file = (folder / "lock").open("w")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock_file.close()
            raise ConfigError(f"another service uses the store {folder}; give this one a --store of its own") from None
        self._lock = threading.Lock()
        self._arriving = 0  # bytes of uploads on their way
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
        """Give a place to write an upload of `num_bytes`; what is not committed is removed.

        Raises `StoreFullError` where so many can never fit; nothing stored makes room before `commit`.
        """
        if num_bytes > self.max_bytes or shutil.disk_usage(self.folder).free < num_bytes:
            raise self._no_room(num_bytes)
        number, name = tempfile.mkstemp(dir=self.folder / "incoming")
        incoming = None
        try:
            with os.fdopen(number, "wb") as file:
                yield (incoming := Incoming(file, Path(name), self._take))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            with self._lock:
                self._arriving -= 0 if incoming is None else incoming.num_bytes

    def commit(self, kind: Kind, incoming: Incoming) -> str:
        """Put a received file in its place and return its hash; uploads unused for longest make room for it."""
        sha256 = incoming.sha256()
        path = self.path(kind, sha256)
        _flush(incoming.path)
        with self._lock:
            if not path.exists() and not self._evict(("models", "sets"), incoming.num_bytes, self.max_bytes):
                raise self._no_room(incoming.num_bytes)
            os.replace(incoming.path, path)
        _flush(path.parent)
        return sha256

    def write(self, kind: Written, sha256: str, content: bytes) -> None:
        """Keep `content` under a request's hash, whole or not at all; progress and old results make room.

        Raises `StoreFullError` on a full disk, or where all the room for results is less than `content`.
        """
        path = self.path(kind, sha256)
        try:
            number, beside = tempfile.mkstemp(dir=self.folder / "incoming")  # two writers of one place do not meet
            try:
                with os.fdopen(number, "wb") as file:
                    file.write(hashlib.sha256(content).digest() + content)
                    file.flush()
                    os.fsync(file.fileno())
                with self._lock:
                    if not self._evict(("progress", "results"), len(content) + _DIGEST, self.max_result_bytes, path):
                        raise OSError(errno.ENOSPC, f"{len(content)} bytes are more than all results may have")
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
        path = self.path(kind, sha256)
        try:
            content = path.read_bytes()
            os.utime(path)
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

    def _take(self, num_bytes: int) -> None:
        """Count bytes that arrived; all uploads on their way together may have as many as all stored ones."""
        with self._lock:
            if self._arriving + num_bytes > self.max_bytes:
                raise self._no_room(num_bytes)
            self._arriving += num_bytes

    def _evict(self, kinds: tuple[str, ...], num_bytes: int, most: int, replaced: Path | None = None) -> bool:
        """Remove saved progress, then what is unused for longest, until `num_bytes` fit; False, removing nothing, where
        they cannot. What is in use stays, and `replaced` is about to go anyway."""
        there = [(path.parent.name != "progress", at, path, size) for at, path, size in self._files(*kinds)]
        there = [entry for entry in there if entry[2] != replaced]
        excess = sum(entry[3] for entry in there) + num_bytes - most
        free = sorted(entry for entry in there if entry[2] not in self._in_use)
        if excess > sum(entry[3] for entry in free):
            return False
        for _, _, path, size in free:
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= size
        return True

    def _no_room(self, num_bytes: int) -> StoreFullError:
        return StoreFullError(
            f"the store has no room for {num_bytes} bytes (limit {self.max_bytes}, what is in use stays): "
            "try again when running work is done, or raise --max-store-bytes"
        )


def _flush(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
