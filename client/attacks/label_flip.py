"""Label flipping: train on wrong labels (Tolpegin et al., ESORICS 2020; Fang et al., USENIX Security 2020)."""

import torch
from torch import Tensor

from client.attack import Attack, poison_batches
from client.trainer import LocalJob
from tasks.errors import SpecError


def label_flip(*, source: int | None = None, target: int | None = None) -> Attack:
    """Relabel class `source` as `target` (no source: every sample); without a target y becomes classes - 1 - y.

    The attack success rate is the share of affected test samples that the model gives the flipped label.
    """
    if source is not None and source == target:
        raise SpecError(f"label_flip: source and target must differ, both are {source}")

    def flipped(labels: Tensor, num_classes: int) -> Tensor:
        for label in (source, target):
            if label is not None and not 0 <= label < num_classes:
                raise SpecError(f"label_flip: {label} is no class; classes are 0 to {num_classes - 1}")
        wanted = torch.full_like(labels, target) if target is not None else num_classes - 1 - labels
        return wanted if source is None else torch.where(labels == source, wanted, labels)

    def poison(inputs: Tensor, labels: Tensor, _: torch.Generator, job: LocalJob) -> tuple[Tensor, Tensor]:
        return inputs, flipped(labels, job.dataset.num_classes)

    def triggered(inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        wanted = flipped(labels, num_classes)
        return inputs, wanted, wanted != labels

    return poison_batches(poison, triggered)
