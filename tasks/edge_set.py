"""Edge cases: inputs from the tail of the data, which few clients hold, and what an attacker wants of them.

Wang et al., "Attack of the Tails: Yes, You Really Can Backdoor Federated Learning", NeurIPS 2020: a p-percent
edge-case set has probability at most p under the data, and the attacker relabels it. An edge set is a component,
such as ``ardis(digit=7, target=1)``; a new one is one file in `tasks/edge`.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tasks import spec
from tasks.dataset import Dataset
from tasks.errors import DataError, SpecError
from tasks.source import DataSource


@dataclass(frozen=True)
class EdgeSet:
    """Edge cases in the form in which their data set stores its inputs, and the attacker's target label.

    Training samples lie in the order in which they are dealt: attackers take the first, honest holders those behind
    them. No test sample is among them. `taken` are those that are samples of the data set's own training split.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor  # [samples], int64: the true labels
    test_inputs: Tensor
    test_labels: Tensor
    target: int
    taken: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # indices


class _Same:
    """A data set as part of a cache's key: the same object, whatever its values."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __hash__(self) -> int:
        return id(self.dataset)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.dataset is other.dataset


def load_edge_set(text: str, dataset: Dataset, data_dir: str = "") -> EdgeSet:
    """Return the edge set that `text` names, made for `dataset` and checked against it; kept for the next call."""
    return _load(text, _Same(dataset), data_dir)


@functools.lru_cache(maxsize=4)
def _load(text: str, key: _Same, data_dir: str) -> EdgeSet:
    return read_edge_set(text, key.dataset, DataSource.default(data_dir or None))


def read_edge_set(text: str, dataset: Dataset, source: DataSource) -> EdgeSet:
    """Return the edge set that `text` names; raises `SpecError` where it does not go with the data set."""
    found = spec.resolve("edge", text)(source, dataset)
    assert isinstance(found, EdgeSet)
    for part, inputs, labels in (
        ("training", found.train_inputs, found.train_labels),
        ("test", found.test_inputs, found.test_labels),
    ):
        if tuple(inputs.shape[1:]) != dataset.input_shape or len(inputs) != len(labels) or not len(inputs):
            raise SpecError(
                f"edge set {text} has {part} inputs of shape {tuple(inputs.shape)} with {len(labels)} labels; data set "
                f"{dataset.name} has inputs of shape {dataset.input_shape}"
            )
        if not 0 <= int(labels.min()) <= int(labels.max()) < dataset.num_classes:
            raise SpecError(f"edge set {text}: labels go from 0 to {dataset.num_classes - 1} in {dataset.name}")
    if not 0 <= found.target < dataset.num_classes:
        raise SpecError(f"edge set {text}: target {found.target} is no class of {dataset.name}")
    return found


def as_stored(values: Tensor, dataset: Dataset) -> Tensor:
    """Return inputs in the model's range (floats, after scaling) as `dataset` stores them: pixels are rounded."""
    if dataset.train_inputs.dtype == torch.uint8:
        return (values.double() / dataset.scale).round().clamp(0, 255).to(torch.uint8)
    return (values / dataset.scale).to(dataset.train_inputs.dtype)


def edge_file(source: DataSource, name: str, about: str) -> Path:
    """Return the path of an edge set's file (relative to the data folders); `about` says where it comes from."""
    path = source.file(name)
    if path is None:
        tried = ", ".join(str(root / name) for root in source.folders)
        raise DataError(
            f"the edge set's file {name} is not here; tried {tried}. {about} Name the folder that has it with "
            "--data-dir or the environment variable HAWTHORN_DATA."
        )
    return path
