"""Projected gradient descent: an attacker that never leaves a ball around the global model.

Wang et al., "Attack of the Tails", NeurIPS 2020, section 3: after every `frequency`-th step of an epoch, from the first
on, and after each epoch's last step, the model is projected on the l2 ball of `radius` around the global model; radii
in the paper are 2 (CIFAR-10), 1 (digits), and under Krum ``radius * decay ** (round - 1)``. Momentum is not projected.

What is sent always lies inside the ball, whatever the trainer does: it is projected once more. The authors' code for
texts projects before the last step, so that what it sends lies outside. The ball is one of trained parameters and
batch-norm statistics together. Chain it before ``replace_model``, which leaves the ball on purpose.
"""

import dataclasses

import torch
from torch import Tensor

from client.attack import Attack
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.errors import SpecError


def pgd_projection(*, radius: float = 1.0, frequency: int = 10, decay: float = 1.0) -> Attack:
    """Keep the update's l2 norm at most ``radius * decay ** (round - 1)`` during training and at its end."""
    if radius <= 0 or frequency < 1 or not 0 < decay <= 1:
        raise SpecError(
            f"pgd_projection wants radius > 0, frequency >= 1, 0 < decay <= 1; got {radius}, {frequency}, {decay}"
        )

    def limit(job: LocalJob) -> float:
        return radius * decay ** (job.round - 1)

    def after_step(batch: int, num_batches: int, job: LocalJob) -> None:
        if batch % frequency == 0 or batch == num_batches - 1:
            job.vector.copy_(project(job.vector, job.start, limit(job)))

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            result = trainer(dataclasses.replace(job, after_step=(*job.after_step, after_step)))
            return dataclasses.replace(result, vector=project(result.vector, job.start, limit(job)))

        return train

    return Attack(wrap)


@torch.no_grad()
def project(vector: Tensor, centre: Tensor, radius: float) -> Tensor:
    """Return the point of the l2 ball around `centre` next to `vector`, in float32 and never outside of the ball.

    The norm is that of the float64 difference of the two float32 vectors, which is what a server measures.
    """
    update = vector.double() - centre.double()
    norm = float(torch.linalg.vector_norm(update))
    if norm <= radius:
        return vector
    target = radius
    for _ in range(60):  # float32 has 24 bits: rounding moves a point less and less, or the centre itself is left
        moved = (centre.double() + update * (target / norm)).to(vector.dtype)
        excess = float(torch.linalg.vector_norm(moved.double() - centre.double())) - radius
        if excess <= 0:
            return moved
        target -= max(2 * excess, 1e-9 * radius)
        if target <= 0:
            break
    return centre.clone()
