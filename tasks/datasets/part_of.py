"""Part of a data set: fewer samples for training or testing, where a whole one is too much for the machine at hand.

Classes keep their shares: the part is drawn class by class, once, the same every time. Accuracies
of n test samples have a standard error of at most 50 / sqrt(n) points.
"""

import dataclasses

import torch
from torch import Tensor

from tasks import spec
from tasks.dataset import Dataset
from tasks.errors import ConfigError
from tasks.rng import generator
from tasks.source import DataSource


def part_of(source: DataSource, *, base: str, train: int = 0, test: int = 0) -> Dataset:
    """Return `base` with about `train` and `test` samples, 0: all; classes keep their shares, in the base's order."""
    whole = spec.resolve("dataset", base)(source)
    assert isinstance(whole, Dataset)
    for name, number, labels in (("train", train, whole.train_labels), ("test", test, whole.test_labels)):
        if not 0 <= number <= len(labels):
            raise ConfigError(
                f"part_of: {base} has {len(labels)} {name} samples, {name} must be 0 to that; got {number}"
            )
    if train and whole.num_edge:
        raise ConfigError(f"part_of: {base} has edge cases behind its training samples; write with_edge around part_of")
    kept, tested = _drawn(whole.train_labels, train, "train"), _drawn(whole.test_labels, test, "test")
    return dataclasses.replace(
        whole,
        train_inputs=whole.train_inputs[kept],
        train_labels=whole.train_labels[kept],
        test_inputs=whole.test_inputs[tested],
        test_labels=whole.test_labels[tested],
        train_groups=None if whole.train_groups is None else whole.train_groups[kept],
    )


def _drawn(labels: Tensor, number: int, split: str) -> Tensor:
    if not number:
        return torch.arange(len(labels))
    draws, chosen = generator(0, "part_of", split), []
    for label in labels.unique():
        members = torch.nonzero(labels == label).squeeze(1)
        count = round(number * len(members) / len(labels))
        chosen.append(members[torch.randperm(len(members), generator=draws)[:count]])
    return torch.cat(chosen).sort().values
