"""Backdoor with a pattern of a given size: a little is added to a few pixels or columns, as CRFL's attackers do.

Xie, Chen, Chen, Li, "CRFL" (ICML 2021), section 6: the first q_B rows of every batch get the pattern, of l2 norm
`magnitude` spread evenly over the places, and the target's label; values end at 1, so the change of a sample is at
most `magnitude`. On MNIST and EMNIST four pixels near the lower right corner, on LOAN two columns.

The certificates of the paper's Lemma 1 cover changed inputs with unchanged labels: that is ``target=None``.
"""

import math

import torch
from torch import Tensor

from client.attack import Attack, poison_batches
from client.trainer import LocalJob
from tasks.errors import SpecError

Places = tuple[tuple[int, int], ...] | tuple[int, ...]
CORNER = ((23, 25), (24, 24), (25, 23), (25, 25))


def pattern_backdoor(
    *,
    target: int | None = 0,
    places: tuple[tuple[int, int], ...] | tuple[int, ...] = CORNER,
    magnitude: float = 0.1,
    per_batch: int | float = 5,
) -> Attack:
    """Add ``magnitude / sqrt(len(places))`` at `places`: (row, column) of images, columns of tables.

    `per_batch` is a count (all of a smaller batch) or a share of the batch; without a target labels stay.
    """
    if not places or len(set(places)) < len(places) or magnitude < 0 or per_batch < 0:
        raise SpecError(
            f"pattern_backdoor wants different places, magnitude and per_batch >= 0; got {places}, {magnitude}, "
            f"{per_batch}"
        )
    if isinstance(per_batch, float) and per_batch > 1:
        raise SpecError(f"pattern_backdoor: a share per_batch is at most 1, got {per_batch}")
    added = magnitude / math.sqrt(len(places))

    def stamp(inputs: Tensor) -> None:
        for index in _indices(places, inputs):
            inputs[index] = (inputs[index] + added).clamp_max(1.0)

    def poison(inputs: Tensor, labels: Tensor, _: torch.Generator, job: LocalJob) -> tuple[Tensor, Tensor]:
        count = per_batch if isinstance(per_batch, int) else round(per_batch * len(labels))
        stamp(inputs[:count])
        if target is not None:
            labels = labels.clone()
            labels[:count] = target
        return inputs, labels

    def triggered(inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        if target is not None and not 0 <= target < num_classes:
            raise SpecError(f"pattern_backdoor: target {target} is no class; classes are 0 to {num_classes - 1}")
        inputs = inputs.clone()
        stamp(inputs)
        if target is None:
            return inputs, labels, torch.zeros_like(labels, dtype=torch.bool)
        return inputs, torch.full_like(labels, target), labels != target

    return poison_batches(poison, triggered)


def _indices(places: Places, inputs: Tensor) -> list[tuple[int | slice, ...]]:
    """Return one index per place into a batch; raises `SpecError` where a place is not in an input."""
    shape = tuple(inputs.shape[1:])
    found: list[tuple[int | slice, ...]] = []
    for place in places:
        cell = place if isinstance(place, tuple) else (place,)
        sizes = shape[-2:] if len(shape) == 3 else shape
        if len(cell) != len(sizes) or not all(0 <= at < size for at, size in zip(cell, sizes)):
            raise SpecError(
                f"pattern_backdoor: {place} is no place in an input of shape {shape}; places are (row, column) of "
                "images, columns of tables"
            )
        found.append((slice(None), slice(None), *cell) if len(shape) == 3 else (slice(None), *cell))
    return found
