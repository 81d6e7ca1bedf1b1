"""CIFAR-10's forms: the compact one, the archive, the folder; and that reading runs no code of a pickle."""

import hashlib
import io
import lzma
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tasks.datasets import _cifar_residuals, cifar10
from tasks.errors import DataError
from tasks.source import DataSource


def _residuals_slowly(images: np.ndarray) -> np.ndarray:
    """Encode RGB [images, 3, rows, columns] pixel by pixel, from the definition of the median edge predictor."""
    red, green, blue = images.astype(int).transpose(1, 0, 2, 3)
    planes = np.stack([green, red - green + 128, blue - green + 128], 1) % 256
    out = np.zeros(images.shape, np.uint8)
    for place in np.ndindex(*planes.shape):
        n, plane, y, x = place
        left = planes[n, plane, y, x - 1] if x else 0
        above = planes[n, plane, y - 1, x] if y else 0
        corner = planes[n, plane, y - 1, x - 1] if x and y else 0
        if x == 0 or y == 0:
            guess = left + above
        elif corner >= max(left, above):
            guess = min(left, above)
        elif corner <= min(left, above):
            guess = max(left, above)
        else:
            guess = left + above - corner
        out[place] = (planes[place] - guess) % 256
    return out


def test_residuals_decode_to_the_images_they_came_from() -> None:
    draws = np.random.default_rng(1)
    noise = draws.integers(0, 256, (3, 3, 7, 6), dtype=np.uint8)
    ramps = np.broadcast_to(np.arange(0, 42, dtype=np.uint8).reshape(1, 1, 7, 6) * 6, (2, 3, 7, 6))
    images = np.concatenate([noise, ramps])
    assert np.array_equal(_cifar_residuals.decode(_residuals_slowly(images)), images)


def _load(raw: bytes) -> dict[str, Any]:
    return pickle.loads(raw, encoding="latin1")  # noqa: S301 - made in this file


def _small_batches() -> dict[str, bytes]:
    draws = np.random.default_rng(2)
    made = {"batches.meta": _cifar_residuals._meta_bytes()}
    for number, name in enumerate(_cifar_residuals.BATCHES):
        images = draws.integers(0, 256, (300, 3, 32, 32), dtype=np.uint8)
        files = [f"image_{number}_{n}.png" for n in range(300)]
        made[name] = _cifar_residuals._batch_bytes(name, images, [n % 10 for n in range(300)], files)
    return made


def test_batches_are_pickles_with_the_fields_torchvision_reads() -> None:
    made = _small_batches()
    batch = _load(made["data_batch_2"])
    assert batch["batch_label"] == "training batch 2 of 5"
    assert batch["data"].shape == (300, 3072)
    assert batch["labels"][:12] == [*range(10), 0, 1]
    assert batch["filenames"][299] == "image_1_299.png"
    assert _load(made["batches.meta"])["label_names"] == list(_cifar_residuals.CLASSES)


@pytest.fixture
def small_cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Seven small batches, which the module takes for the originals."""
    made = _small_batches()
    sums = {name: hashlib.md5(made[name]).hexdigest() for name in cifar10.MD5}
    monkeypatch.setattr(cifar10, "MD5", sums)
    return made


@pytest.mark.parametrize("above", ["", "CIFAR10"])
def test_cifar_is_read_from_its_folder_without_a_copy(small_cifar, empty_source: DataSource, above: str) -> None:
    folder = empty_source.roots[0] / above / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, raw in small_cifar.items():
        (folder / name).write_bytes(raw)
    data = cifar10.cifar10(empty_source)
    assert data.train_inputs.shape == (1500, 3, 32, 32)
    assert data.test_inputs.shape == (300, 3, 32, 32)
    first = _load(small_cifar["data_batch_1"])["data"]
    assert torch.equal(data.train_inputs[:300].flatten(1), torch.from_numpy(first))
    assert not empty_source.cache.exists()


@pytest.mark.parametrize("above", ["", "CIFAR10"])
def test_cifar_is_unpacked_from_its_archive(small_cifar, empty_source: DataSource, above: str) -> None:
    folder = empty_source.roots[0] / above
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as tar:
        for name, raw in small_cifar.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    assert len(cifar10.cifar10(empty_source).train_labels) == 1500
    assert (empty_source.cache / "cifar-10-batches-py" / "test_batch").read_bytes() == small_cifar["test_batch"]


def test_cifar_refuses_changed_bytes(small_cifar, empty_source: DataSource) -> None:
    folder = empty_source.roots[0] / "cifar-10-batches-py"
    folder.mkdir()
    for name, raw in small_cifar.items():
        (folder / name).write_bytes(raw[:-9] if name == "data_batch_3" else raw)
    with pytest.raises(DataError, match="data_batch_3"):
        cifar10.cifar10(empty_source)


def test_cifar_reader_runs_no_code_of_a_pickle() -> None:
    class Evil:
        def __reduce__(self):
            return os.getcwd, ()

    with pytest.raises(DataError, match="getcwd"):
        cifar10._ArraysOnly(io.BytesIO(pickle.dumps({"data": Evil()})), encoding="latin1").load()


def test_compact_cifar_that_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "index.tsv.xz").write_bytes(lzma.compress(b"data_batch_1\t3\ta.png\n"))
    (tmp_path / "data_batch_1.res.xz").write_bytes(b"no xz")
    with pytest.raises(DataError, match="compact CIFAR-10"):
        list(_cifar_residuals.batches(tmp_path))
