"""IDX files: unpacking from read-only folders, by many at once, and refusal of damaged files."""

import gzip
import hashlib
import lzma
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from tasks.datasets._about import silent
from tasks.datasets._idx import IdxFiles, read_idx
from tasks.errors import DataError
from tasks.source import DataSource

WriteIdx = Callable[[np.ndarray], bytes]


@pytest.fixture
def small(write_idx: WriteIdx) -> tuple[IdxFiles, dict[str, bytes]]:
    """Two small IDX files and what is known of them."""
    pixels = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    raw = {"images": write_idx(pixels), "labels": write_idx(np.array([2, 0, 1], np.uint8))}
    return IdxFiles("Small", {name: hashlib.md5(text).hexdigest() for name, text in raw.items()}), raw


def _lay(folder: Path, name: str, raw: bytes, form: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pack = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[form]
    (folder / f"{name}{form}").write_bytes(pack(raw))


@pytest.mark.parametrize("forms", [("", ""), (".gz", ".gz"), (".xz", ".xz"), ("", ".gz"), (".gz", ".xz")])
def test_idx_unpacks_every_form_from_a_read_only_root(small, empty_source: DataSource, forms) -> None:
    files, raw = small
    root = empty_source.roots[0]
    for (name, text), form in zip(raw.items(), forms, strict=True):
        _lay(root / "Small" / "raw", name, text, form)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")}
    folders = [root / "Small" / "raw", root / "Small", root]
    for folder in folders:
        folder.chmod(0o555)
    try:
        found = files.find(empty_source) or files.unpack(empty_source, silent)
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert found == (root if forms == ("", "") else empty_source.cache)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in root.rglob("*")} == before
    assert files.find(empty_source) == found  # reused afterwards
    for name, text in raw.items():
        assert (found / "Small" / "raw" / name).read_bytes() == text


def test_idx_parts_may_lie_in_different_roots(small, tmp_path: Path) -> None:
    files, raw = small
    source = DataSource((tmp_path / "one", tmp_path / "two"), tmp_path / "cache")
    _lay(tmp_path / "one" / "Small" / "raw", "images", raw["images"], ".gz")
    assert files.unpack(source, silent) is None
    _lay(tmp_path / "two" / "Small" / "raw", "labels", raw["labels"], ".xz")
    assert files.unpack(source, silent) == source.cache


def test_many_may_unpack_at_once(small, empty_source: DataSource) -> None:
    files, raw = small
    for name, text in raw.items():
        _lay(empty_source.roots[0] / "Small" / "raw", name, text, ".gz")
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: files.unpack(empty_source, silent), range(16))) == {empty_source.cache}
    folder = empty_source.cache / "Small" / "raw"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == raw


@pytest.mark.parametrize("damage", ["other bytes", "cut short", "not gzip"])
def test_damaged_files_are_refused_and_leave_nothing(small, empty_source: DataSource, damage: str) -> None:
    files, raw = small
    folder = empty_source.roots[0] / "Small" / "raw"
    _lay(folder, "labels", raw["labels"], "")
    packed = gzip.compress(raw["images"])
    bad = {"other bytes": gzip.compress(raw["images"] + b"x"), "cut short": packed[:-12], "not gzip": b"x" * 99}[damage]
    (folder / "images.gz").write_bytes(bad)
    with pytest.raises(DataError, match=r"images\.gz"):
        files.unpack(empty_source, silent)
    assert not [path for path in empty_source.cache.rglob("*") if path.is_file() and path.name != "labels"]


def test_unpacking_reports_progress_up_to_the_end(small, empty_source: DataSource) -> None:
    files, raw = small
    for name, text in raw.items():
        _lay(empty_source.roots[0] / "Small" / "raw", name, text, ".gz")
    seen: list[tuple[str, int, int]] = []
    files.unpack(empty_source, lambda *news: seen.append(news))
    assert {what for what, _, _ in seen} == {"images.gz", "labels.gz"}
    assert all(0 < done <= total for _, done, total in seen)
    assert seen[-1][1] == seen[-1][2]


@pytest.mark.parametrize("raw", [b"", b"\0\0\x08", b"\0\0\x09\1\0\0\0\0", b"\0\0\x08\1\0\0\0\3ab", b"\0\0\x08\3\0\0"])
def test_what_is_not_idx_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "file").write_bytes(raw)
    with pytest.raises(DataError, match="file"):
        read_idx(tmp_path / "file")
