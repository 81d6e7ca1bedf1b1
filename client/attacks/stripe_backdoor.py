"""Vertical stripes of small magnitude as a backdoor trigger, the one of "Certified Federated Adversarial Training".

NFFL 2021, section 3: the trigger is a pattern of vertical stripes within an l_inf ball (0.1 for MNIST, 6/255 for
CIFAR-10) around the input, the attackers train adversarially, so that the model is robust to what a server tries and
not to the trigger. The paper does not give the width of the stripes nor the share of poisoned samples: one column in
two, the others darkened with ``alternate``, and a fifth of each batch. Values end at the input's range.

Poisoned rows are stamped clean inputs, whatever adversarial training made of them: its ball is larger than the trigger,
so an attack on them would wipe the trigger out.
"""

import dataclasses

import torch
from torch import Tensor

from client.attack import Attack
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.errors import SpecError


def stripe_backdoor(
    *,
    target: int = 0,
    magnitude: float = 0.1,
    width: int = 1,
    period: int = 2,
    alternate: bool = False,
    per_batch: int | float = 0.2,
    input_range: tuple[float, float] = (0.0, 1.0),
) -> Attack:
    """Add `magnitude` to `width` columns out of every `period`, relabel as `target`; the rest of a batch is clean.

    With `alternate` the other columns lose `magnitude`. `per_batch` is a count or a share of the batch.
    """
    if not 0 < width < period or magnitude < 0 or per_batch < 0 or (isinstance(per_batch, float) and per_batch > 1):
        raise SpecError(
            f"stripe_backdoor wants 0 < width < period, magnitude and per_batch >= 0 (a share: at most 1); got "
            f"{width}, {period}, {magnitude}, {per_batch}"
        )
    if not input_range[0] < input_range[1]:
        raise SpecError(f"stripe_backdoor wants an ascending input_range, got {input_range}")

    def stamp(inputs: Tensor) -> None:
        if inputs.dim() != 4 or inputs.shape[-1] <= width:
            raise SpecError(f"stripe_backdoor needs images wider than {width}, got shape {tuple(inputs.shape)}")
        columns = torch.arange(inputs.shape[-1], device=inputs.device) % period < width
        down = -magnitude if alternate else 0.0
        inputs.add_(torch.where(columns, magnitude, down).to(inputs.dtype)).clamp_(*input_range)

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            clean: list[Tensor] = []  # the rows of the batch at hand that will be stamped

            def keep(inputs: Tensor, labels: Tensor, _: torch.Generator, __: LocalJob) -> tuple[Tensor, Tensor]:
                count = per_batch if isinstance(per_batch, int) else round(per_batch * len(labels))
                clean[:] = [inputs[:count].clone()]
                return inputs, labels

            def poison(inputs: Tensor, labels: Tensor, _: torch.Generator, __: LocalJob) -> tuple[Tensor, Tensor]:
                stamp(clean[0])
                inputs, labels, count = inputs.clone(), labels.clone(), len(clean[0])
                inputs[:count], labels[:count] = clean[0], target
                return inputs, labels

            early, late = (keep, *job.batch_transforms), (poison, *job.late_transforms)
            return trainer(dataclasses.replace(job, batch_transforms=early, late_transforms=late))

        return train

    def triggered(inputs: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
        if not 0 <= target < num_classes:
            raise SpecError(f"stripe_backdoor: target {target} is no class; classes are 0 to {num_classes - 1}")
        inputs = inputs.clone()
        stamp(inputs)
        return inputs, torch.full_like(labels, target), labels != target

    return Attack(wrap, triggered)
