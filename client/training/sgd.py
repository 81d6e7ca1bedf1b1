"""Honest local training: mini-batch SGD with momentum, weight decay and learning-rate schedules.

The update is PyTorch's (`torch.optim.SGD`, same order of operations, equal to the bit), written on the
gradients directly because the optimiser object costs more than the arithmetic on small models.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from client.trainer import LocalJob, LocalResult
from tasks.errors import SpecError
from tasks.model import SeededDropout, set_dropout_generator

# torch.optim's own kernels: one call for all parameters of a model
foreach_add, foreach_mul = torch._foreach_add_, torch._foreach_mul_  # pyright: ignore[reportPrivateImportUsage]


def sgd(
    job: LocalJob,
    *,
    lr: float = 0.1,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    epochs: int = 1,
    steps: int | None = None,
    batch_size: int = 32,
    decay_at: tuple[float, ...] = (),
    decay_by: float = 0.1,
    round_decay: float = 1.0,
    max_gradient_norm: float | None = None,
) -> LocalResult:
    """Train for `epochs` passes over the client's data, or for `steps` batches when given.

    `decay_at` are shares of the epochs: from the first epoch at or past ``share * epochs`` the rate is
    multiplied by `decay_by` (DBA's step schedule is (0.2, 0.8)). The rate of round t starts at
    ``lr * round_decay ** (t - 1)``. A batch's gradient longer than `max_gradient_norm` is shortened to it.
    """
    if max_gradient_norm is not None and max_gradient_norm <= 0:
        raise SpecError(f"sgd wants max_gradient_norm > 0, got {max_gradient_norm}")
    if lr < 0 or epochs < 0 or batch_size < 1 or (steps is not None and steps < 0):
        raise SpecError(f"sgd wants lr, epochs, steps >= 0, batch_size >= 1; got {lr}, {epochs}, {steps}, {batch_size}")
    job.model.train()
    if any(isinstance(module, SeededDropout) for module in job.model.modules()):
        set_dropout_generator(job.model, job.generator("dropout"))
    parameters: list[Tensor] = list(job.model.parameters())
    shuffle, poison = job.generator("shuffle"), job.generator("poison")
    buffers: list[Tensor] = []
    num_batches = math.ceil(len(job.indices) / batch_size)
    limit = epochs * num_batches if steps is None or num_batches == 0 else steps
    done, losses, base = 0, list[Tensor](), lr * round_decay ** (job.round - 1)
    while done < limit:
        epoch = done // num_batches
        rate = base * decay_by ** sum(epoch >= share * epochs for share in decay_at)
        order = job.indices[torch.randperm(len(job.indices), generator=shuffle)[: (limit - done) * batch_size]]
        for inputs, labels in job.dataset.batches("train", order, batch_size):
            for transform in (*job.batch_transforms, *job.late_transforms):
                inputs, labels = transform(inputs, labels, poison, job)
            loss = functional.cross_entropy(job.model(inputs), labels)
            gradients = torch.autograd.grad(loss, parameters)
            if max_gradient_norm is not None:
                gradients = _shortened(gradients, max_gradient_norm)
            _step(parameters, gradients, buffers, rate, momentum, weight_decay)
            for change in job.after_step:
                change(done % num_batches, num_batches, job)
            losses.append(loss.detach())
            done += 1
    loss = float(torch.stack(losses).mean()) if losses else 0.0
    return LocalResult(job.vector, len(job.indices), loss)


@torch.no_grad()
def _shortened(gradients: tuple[Tensor, ...], longest: float) -> tuple[Tensor, ...]:
    """Return gradients whose joint l2 norm is at most `longest`, as `torch.nn.utils.clip_grad_norm_` makes them."""
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in gradients]))
    factor = (longest / (norm + 1e-6)).clamp(max=1.0)
    return tuple(g * factor for g in gradients)


@torch.no_grad()
def _step(
    parameters: list[Tensor],
    gradients: tuple[Tensor, ...],
    buffers: list[Tensor],
    lr: float,
    momentum: float,
    decay: float,
) -> None:
    """One step of SGD in place; `buffers` is filled at the first step (PyTorch starts momentum at the gradient)."""
    direction = list(gradients)
    if decay:
        foreach_add(direction, parameters, alpha=decay)
    if momentum:
        if buffers:
            foreach_mul(buffers, momentum)
            foreach_add(buffers, direction)
        else:
            buffers.extend(direction)
        direction = buffers
    foreach_add(parameters, direction, alpha=-lr)
