"""Where data sets are looked for, and the cache that unpacked files are written to.

Folders are searched in this order: the explicit one (``--data-dir``), those of the environment
variable HAWTHORN_DATA (several are joined with the system's path separator), the cache. Only the
cache is written to, so every other folder may be read-only. A file appears in the cache whole or
not at all: two processes may unpack the same data set at once.
"""

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from tasks.errors import DataError


@dataclass(frozen=True)
class DataSource:
    """Folders to read data sets from, in order, and the one cache folder to write to."""

    roots: tuple[Path, ...]
    cache: Path

    @staticmethod
    def default(data_dir: str | Path | None = None) -> "DataSource":
        """Return the source of this machine; `data_dir` comes before all others and must exist."""
        named = [] if data_dir is None else [Path(data_dir).expanduser()]
        if named and not named[0].is_dir():
            raise DataError(f"the data folder {data_dir} does not exist; create it or name another one")
        listed = os.environ.get("HAWTHORN_DATA", "").split(os.pathsep)
        cache = _cache_folder()
        folders = [*named, *(Path(text).expanduser() for text in listed if text), cache]
        return DataSource(tuple(dict.fromkeys(folders)), cache)

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are searched, the cache last unless it was named earlier."""
        return self.roots if self.cache in self.roots else (*self.roots, self.cache)

    def find(self, *names: str) -> Path | None:
        """Return the first folder that holds every one of `names` (relative file paths), or None."""
        return next((root for root in self.folders if all((root / name).is_file() for name in names)), None)

    def file(self, *names: str) -> Path | None:
        """Return the first existing file among `names` (relative paths, the best first), or None."""
        found = ((name, self.find(name)) for name in names)
        return next((root / name for name, root in found if root is not None), None)

    def missing(self, dataset: str, names: tuple[str, ...]) -> DataError:
        """Return the error for files that no folder holds: every path tried, and what to do."""
        tried = "\n".join(f"  {root / name}" for root in self.folders for name in names)
        return DataError(
            f"data set {dataset} is not here; tried\n{tried}\n"
            f"Run `hawthorn data prepare {dataset}` to fetch it, or name the folder that has it "
            "with --data-dir or the environment variable HAWTHORN_DATA."
        )

    @contextmanager
    def store(self, name: str) -> Iterator[BinaryIO]:
        """Open a file to become `name` in the cache; it takes its place only if the block ends without an error."""
        target = self.cache / name
        part = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(4)}.part")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            file = part.open("xb")
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            with file:
                yield file
            part.replace(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise self._unwritable(error) from None
            raise  # the block's own trouble, such as a source that cannot be read
        finally:
            part.unlink(missing_ok=True)

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(
            f"cannot write to the cache {self.cache}: {error.strerror}; "
            "set the environment variable HAWTHORN_CACHE to a folder that can be written to"
        )


def _cache_folder() -> Path:
    named = os.environ.get("HAWTHORN_CACHE")
    if named:
        return Path(named).expanduser()
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored (XDG base directory rules)
    return (base if base.is_absolute() else Path.home() / ".cache") / "hawthorn"
