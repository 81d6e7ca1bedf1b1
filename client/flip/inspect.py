"""Looking at a finished model: the triggers of all pairs of classes, inverted at once, and the class distances.

Uses FLIP's inversion (equations 1-2; ICLR 2023) on given samples, such as a test split's. Unlike a client, the searches
start from uniform noise and average the cross-entropy, so that distances of different pairs and models compare.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.flip.inversion import invert
from client.flip.triggers import DEFAULTS, InversionSettings, Search, Triggers, random_start
from tasks.errors import SpecError
from tasks.rng import generator


@dataclass(frozen=True)
class Inspection:
    """The inverted triggers of a model: row i of `triggers` turns class ``pairs[i][0]`` into class ``pairs[i][1]``."""

    pairs: list[tuple[int, int]]
    triggers: Triggers  # masks [pairs, 1, height, width], patterns [pairs, *input shape], sizes [pairs], found [pairs]
    distances: Tensor  # [classes, classes], source by target: the mask's L1 norm; inf: none found, NaN: not sought

    def trigger(self, source: int, target: int) -> tuple[Tensor, Tensor]:
        """Return (mask, pattern) of a pair; `SpecError` for a pair that was not inverted."""
        if (source, target) not in self.pairs:
            raise SpecError(f"the pair {source} -> {target} was not inverted; {len(self.pairs)} pairs were")
        row = self.pairs.index((source, target))
        return self.triggers.masks[row], self.triggers.patterns[row]

    def to_target(self) -> Tensor:
        """Return each target's median distance from other classes ([classes], NaN: not sought); small is suspect."""
        return torch.nanmedian(self.distances, 0).values


def inspect(
    model: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    samples: int = 8,
    steps: int = 200,
    alpha: float = 1e-2,
    pairs: Sequence[tuple[int, int]] | None = None,
    settings: InversionSettings = DEFAULTS,
    seed: int = 1,
) -> Inspection:
    """Invert the triggers of all ordered pairs of classes, or of `pairs`, as one batch.

    `inputs` ([n, *input shape], float, in the model's input range) and `labels` ([n]) give up to `samples` samples of
    each source class; a class without samples has no distances. The model may be in any mode and is left as it was.
    200 steps from `alpha` 0.01 reach the sizes of FLIP's 400 from 0.001. Cost: pairs * samples * steps passes, about
    20 s on one core for MNIST with the defaults. Example::

        inputs, labels = dataset.batch("test", slice(0, 2000))
        seen = inspect(model, inputs, labels, dataset.num_classes)
        mask, pattern = seen.trigger(7, 2)      # [1, 28, 28], [1, 28, 28]
        seen.distances                          # [10, 10], the diagonal NaN
    """
    if inputs.ndim < 2 or len(inputs) != len(labels):
        raise SpecError(f"inspect wants as many labels as inputs, got {tuple(inputs.shape)} and {tuple(labels.shape)}")
    every = [(s, t) for s in range(num_classes) for t in range(num_classes) if s != t]
    wanted = every if pairs is None else [(int(s), int(t)) for s, t in pairs]
    if unknown := [pair for pair in wanted if pair not in every]:
        raise SpecError(f"inspect: {unknown[0]} is no pair of two different classes below {num_classes}")
    images = {s: inputs[(labels == s).nonzero().flatten()[:samples]] for s in {s for s, _ in wanted}}
    wanted = [pair for pair in wanted if len(images[pair[0]])]
    start = random_start(len(wanted), inputs.shape[1:], generator(seed, "inspect", "start")) if wanted else None
    distances = torch.full((num_classes, num_classes), torch.nan)
    if start is None:
        raise SpecError("inspect: none of the source classes has a sample")
    searches = [Search(images[s], t, alpha) for s, t in wanted]
    triggers = invert(model, searches, start, steps, generator(seed, "inspect", "noise"), settings)
    for (source, target), size, found in zip(wanted, triggers.sizes.tolist(), triggers.found.tolist(), strict=True):
        distances[source, target] = size if found else torch.inf
    return Inspection(wanted, triggers, distances)
