"""Files of texts: found as they are, never unpacked, with no address to fetch them from."""

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path

from tasks.datasets._about import Progress
from tasks.errors import DataError
from tasks.source import DataSource


@dataclass(frozen=True)
class TextFile:
    """One file, .gz or not, in a data folder; `origin` says where people get it."""

    name: str
    origin: str

    @property
    def wanted(self) -> tuple[str, ...]:
        return (self.name,)

    def find(self, source: DataSource) -> Path | None:
        return source.find(self.name)

    def packed(self, source: DataSource) -> Path | None:
        return None

    def unpack(self, source: DataSource, progress: Progress) -> Path | None:
        return None

    def download(self, source: DataSource, progress: Progress) -> Path:
        raise DataError(f"{Path(self.name).name} is not fetched from here; {self.origin}")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the whole text of a file, unpacked if it is .gz; raises `DataError`."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode(encoding)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
