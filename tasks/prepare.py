"""The data sets as the command line sees them: what is here, what is missing, and how to get it."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from tasks.datasets._about import About, Progress
from tasks.errors import DataError
from tasks.source import DataSource
from tasks.spec import PACKAGES, find, names


@dataclass(frozen=True)
class DatasetStatus:
    """One line of the catalogue: what a data set is, and whether its files are here."""

    name: str
    ready: bool
    found: Path | None  # None: not here, or nothing to find because it comes with an installed package
    missing: tuple[str, ...]  # relative paths of the unpacked files that are not all in one folder
    packed: bool = False  # found in a packed form; the first use, or `prepare`, unpacks it into the cache
    num_train: int | None = None  # None, as below: the data set's module states no facts
    num_test: int | None = None
    input_shape: tuple[int, ...] | None = None
    num_classes: int | None = None
    citation: str = ""
    terms: str = ""


def catalogue(source: DataSource) -> list[DatasetStatus]:
    """Return the status of every data set that exists as a file, in the order of names; reads no data."""
    return [_status(name, source) for name in names("dataset")]


def _status(name: str, source: DataSource) -> DatasetStatus:
    about = _about(name)
    if about is None:
        return DatasetStatus(name, ready=True, found=None, missing=())
    unpacked = None if about.files is None else about.files.find(source)
    found = unpacked or (None if about.files is None else about.files.packed(source))
    ready = about.files is None or found is not None
    return DatasetStatus(
        name,
        ready=ready,
        found=found,
        packed=found is not None and unpacked is None,
        missing=() if ready or about.files is None else about.files.wanted,
        num_train=about.num_train,
        num_test=about.num_test,
        input_shape=about.input_shape,
        num_classes=about.num_classes,
        citation=about.citation,
        terms=about.terms,
    )


def prepare(name: str, source: DataSource, progress: Progress) -> Path:
    """Return the folder with a data set's files, unpacking or downloading them into the cache first if need be.

    `progress` is called as (what, done, total). Raises `SpecError` for an unknown name and `DataError` when
    the files are neither here nor to be had, saying what to do.
    """
    find("dataset", name)
    about = _about(name)
    if about is None or about.files is None:
        return source.cache  # nothing to prepare: comes with an installed package
    here = about.files.find(source) or about.files.unpack(source, progress)
    if here is not None:
        return here
    try:
        return about.files.download(source, progress)
    except ImportError as error:
        raise DataError(f"downloading {name} needs torchvision, which cannot be imported: {error}") from None


def _about(name: str) -> About | None:
    return getattr(importlib.import_module(f"{PACKAGES['dataset']}.{name}"), "ABOUT", None)
