"""Real data for the tests of `tasks`, when this machine has it, and small files that look like it."""

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tasks.dataset import Dataset
from tasks.errors import DataError
from tasks.source import DataSource
from tasks.spec import resolve


@pytest.fixture(scope="session")
def real_source(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    """This machine's data, unpacked into HAWTHORN_CACHE if that is set, else into a folder that pytest removes."""
    source = DataSource.default()
    if os.environ.get("HAWTHORN_CACHE"):
        return source
    cache = tmp_path_factory.mktemp("cache")
    return replace(source, roots=(*(root for root in source.roots if root != source.cache), cache), cache=cache)


@pytest.fixture(scope="session")
def real(real_source: DataSource) -> Callable[[str], Dataset]:
    """Return a function from a data set's name to the data; a test that asks for missing data is skipped."""
    loaded: dict[str, Dataset] = {}

    def load(name: str) -> Dataset:
        if name not in loaded:
            try:
                loaded[name] = resolve("dataset", name)(real_source)
            except DataError as error:
                pytest.skip(str(error).splitlines()[0])
        return loaded[name]

    return load


@pytest.fixture
def write_idx() -> Callable[[np.ndarray], bytes]:
    """Return a function from a uint8 array to the bytes of its IDX file."""

    def write(values: np.ndarray) -> bytes:
        return bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()

    return write


@pytest.fixture
def empty_source(tmp_path: Path) -> DataSource:
    """A source that finds nothing: an empty root and an empty cache."""
    root = tmp_path / "root"
    root.mkdir()
    return DataSource((root,), tmp_path / "cache")
