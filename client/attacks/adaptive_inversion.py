"""FLIP's adaptive attack (ICLR 2023, appendix A.3): attackers invert triggers as the defence does, and train with them.

The attackers know that benign clients harden their models. Each inverts triggers on its own data with the defence's
code and adds samples stamped with them to its training, beside its poison: ``adaptive_inversion() | patch_backdoor()``.
The paper says no more; here the pairs of classes are drawn anew in each round, the samples keep their true labels (as
the defence trains them) or, with ``labels="target"``, get the trigger's target, which keeps the triggers effective.
"""

import dataclasses
from typing import Literal

import torch
from torch import Tensor

from client.attack import Attack
from client.flip.inversion import invert
from client.flip.triggers import InversionSettings, Search, Triggers, random_start
from client.trainer import BatchTransform, LocalJob, LocalResult, LocalTrainer
from tasks.errors import SpecError


def adaptive_inversion(
    *,
    triggers: int = 4,
    per_batch: int = 20,
    labels: Literal["true", "target"] = "true",
    samples: int = 8,
    steps: int = 200,
    alpha: float = 1e-3,
    threshold: float = 0.9,
) -> Attack:
    """Invert `triggers` triggers at the start of each round; stamp them on the last `per_batch` samples of each batch.

    Each trigger is sought on up to `samples` samples of a random class that the attacker holds, towards a random other
    class. An attacker whose searches find nothing trains without them.
    """
    if min(triggers, per_batch, samples, steps) < 0:
        raise SpecError(f"adaptive_inversion wants counts >= 0, got {triggers}, {per_batch}, {samples}, {steps}")
    settings = InversionSettings(threshold=threshold)

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            draw = job.generator("adaptive")
            pairs = _pairs(job, triggers, draw)
            searches = [Search(_images(job, s, samples, draw), t, alpha) for s, t in pairs]
            start = random_start(max(1, len(pairs)), job.dataset.input_shape, draw)
            start = (start[0][: len(pairs)], start[1][: len(pairs)])
            found = invert(job.model, searches, start, 1 if job.trial else steps, draw, settings)
            transform = _stamping(found, pairs, per_batch, labels == "target")
            return trainer(dataclasses.replace(job, batch_transforms=(transform, *job.batch_transforms)))

        return train

    return Attack(wrap)


def _pairs(job: LocalJob, count: int, draw: torch.Generator) -> list[tuple[int, int]]:
    """Return random (source, target) pairs, sources among the classes that the attacker holds."""
    held, num_classes = job.dataset.train_labels[job.indices].unique(), job.dataset.num_classes
    if len(held) == 0 or num_classes < 2:
        return []
    sources = held[torch.randint(len(held), (count,), generator=draw)]
    others = torch.randint(num_classes - 1, (count,), generator=draw)
    return list(zip(sources.tolist(), (others + (others >= sources)).tolist(), strict=True))


def _images(job: LocalJob, label: int, count: int, draw: torch.Generator) -> Tensor:
    pool = job.indices[job.dataset.train_labels[job.indices] == label]
    return job.dataset.batch("train", pool[torch.randperm(len(pool), generator=draw)[:count]])[0]


def _stamping(triggers: Triggers, pairs: list[tuple[int, int]], per_batch: int, relabel: bool) -> BatchTransform:
    usable = triggers.found.nonzero().flatten()
    targets = torch.tensor([target for _, target in pairs], dtype=torch.int64)

    def transform(inputs: Tensor, labels: Tensor, draw: torch.Generator, _: LocalJob) -> tuple[Tensor, Tensor]:
        if not len(usable) or not per_batch:
            return inputs, labels
        last = slice(-per_batch, None)
        chosen = usable[torch.randint(len(usable), (len(labels[last]),), generator=draw)]
        inputs[last] = triggers.stamp(inputs[last], chosen)
        if relabel:
            labels = labels.clone()
            labels[last] = targets[chosen]
        return inputs, labels

    return transform
