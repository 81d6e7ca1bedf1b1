"""A data set whose honest clients hold edge cases, too, with their true labels: p-percent edge cases.

Wang et al., "Attack of the Tails", NeurIPS 2020, section 4: of all holders of an edge case p percent are honest
ones'. `honest` samples of the edge set, those behind the first `attackers`, become the last training samples; the
partition ``edge_holders`` deals them to a few clients. In the papers' terms with 66 for the attacker: ``honest=0`` is
100/0, ``honest=66`` is 50/50, ``honest=594`` is 10/90. Edge cases that are samples of the data set's own training
split, such as the semantic cars of CIFAR-10, are taken out of it, so ``honest=0`` is of use for them.
"""

import dataclasses

import torch

from tasks import spec
from tasks.dataset import Dataset
from tasks.edge_set import read_edge_set
from tasks.errors import ConfigError
from tasks.source import DataSource


def with_edge(source: DataSource, *, base: str, edge: str, honest: int = 0, attackers: int = 100) -> Dataset:
    """Return the data set `base` with `honest` samples of `edge` behind its own; raises `ConfigError` for too many."""
    whole = spec.resolve("dataset", base)(source)
    assert isinstance(whole, Dataset)
    found = read_edge_set(edge, whole, source)
    if honest < 0 or attackers < 0 or attackers + honest > len(found.train_inputs):
        raise ConfigError(
            f"with_edge: {edge} has {len(found.train_inputs)} training samples; {attackers} for attackers and {honest} "
            "for honest clients are too many"
        )
    kept = torch.ones(len(whole.train_labels), dtype=torch.bool)
    kept[found.taken] = False
    groups = whole.train_groups
    if groups is not None:  # an edge case's writer is nobody of the data set
        groups = torch.cat([groups[kept], torch.full((honest,), int(groups.max()) + 1)])
    chosen = slice(attackers, attackers + honest)
    return dataclasses.replace(
        whole,
        train_inputs=torch.cat([whole.train_inputs[kept], found.train_inputs[chosen]]),
        train_labels=torch.cat([whole.train_labels[kept], found.train_labels[chosen]]),
        train_groups=groups,
        num_edge=honest,
    )
