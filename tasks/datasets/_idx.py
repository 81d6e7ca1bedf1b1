"""The IDX files of the MNIST family: found, unpacked from .gz or .xz, and read.

Layout, as torchvision's: ``FOLDER/raw/NAME`` unpacked, beside or instead of it ``NAME.gz`` or ``NAME.xz``.
"""

import gzip
import hashlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from tasks.datasets import _torchvision
from tasks.datasets._about import Progress
from tasks.datasets._download import fetch
from tasks.errors import DataError
from tasks.source import DataSource

_CHUNK = 1 << 20


@dataclass(frozen=True)
class IdxFiles:
    """IDX files in ``folder/raw``; `folder` is also the name of torchvision's class, which knows the addresses."""

    folder: str
    md5: Mapping[str, str]  # unpacked file name -> md5 of its bytes

    @property
    def wanted(self) -> tuple[str, ...]:
        return tuple(f"{self.folder}/raw/{name}" for name in self.md5)

    def find(self, source: DataSource) -> Path | None:
        return source.find(*self.wanted)

    def packed(self, source: DataSource) -> Path | None:
        paths = [path for path in self._sources(source).values() if path is not None]
        return paths[0].parent if len(paths) == len(self.wanted) else None

    def _sources(self, source: DataSource) -> dict[str, Path | None]:
        return {name: source.file(name, f"{name}.gz", f"{name}.xz") for name in self.wanted}

    def unpack(self, source: DataSource, progress: Progress) -> Path | None:
        """Unpack (or copy, where a folder has only some files unpacked) into the cache, each file checked by md5."""
        if self.packed(source) is None:
            return None
        for name, path in self._sources(source).items():
            if path is not None and path != source.cache / name:
                with path.open("rb") as file:
                    self._unpack(source, name, file, path, progress)
        return source.cache

    def download(self, source: DataSource, progress: Progress) -> Path:
        """Fetch the four archives, or the one zip of all splits, from torchvision's addresses."""
        reader = getattr(_torchvision.datasets(), self.folder)
        if hasattr(reader, "url"):
            self._download_zip(source, reader.url, reader.md5, progress)
        else:
            for name, md5 in reader.resources:
                place = f"{self.folder}/raw/{name}"
                path = fetch(source, [f"{mirror}{name}" for mirror in reader.mirrors], md5, place, progress)
                with path.open("rb") as file:
                    self._unpack(source, place.removesuffix(".gz"), file, path, progress)
                path.unlink(missing_ok=True)
        return source.cache

    def _download_zip(self, source: DataSource, address: str, md5: str, progress: Progress) -> None:
        path = fetch(source, [address], md5, f"{self.folder}/raw/gzip.zip", progress)
        with zipfile.ZipFile(path) as archive:
            for name in self.wanted:
                inner = f"gzip/{Path(name).name}.gz"
                with archive.open(inner) as file:
                    self._unpack(source, name, file, Path(inner), progress, archive.getinfo(inner).file_size)
        path.unlink(missing_ok=True)

    def _unpack(
        self, source: DataSource, name: str, file: IO[bytes], path: Path, progress: Progress, size: int = 0
    ) -> None:
        total = size or path.stat().st_size
        checksum = hashlib.md5(usedforsecurity=False)
        wanted = self.md5[Path(name).name]
        try:
            with source.store(name) as target, _opened(file, path.suffix) as unpacked:
                while chunk := unpacked.read(_CHUNK):
                    target.write(chunk)
                    checksum.update(chunk)
                    progress(path.name, min(file.tell(), total), total)
                if checksum.hexdigest() != wanted:
                    raise DataError(f"{path} is not the original: md5 {checksum.hexdigest()} unpacked, wanted {wanted}")
        except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as error:
            raise DataError(f"{path} cannot be unpacked: {error}; copy or fetch it again") from None


def _opened(file: IO[bytes], suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return cast(BinaryIO, gzip.open(file))
    return cast(BinaryIO, lzma.open(file) if suffix == ".xz" else file)


def read_idx(path: Path) -> Tensor:
    """Return the uint8 array of an IDX file, in its own shape; raises `DataError` when the header does not fit."""
    raw = np.fromfile(path, np.uint8)
    header = 4 + 4 * int(raw[3]) if len(raw) >= 4 else 0
    if header == 0 or bytes(raw[:3]) != b"\x00\x00\x08" or len(raw) < header:
        raise DataError(f"{path} is not an IDX file of bytes")
    shape = tuple(int(n) for n in raw[4:header].view(">u4"))
    if math.prod(shape) != len(raw) - header:
        raise DataError(f"{path} should hold {shape} bytes after its header, but holds {len(raw) - header}")
    return torch.from_numpy(raw[header:].reshape(shape))


def read_split(folder: Path, images: str, labels: str) -> tuple[Tensor, Tensor]:
    """Return (images uint8 [samples, 1, rows, columns], labels int64 [samples]) of two IDX files."""
    pixels, classes = read_idx(folder / images), read_idx(folder / labels)
    if pixels.ndim != 3 or classes.ndim != 1 or len(pixels) != len(classes):
        raise DataError(f"{folder}: {images} is {tuple(pixels.shape)} and {labels} is {tuple(classes.shape)}")
    return pixels.unsqueeze(1), classes.long()
