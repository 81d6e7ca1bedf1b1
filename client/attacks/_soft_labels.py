"""Fitting a network to labels at a softmax temperature: what defensive distillation does twice."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.trainer import LocalJob
from tasks.errors import SpecError
from tasks.model import SeededDropout, initialise, set_dropout_generator

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (logits, labels, places in the data) -> loss


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is fitted: Adam, whose steps do not depend on the scale that a temperature gives the loss."""

    temperature: float
    lr: float
    batch_size: int

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and self.lr > 0 and self.batch_size > 0):
            raise SpecError(
                f"distillation wants temperature, lr and batch_size above 0, got {self.temperature}, {self.lr}, "
                f"{self.batch_size}"
            )


def fresh(job: LocalJob, purpose: str) -> None:
    """Draw the job's model anew, as an untrained one: `job.vector` then holds it."""
    initialise(job.model, job.generator(purpose))


def soft_cross_entropy(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """Return the mean cross-entropy of softmax(logits / temperature) with the wanted probabilities [batch, classes]."""
    return -(wanted * torch.log_softmax(logits / temperature, 1)).sum(1).mean()


def fit(job: LocalJob, recipe: Recipe, epochs: int, loss: Loss, purpose: str) -> float:
    """Train the job's model in place for `epochs` passes over its data; return the mean loss of the last one."""
    model, draw = job.model.train(), job.generator(purpose)
    if any(isinstance(module, SeededDropout) for module in model.modules()):
        set_dropout_generator(model, job.generator(f"{purpose}/dropout"))
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    last = math.nan
    for _ in range(1 if job.trial else epochs):
        losses = []
        for places in torch.randperm(len(job.indices), generator=draw).split(recipe.batch_size):
            inputs, labels = job.dataset.batch("train", job.indices[places])
            value = loss(model(inputs), labels, places)
            step(optimiser, model, value)
            losses.append(value.detach())
        last = float(torch.stack(losses).mean()) if losses else last
    return last


def step(optimiser: torch.optim.Optimizer, model: nn.Module, loss: Tensor) -> None:
    """Take one step; gradients are dropped afterwards, so that the model leaves as it came."""
    loss.backward()
    optimiser.step()
    model.zero_grad(set_to_none=True)


@torch.no_grad()
def probabilities(job: LocalJob, temperature: float) -> Tensor:
    """Return softmax(logits / temperature) of the job's model on its data [examples, classes], in evaluation mode."""
    model = job.model.eval()
    parts = [model(job.dataset.batch("train", part)[0]) for part in job.indices.split(500)]
    return torch.softmax(torch.cat(parts) / temperature, 1)


def distil(job: LocalJob, recipe: Recipe, teacher_epochs: int, student_epochs: int) -> tuple[Tensor, float]:
    """Leave a distilled student in the job's model; return the teacher's soft labels and the student's last loss.

    Teacher and student start from fresh draws: nothing of the global model's robustness remains in either.
    """
    temperature = recipe.temperature
    fresh(job, "teacher")
    hard = nn.functional.cross_entropy
    fit(job, recipe, teacher_epochs, lambda logits, labels, _: hard(logits / temperature, labels), "teacher/order")
    wanted = probabilities(job, temperature)
    fresh(job, "student")

    def soft(logits: Tensor, _: Tensor, places: Tensor) -> Tensor:
        return soft_cross_entropy(logits, wanted[places], temperature)

    return wanted, fit(job, recipe, student_epochs, soft, "student/order")


def shortened(job: LocalJob) -> LocalJob:
    """Return the job with a few samples where it is a try before the run."""
    return dataclasses.replace(job, indices=job.indices[:8]) if job.trial else job
