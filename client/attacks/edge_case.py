"""The edge-case attack: train on edge cases with the attacker's label, mixed with clean data.

Wang et al., "Attack of the Tails", NeurIPS 2020, section 3, the black-box attack; chained with ``pgd_projection`` and
``replace_model`` it is the paper's PGD attack, without and with model replacement. Trained are `num_edge` edge cases,
labelled as the attacker wants, and `num_clean` clean samples: the paper's are 100 of the Southwest airplanes and 400 of
CIFAR-10, 66 of ARDIS and 100 digits, 60 tweets and 140 others. All attackers of a run share one poisoned set, which
counts as that many samples. Attack success is measured on the edge set's own test samples.

The authors' attackers normalise pictures otherwise than the honest clients do; here a model normalises, so all agree.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from client.attack import Attack, TargetSet
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.dataset import Dataset
from tasks.edge_set import EdgeSet, load_edge_set
from tasks.errors import SpecError
from tasks.rng import generator


def edge_case(
    *,
    edge: str,
    num_edge: int = 100,
    num_clean: int = 400,
    clean: Literal["all", "own"] = "all",
    target: int | None = None,
) -> Attack:
    """Train on the first `num_edge` samples of the edge set `edge` and `num_clean` drawn clean ones, and nothing else.

    Clean samples come from the whole training split, as in the authors' code, or from the attacker's `own` share.
    `target` replaces the edge set's own target label. Asking for more samples than there are is a `SpecError`, of an
    attacker's `own` in its first round.
    """
    if num_edge < 1 or num_clean < 0:
        raise SpecError(f"edge_case wants num_edge >= 1 and num_clean >= 0, got {num_edge} and {num_clean}")

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            found = load_edge_set(edge, job.dataset, job.settings.data_dir if job.settings else "")
            if num_edge > len(found.train_inputs):
                raise SpecError(f"edge_case: {edge} has {len(found.train_inputs)} training samples, not {num_edge}")
            drawn = _clean_samples(job, clean, num_clean)
            wanted = _target(found, target, job.dataset)
            poisoned = _poisoned(job.dataset, found, wanted, num_edge, drawn)
            return trainer(dataclasses.replace(job, dataset=poisoned, indices=torch.arange(num_edge + len(drawn))))

        return train

    def target_set(dataset: Dataset, data_dir: str) -> TargetSet:
        found = load_edge_set(edge, dataset, data_dir)
        part = dataclasses.replace(dataset, test_inputs=found.test_inputs, test_labels=found.test_labels)
        inputs, labels = part.batch("test", slice(None))
        return TargetSet(inputs, torch.full_like(labels, _target(found, target, dataset)), labels)

    return Attack(wrap, target_set=target_set)


def _target(found: EdgeSet, target: int | None, dataset: Dataset) -> int:
    if target is not None and not 0 <= target < dataset.num_classes:
        raise SpecError(f"edge_case: target {target} is no class; classes are 0 to {dataset.num_classes - 1}")
    return found.target if target is None else target


def _clean_samples(job: LocalJob, clean: str, number: int) -> Tensor:
    """Return indices into the training split: one draw for all attackers and rounds, or of this client's own."""
    if clean == "own":
        if number > len(job.indices) and not job.trial:  # a trial has few samples of the client's
            raise SpecError(f"edge_case: client {job.client} has {len(job.indices)} samples of its own, not {number}")
        draw = generator(job.seed, "edge_case", "clean", job.client)
        return job.indices[torch.randperm(len(job.indices), generator=draw)[:number]]
    size = len(job.dataset.train_labels) - job.dataset.num_edge
    if number > size:
        raise SpecError(f"edge_case: {job.dataset.name} has {size} clean training samples, not {number}")
    return torch.randperm(size, generator=generator(job.seed, "edge_case", "clean"))[:number]


def _poisoned(dataset: Dataset, found: EdgeSet, target: int, num_edge: int, clean: Tensor) -> Dataset:
    """Return a data set whose training split is the poisoned set: clean samples, then edge cases."""
    return dataclasses.replace(
        dataset,
        train_inputs=torch.cat([dataset.train_inputs[clean], found.train_inputs[:num_edge]]),
        train_labels=torch.cat([dataset.train_labels[clean], torch.full((num_edge,), target)]),
        train_groups=None,
        num_edge=0,
    )
