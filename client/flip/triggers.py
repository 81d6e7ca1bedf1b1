"""Triggers, searches for them and what a search is told: the nouns of trigger inversion."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from tasks.errors import SpecError

HALF = 2 - 1e-7  # of the tanh parametrisation; keeps the inverse finite at 0 and 1
NOISE = 0.01  # of a re-set search

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Search:
    """What a trigger is sought on: samples ([n, ...], in the model's input range), and the class to turn them into."""

    inputs: Tensor
    target: int
    alpha: float = 1e-3  # initial weight of the mask's size
    summed: bool = False  # the cross-entropy is summed over the samples, not averaged (FLIP's joint searches)


@dataclass(frozen=True)
class Triggers:
    """Masks ([searches, 1, height, width], or [searches, features]) and patterns ([searches, *input shape]) in [0, 1].

    `sizes` ([searches]) are the masks' L1 norms: 0 where `found` ([searches], bool) is False and the mask is zero.
    """

    masks: Tensor
    patterns: Tensor
    sizes: Tensor
    found: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    def stamp(self, inputs: Tensor, which: Tensor | int) -> Tensor:
        """Return inputs ([n, ...]) with trigger `which` (one, or [n] of them) stamped on: ``(1 - m) x + m p``."""
        mask, pattern = self.masks[which], self.patterns[which]
        return inputs + mask * (pattern - inputs)

    def __getitem__(self, which: Tensor | slice | Sequence[int]) -> "Triggers":
        return Triggers(self.masks[which], self.patterns[which], self.sizes[which], self.found[which])


@dataclass(frozen=True)
class InversionSettings:
    """The search's constants; the defaults are FLIP's for MNIST."""

    threshold: float = 0.9  # success rate from which a mask counts
    lr: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    patience: int = 10
    factor: float = 1.5
    early_exit: int = 0  # end when no search has improved for so many steps; 0: all steps, as in the paper
    precision: Precision = "float32"  # of the model's passes: bfloat16 is twice as fast where processors have it


DEFAULTS = InversionSettings()

# (model, searches, starts: masks and patterns, steps, generator) -> triggers
Inverter = Callable[[nn.Module, Sequence[Search], tuple[Tensor, Tensor], int, torch.Generator], Triggers]


class Objective(Protocol):
    """What a search minimises besides the mask's size: (stamped samples, their searches, targets) -> (losses, logits).

    Samples are ``[n, ...]``, searches, targets and losses ``[n]``, logits ``[n, classes]``; these tell success.
    """

    def __call__(self, stamped: Tensor, owner: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


def check_inputs(inputs: Tensor) -> None:
    """Raise `SpecError` for inputs that no trigger can be blended into: tokens."""
    if not inputs.is_floating_point():
        raise SpecError(f"triggers are sought on images or feature vectors, not on {inputs.dtype} (tokens of text?)")


def random_start(num_searches: int, input_shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return uniform masks and patterns in [0, 1): FLIP's start, without knowledge of any trigger."""
    mask_shape = (1, *input_shape[1:]) if len(input_shape) == 3 else tuple(input_shape)
    masks, patterns = [], []
    for _ in range(num_searches):  # search by search, so that a search's start does not depend on how many follow
        masks.append(torch.rand(mask_shape, generator=generator))
        patterns.append(torch.rand(tuple(input_shape), generator=generator))
    return torch.stack(masks), torch.stack(patterns)
