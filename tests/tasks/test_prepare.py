"""Preparing data sets: the catalogue, unpacking, and downloads, here from folders instead of a network."""

import gzip
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.datasets import _torchvision, emnist_letters, mnist
from tasks.datasets._idx import IdxFiles
from tasks.errors import DataError, SpecError
from tasks.prepare import catalogue, prepare
from tasks.source import DataSource
from tasks.spec import names

WriteIdx = Callable[[np.ndarray], bytes]


def _nothing(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture
def contents(write_idx: WriteIdx) -> dict[str, bytes]:
    """Small files under the names of EMNIST letters and MNIST."""
    wanted = [Path(name).name for module in (mnist, emnist_letters) for name in module.ABOUT.files.wanted]
    shapes = {"images": (4, 28, 28), "labels": (4,)}
    return {
        name: write_idx(np.full(shapes["images" if "images" in name else "labels"], 1, np.uint8)) for name in wanted
    }


@pytest.fixture
def server(contents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for torchvision's mirrors, with sums that fit."""
    folder = tmp_path / "server"
    folder.mkdir()
    resources = []
    for module in (mnist, emnist_letters):
        sums = {name: hashlib.md5(contents[name]).hexdigest() for name in module.ABOUT.files.md5}
        files = IdxFiles(module.ABOUT.files.folder, sums)
        monkeypatch.setattr(module, "ABOUT", module.ABOUT.__class__(**{**vars(module.ABOUT), "files": files}))
    for name in mnist.ABOUT.files.md5:
        packed = gzip.compress(contents[name])
        (folder / f"{name}.gz").write_bytes(packed)
        resources.append((f"{name}.gz", hashlib.md5(packed).hexdigest()))
    with zipfile.ZipFile(folder / "gzip.zip", "w") as archive:
        for name in emnist_letters.ABOUT.files.md5:
            archive.writestr(f"gzip/{name}.gz", gzip.compress(contents[name]))
        archive.writestr("gzip/emnist-digits-train-labels-idx1-ubyte.gz", b"not wanted")
    broken = (tmp_path / "broken").as_uri() + "/"
    readers = SimpleNamespace(
        MNIST=SimpleNamespace(mirrors=[broken, folder.as_uri() + "/"], resources=resources),
        EMNIST=SimpleNamespace(
            url=(folder / "gzip.zip").as_uri(), md5=hashlib.md5((folder / "gzip.zip").read_bytes()).hexdigest()
        ),
    )
    monkeypatch.setattr(_torchvision, "datasets", lambda: readers)
    return folder


def test_catalogue_lists_every_data_set_with_its_facts(empty_source: DataSource) -> None:
    lines = catalogue(empty_source)
    assert [line.name for line in lines] == list(names("dataset"))
    by_name = {line.name: line for line in lines}
    assert by_name["digits"].ready
    assert by_name["digits"].missing == ()
    assert not by_name["mnist"].ready
    assert by_name["mnist"].found is None
    assert "MNIST/raw/train-images-idx3-ubyte" in by_name["mnist"].missing
    assert (by_name["cifar10"].num_train, by_name["cifar10"].num_test) == (50_000, 10_000)
    assert by_name["emnist_letters"].input_shape == (1, 28, 28)
    for name in ("digits", "mnist", "fashion_mnist", "emnist_letters", "cifar10"):
        assert by_name[name].citation
        assert by_name[name].terms


@pytest.mark.parametrize("name", ["mnist", "emnist_letters"])
def test_prepare_downloads_what_no_folder_has(name: str, server: Path, contents, empty_source: DataSource) -> None:
    seen: list[tuple[str, int, int]] = []
    folder = prepare(name, empty_source, lambda *news: seen.append(news))
    assert folder == empty_source.cache
    module = {"mnist": mnist, "emnist_letters": emnist_letters}[name]
    stored = {path.name: path.read_bytes() for path in empty_source.cache.rglob("*") if path.is_file()}
    assert stored == {file: contents[file] for file in module.ABOUT.files.md5}  # and no archive is left behind
    assert seen
    assert all(0 < done <= total for _, done, total in seen)
    line = next(line for line in catalogue(empty_source) if line.name == name)
    assert line.ready
    assert line.found == empty_source.cache


def test_prepare_twice_fetches_once(server: Path, empty_source: DataSource, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare("mnist", empty_source, _nothing)
    monkeypatch.setattr(_torchvision, "datasets", lambda: pytest.fail("asked for the network"))
    assert prepare("mnist", empty_source, _nothing) == empty_source.cache


def test_prepare_prefers_what_a_folder_has(server: Path, empty_source: DataSource, monkeypatch, contents) -> None:
    raw = empty_source.roots[0] / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in mnist.ABOUT.files.md5:
        (raw / f"{name}.gz").write_bytes(gzip.compress(contents[name]))
    monkeypatch.setattr(_torchvision, "datasets", lambda: pytest.fail("asked for the network"))
    assert prepare("mnist", empty_source, _nothing) == empty_source.cache


def test_wrong_bytes_from_a_server_are_refused(server: Path, empty_source: DataSource) -> None:
    (server / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(b"something else"))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz(.|\n)*md5"):
        prepare("mnist", empty_source, _nothing)
    assert not list(empty_source.cache.rglob("train-labels*"))


def test_without_a_network_the_error_says_what_to_do(server: Path, empty_source: DataSource) -> None:
    (server / "gzip.zip").unlink()
    with pytest.raises(DataError, match=r"--data-dir FOLDER, or set HAWTHORN_DATA") as caught:
        prepare("emnist_letters", empty_source, _nothing)
    assert "gzip.zip" in str(caught.value)
    assert not [path for path in empty_source.cache.rglob("*") if path.is_file()]


def test_unknown_names_and_data_sets_without_files(empty_source: DataSource) -> None:
    with pytest.raises(SpecError, match="there are:"):
        prepare("minst", empty_source, _nothing)
    assert prepare("digits", empty_source, _nothing) == empty_source.cache
