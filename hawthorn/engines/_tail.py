"""Following the run record while another process writes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")


class LineTail(Generic[T]):
    """Reads the lines that others append to a JSON-lines file, each once, and only whole ones; `parse` reads a line."""

    def __init__(self, path: Path, parse: Callable[[str], T]) -> None:
        self.path, self.parse = path, parse
        self.file, self.offset = self._state()

    def read(self, on_record: Callable[[T], None]) -> None:
        """Call `on_record` for each line completed since; a file made anew or cut short is read from its start."""
        file, size = self._state()
        if file != self.file or size < self.offset:
            self.file, self.offset = file, 0
        if size <= self.offset:
            return
        with self.path.open("rb") as stream:
            stream.seek(self.offset)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self.offset += len(whole) + len(newline)
        for line in whole.splitlines():
            if line.strip():
                on_record(self.parse(line.decode()))

    def _state(self) -> tuple[int, int]:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size
