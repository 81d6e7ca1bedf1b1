"""Where data sets are looked for, and the cache that takes files whole or not at all."""

import os
from pathlib import Path

import pytest

from tasks.datasets import cifar10, emnist_letters, fashion_mnist, mnist
from tasks.errors import DataError
from tasks.source import DataSource


def test_folders_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named, first, second, cache = (tmp_path / name for name in ("named", "first", "second", "cache"))
    named.mkdir()
    monkeypatch.setenv("HAWTHORN_DATA", os.pathsep.join([str(first), str(second)]))
    monkeypatch.setenv("HAWTHORN_CACHE", str(cache))
    source = DataSource.default(named)
    assert source.folders == (named, first, second, cache)
    assert source.cache == cache
    second.mkdir()
    (second / "a").touch()
    assert source.find("a") == second
    assert source.find("a", "b") is None
    (named / "a").touch()
    assert source.find("a") == named


def test_cache_follows_the_xdg_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HAWTHORN_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert DataSource.default().cache == tmp_path / "hawthorn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert DataSource.default().cache == Path.home() / ".cache" / "hawthorn"


def test_named_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        DataSource.default(tmp_path / "nowhere")


@pytest.mark.parametrize("module", [mnist, fashion_mnist, emnist_letters, cifar10], ids=lambda m: m.ABOUT.name)
def test_missing_files_name_every_path_and_the_command(module, empty_source: DataSource) -> None:
    with pytest.raises(DataError) as caught:
        getattr(module, module.ABOUT.name)(empty_source)
    for folder in (empty_source.roots[0], empty_source.cache):
        for name in module.ABOUT.files.wanted:
            assert str(folder / name) in str(caught.value)
    assert f"hawthorn data prepare {module.ABOUT.name}" in str(caught.value)


def test_a_stored_file_appears_whole_or_not_at_all(empty_source: DataSource) -> None:
    target = empty_source.cache / "a" / "b"

    def fail() -> None:
        with empty_source.store("a/b") as file:
            file.write(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(target.parent.iterdir()) == []
    with empty_source.store("a/b") as one, empty_source.store("a/b") as other:  # two writers at once
        one.write(b"whole")
        assert not target.exists()
        other.write(b"whole")
    assert target.read_bytes() == b"whole"
    assert list(target.parent.iterdir()) == [target]


def test_a_cache_that_cannot_be_written_says_what_to_set(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    source = DataSource((), tmp_path / "file" / "cache")
    with pytest.raises(DataError, match="HAWTHORN_CACHE"), source.store("a"):
        pytest.fail("the block must not run")


def test_trouble_of_the_block_is_not_blamed_on_the_cache(empty_source: DataSource) -> None:
    with pytest.raises(PermissionError), empty_source.store("a"):
        raise PermissionError("the source cannot be read")
