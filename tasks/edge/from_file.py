"""An edge set of one's own, from an .npz of arrays or a file of texts, one a line.

An .npz holds ``inputs`` and ``labels`` (or ``train_inputs``, ``train_labels``, ``test_inputs``, ``test_labels``): the
true labels, and inputs as the data set stores them, or as floats in the model's input range; images as [samples,
channels, height, width]. `hawthorn edge-cases` writes such a file. Of a file without test samples the last `test_share`
are for testing; ``label`` gives all samples one true label, which a file of texts needs.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.edge_set import EdgeSet, as_stored, edge_file
from tasks.errors import DataError, SpecError
from tasks.source import DataSource
from tasks.vocabulary import split_words

ABOUT = "A path that is not absolute is looked for from here first, then in the data folders."


def from_file(
    source: DataSource,
    dataset: Dataset,
    *,
    path: str,
    target: int,
    label: int | None = None,
    test_share: float = 0.25,
) -> EdgeSet:
    """Return the samples of the file, in its order; raises `DataError` and `SpecError` saying what it should hold."""
    here = Path(path).expanduser()
    place = here if here.is_file() else edge_file(source, path, ABOUT)
    if place.suffix == ".npz":
        train, test = _arrays(place, dataset, label, test_share)
    else:
        train, test = _texts(place, dataset, label, test_share)
    return EdgeSet(place.stem, *train, *test, target)


def _texts(
    path: Path, dataset: Dataset, label: int | None, test_share: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    if dataset.vocabulary is None:
        raise SpecError(f"{path} is read as texts, and {dataset.name} has no vocabulary; images come as .npz")
    if label is None:
        raise SpecError(f"from_file: texts have no labels; give the true one, as in from_file(path='{path}', label=1)")
    rows = dataset.vocabulary.encode([split_words(line) for line in read_lines(path)], *dataset.input_shape)
    return _cut(path, rows, torch.full((len(rows),), label), test_share)


def _arrays(
    path: Path, dataset: Dataset, label: int | None, test_share: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz of plain arrays: {error}") from None
    if "inputs" in arrays:
        return _cut(path, *_pair(path, arrays, "", dataset, label), test_share)
    return _pair(path, arrays, "train_", dataset, label), _pair(path, arrays, "test_", dataset, label)


def _pair(
    path: Path, arrays: Mapping[str, np.ndarray], prefix: str, dataset: Dataset, label: int | None
) -> tuple[Tensor, Tensor]:
    names = [f"{prefix}inputs", *([] if label is not None else [f"{prefix}labels"])]
    if missing := [name for name in names if name not in arrays]:
        raise DataError(
            f"{path} has no {missing[0]}; it has {', '.join(arrays) or 'nothing'}, and from_file wants inputs and "
            "labels, or train_inputs, train_labels, test_inputs and test_labels"
        )
    values = torch.from_numpy(np.ascontiguousarray(arrays[names[0]]))
    stored = dataset.train_inputs.dtype
    if values.is_floating_point():
        if not values.isfinite().all():
            raise DataError(f"{path}: {names[0]} has numbers that are not finite")
        values = as_stored(values, dataset)
    elif values.dtype != stored:
        if len(values) and not torch.equal(values.to(stored).to(values.dtype), values):
            raise DataError(f"{path}: {names[0]} has numbers that {stored} of {dataset.name} does not hold")
        values = values.to(stored)
    if label is not None:
        return values, torch.full((len(values),), label)
    return values, torch.from_numpy(arrays[names[1]].astype(np.int64))


def _cut(
    path: Path, inputs: Tensor, labels: Tensor, test_share: float
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    kept = len(inputs) - round(test_share * len(inputs))
    if not 0 < kept < len(inputs):
        raise SpecError(f"{path}: with test_share {test_share}, {kept} of {len(inputs)} samples are left for training")
    return (inputs[:kept], labels[:kept]), (inputs[kept:], labels[kept:])


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file that are not blank; raises `DataError`."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text: {error}") from None
    return [line for line in lines if line]
