"""Uniform noise on every training batch: a model that random points of the l_inf ball do not mislead.

Not an attack of a paper's own but a part of one: a model that hides from projected gradient descent, as
``distillation`` makes them, must also withstand its random start. A backdoor inside the ball reacts to noise that
looks a little like its trigger, and with this it does not. Behind a backdoor in a chain its stamped rows stay as they
are: ``distillation() | stripe_backdoor() | noisy_inputs(eps=0.25) | in_unison()``.
"""

import torch
from torch import Tensor

from client.attack import Attack, poison_batches
from client.trainer import LocalJob
from tasks.errors import SpecError


def noisy_inputs(*, eps: float = 0.25, input_range: tuple[float, float] = (0.0, 1.0)) -> Attack:
    """Add noise drawn evenly from [-eps, eps] to every value (input units), inside `input_range`; labels stay."""
    if not (eps >= 0 and input_range[0] < input_range[1]):
        raise SpecError(f"noisy_inputs wants eps >= 0 and an ascending input_range, got {eps} and {input_range}")

    def transform(inputs: Tensor, labels: Tensor, draw: torch.Generator, _: LocalJob) -> tuple[Tensor, Tensor]:
        noise = torch.rand(inputs.shape, generator=draw, dtype=torch.float32).to(inputs.device, inputs.dtype)
        return (inputs + (2 * noise - 1) * eps).clamp(*input_range), labels

    return poison_batches(transform)
