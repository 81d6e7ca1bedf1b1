"""Files that a killed process cannot spoil: locks, writes in one step, and what to say where a disk refuses."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from tasks.errors import RecordError


def lock(folder: Path) -> TextIO:
    """Take the lock of a run's name; it lies beside the folder, so that it stays when the folder is moved."""
    with disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RecordError(f"another process is writing {folder}; wait for it or choose another --name") from None
    return file


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turn what a disk refuses (full, read-only, gone) into a `RecordError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RecordError(
            f"cannot write {path}: {error}; finished rounds are safe: make room, then hawthorn run --resume RUN-FOLDER"
        ) from error


def write_down(file: TextIO, text: str) -> None:
    """Append text that a power cut does not lose."""
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader, or a kill, meets the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with disk(path):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
