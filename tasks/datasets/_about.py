"""What is known of a data set, and the files it is made of."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tasks.source import DataSource

Progress = Callable[[str, int, int], None]  # (what, done, total), in bytes or files


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


class Files(Protocol):
    """The files of a data set: how they are found, unpacked and fetched. Folders follow torchvision's layout."""

    @property
    def wanted(self) -> tuple[str, ...]:
        """Relative paths of the unpacked files."""
        ...

    def find(self, source: DataSource) -> Path | None:
        """Return the folder that holds the files unpacked, or None."""
        ...

    def packed(self, source: DataSource) -> Path | None:
        """Return the folder that holds the files in a packed form that `unpack` reads, or None."""
        ...

    def unpack(self, source: DataSource, progress: Progress) -> Path | None:
        """Unpack into the cache and return it, or return None when there is nothing to unpack."""
        ...

    def download(self, source: DataSource, progress: Progress) -> Path:
        """Fetch the files into the cache and return it; raises `DataError`."""
        ...


@dataclass(frozen=True)
class About:
    """Facts of a data set; a data set's module keeps them in the constant ``ABOUT``."""

    name: str
    num_train: int
    num_test: int
    input_shape: tuple[int, ...]
    num_classes: int
    citation: str
    terms: str
    files: Files | None = None  # None: comes with an installed package, nothing to find

    def open(self, source: DataSource) -> Path:
        """Return the folder with the unpacked files, unpacking them first if need be; raises `DataError`."""
        if self.files is None:
            raise ValueError(f"data set {self.name} has no files")
        folder = self.files.find(source) or self.files.unpack(source, silent)
        if folder is None:
            raise source.missing(self.name, self.files.wanted)
        return folder
