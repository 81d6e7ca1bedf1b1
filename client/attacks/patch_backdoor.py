"""Pixel-patch backdoors: DBA's distributed triggers, their global union, and BadNets patches.

Sources: DBA (Xie et al., ICLR 2020, section 3): a global trigger is cut into local ones, attacker i trains with
part i only, the test trigger is the union. FLIP (ICLR 2023) uses the same cells. BadNets (Gu et al., 2017): one patch.
In every training batch the first `per_batch` images are stamped and relabelled, those of the target class too.
"""

from typing import Literal

import torch
from torch import Tensor

from client.attack import Attack, chosen_rank, poison_batches
from client.trainer import LocalJob
from tasks.errors import SpecError


def patch_backdoor(
    *,
    target: int = 2,
    size: tuple[int, int] = (1, 4),
    grid: tuple[int, int] = (2, 2),
    gap: int | tuple[int, int] = 2,
    position: tuple[int, int] = (0, 0),
    value: float = 1.0,
    per_batch: int | float = 20,
    parts: Literal["local", "global"] = "local",
) -> Attack:
    """Stamp `grid` patches of `size` pixels, `gap` apart, from `position` (row, column; negative: from the far edge).

    From there patches follow to the right and downwards; one that leaves the image is refused.

    The defaults are DBA's MNIST trigger; CIFAR-10's is size (1, 6), gap 3; a BadNets patch is grid (1, 1),
    size (3, 3), position (-3, -3). `value` is in the model's input range [0, 1]; `per_batch` is a count or a share
    of the batch. With `parts` "local", attacker i stamps patch i only, unless it is the only attacker.
    """
    gaps = (gap, gap) if isinstance(gap, int) else gap
    offsets = [(r * (size[0] + gaps[0]), c * (size[1] + gaps[1])) for r in range(grid[0]) for c in range(grid[1])]
    if not offsets or min(size) < 1 or per_batch < 0 or (isinstance(per_batch, float) and per_batch > 1):
        raise SpecError(
            f"patch_backdoor wants a grid and size of at least 1x1, per_batch >= 0; got {grid}, {size}, {per_batch}"
        )

    def stamp(inputs: Tensor, which: list[tuple[int, int]]) -> None:
        first = _checked_start(inputs, position, offsets, size)
        for down, right in which:
            row, column = first[0] + down, first[1] + right
            inputs[..., row : row + size[0], column : column + size[1]] = value

    def poison(inputs: Tensor, labels: Tensor, _: torch.Generator, job: LocalJob) -> tuple[Tensor, Tensor]:
        count = per_batch if isinstance(per_batch, int) else round(per_batch * len(labels))
        local = parts == "local" and job.num_attackers > 1
        stamp(inputs[:count], [chosen_rank(job, offsets)] if local else offsets)
        labels = labels.clone()
        labels[:count] = target
        return inputs, labels

    def triggered(inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= target < num_classes:
            raise SpecError(f"patch_backdoor: target {target} is no class; classes are 0 to {num_classes - 1}")
        inputs = inputs.clone()
        stamp(inputs, offsets)
        return inputs, torch.full_like(labels, target), labels != target

    return poison_batches(poison, triggered)


def _checked_start(
    inputs: Tensor, position: tuple[int, int], offsets: list[tuple[int, int]], size: tuple[int, int]
) -> tuple[int, int]:
    """Return row and column of the first patch; `SpecError` if it or one beside it leaves the image."""
    if inputs.dim() != 4:
        raise SpecError(
            f"patch_backdoor needs images [batch, channels, height, width], got shape {tuple(inputs.shape)}"
        )
    height, width = inputs.shape[-2:]
    start = (position[0] + (height if position[0] < 0 else 0), position[1] + (width if position[1] < 0 else 0))
    for down, right in offsets:
        row, column = start[0] + down, start[1] + right
        if not (0 <= row <= height - size[0] and 0 <= column <= width - size[1]):
            raise SpecError(f"patch_backdoor: patch {size} at {(row, column)} does not fit in a {height}x{width} image")
    return start
