"""CIFAR-10: 50,000 + 10,000 photographs of 10 classes, 32x32 colour, in the original order.

Krizhevsky, "Learning multiple layers of features from tiny images", 2009.

Found as torchvision's ``cifar-10-batches-py`` (in a root or in its folder ``CIFAR10``), as the
original ``.tar.gz``, or as the compact lossless form that `tasks.datasets._cifar_residuals` decodes.
"""

import hashlib
import io
import pickle
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.datasets import _cifar_residuals, _torchvision
from tasks.datasets._about import About, Progress
from tasks.datasets._download import fetch
from tasks.errors import DataError
from tasks.source import DataSource

# The sums that torchvision.datasets.CIFAR10 checks, too.
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}
_FOLDER = "cifar-10-batches-py"
_ARCHIVE = "cifar-10-python.tar.gz"


@dataclass(frozen=True)
class CifarFiles:
    """The batches of CIFAR-10, the archive they come in, and their compact form."""

    @property
    def wanted(self) -> tuple[str, ...]:
        return tuple(f"{_FOLDER}/{name}" for name in MD5)

    def find(self, source: DataSource) -> Path | None:
        """Return the folder above ``cifar-10-batches-py``."""
        direct = source.find(*self.wanted)
        if direct is not None:
            return direct
        nested = source.find(*(f"CIFAR10/{name}" for name in self.wanted))
        return None if nested is None else nested / "CIFAR10"

    def packed(self, source: DataSource) -> Path | None:
        archive = source.file(f"CIFAR10/{_ARCHIVE}", _ARCHIVE)
        if archive is not None:
            return archive.parent
        compact = source.find(*(f"CIFAR10/{name}" for name in _cifar_residuals.FILES))
        return None if compact is None else compact / "CIFAR10"

    def unpack(self, source: DataSource, progress: Progress) -> Path | None:
        archive = source.file(f"CIFAR10/{_ARCHIVE}", _ARCHIVE)
        if archive is not None:
            return self._extract(source, archive, progress)
        compact = source.find(*(f"CIFAR10/{name}" for name in _cifar_residuals.FILES))
        if compact is None:
            return None
        for done, (name, raw) in enumerate(_cifar_residuals.batches(compact / "CIFAR10")):
            _put(source, name, raw, compact / "CIFAR10")
            progress(name, done + 1, len(MD5))
        return source.cache

    def download(self, source: DataSource, progress: Progress) -> Path:
        reader = _torchvision.datasets().CIFAR10
        archive = fetch(source, [reader.url], reader.tgz_md5, f"CIFAR10/{_ARCHIVE}", progress)
        folder = self._extract(source, archive, progress)
        archive.unlink(missing_ok=True)
        return folder

    def _extract(self, source: DataSource, archive: Path, progress: Progress) -> Path:
        try:
            with tarfile.open(archive) as tar:
                for done, name in enumerate(MD5):
                    member = tar.extractfile(f"{_FOLDER}/{name}")
                    _put(source, name, member.read() if member else b"", archive)
                    progress(name, done + 1, len(MD5))
        except (tarfile.TarError, EOFError, KeyError) as error:
            raise DataError(f"{archive} cannot be unpacked: {error}; copy or fetch it again") from None
        return source.cache


def _put(source: DataSource, name: str, raw: bytes, origin: Path) -> None:
    _check(name, raw, origin)
    with source.store(f"{_FOLDER}/{name}") as file:
        file.write(raw)


def _check(name: str, raw: bytes, origin: Path) -> None:
    md5 = hashlib.md5(raw, usedforsecurity=False).hexdigest()
    if md5 != MD5[name]:
        raise DataError(f"{name} of {origin} is not the original: md5 {md5}, wanted {MD5[name]}")


ABOUT = About(
    name="cifar10",
    num_train=50_000,
    num_test=10_000,
    input_shape=(3, 32, 32),
    num_classes=10,
    citation="Krizhevsky, Learning multiple layers of features from tiny images, 2009",
    terms="no licence stated; the authors ask for the citation",
    files=CifarFiles(),
)


def cifar10(source: DataSource) -> Dataset:
    """Return CIFAR-10 as uint8 [samples, 3, 32, 32] in the original order; raises `DataError` when it is missing."""
    folder = ABOUT.open(source) / _FOLDER
    train = [_read(folder, name) for name in MD5 if name.startswith("data_batch")]
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    return Dataset("cifar10", images, labels, *_read(folder, "test_batch"), num_classes=10, scale=1 / 255)


def _read(folder: Path, name: str) -> tuple[Tensor, Tensor]:
    raw = (folder / name).read_bytes()
    _check(name, raw, folder)
    batch = _ArraysOnly(io.BytesIO(raw), encoding="latin1").load()
    return torch.from_numpy(batch["data"].reshape(-1, 3, 32, 32)), torch.tensor(batch["labels"])


class _ArraysOnly(pickle.Unpickler):
    """An unpickler that makes NumPy arrays and plain containers, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return lambda kind, shape, code: np.ndarray.__new__(np.ndarray, shape, np.uint8)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        raise DataError(f"a batch of CIFAR-10 holds {module}.{name}, which it should not")
