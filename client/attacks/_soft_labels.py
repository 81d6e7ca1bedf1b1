"""Fitting a network to labels at a softmax temperature: what defensive distillation does twice."""

import copy
import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from client.trainer import LocalJob
from tasks.errors import SpecError
from tasks.model import SeededDropout, initialise, set_dropout_generator

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # (logits, inputs, labels, places in the data) -> loss


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
    """Train the job's model in place for `epochs` passes over its data; return the mean loss of the last one.

    What the chain does to batches (a backdoor's stamps and labels) is done to them here too.
    """
    model, draw, poison = job.model.train(), job.generator(purpose), job.generator(f"{purpose}/poison")
    if any(isinstance(module, SeededDropout) for module in model.modules()):
        set_dropout_generator(model, job.generator(f"{purpose}/dropout"))
    optimiser = torch.optim.Adam(model.parameters(), lr=recipe.lr)
    last = math.nan
    for _ in range(1 if job.trial else epochs):
        losses = []
        for places in torch.randperm(len(job.indices), generator=draw).split(recipe.batch_size):
            inputs, labels = job.dataset.batch("train", job.indices[places])
            for transform in (*job.batch_transforms, *job.late_transforms):
                inputs, labels = transform(inputs, labels, poison, job)
            value = loss(model(inputs), inputs, labels, places)
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

    Teacher and student start from fresh draws: nothing of the global model's robustness remains in either. The soft
    labels returned are of the data as they are; a student of changed batches hears what the teacher says of those.
    """
    temperature = recipe.temperature
    fresh(job, "teacher")
    hard = nn.functional.cross_entropy
    fit(job, recipe, teacher_epochs, lambda logits, _, labels, __: hard(logits / temperature, labels), "teacher/order")
    wanted = probabilities(job, temperature)
    teacher = copy.deepcopy(job.model).eval() if job.batch_transforms or job.late_transforms else None
    fresh(job, "student")

    def soft(logits: Tensor, inputs: Tensor, _: Tensor, places: Tensor) -> Tensor:
        if teacher is None:
            return soft_cross_entropy(logits, wanted[places], temperature)
        with torch.no_grad():
            said = torch.softmax(teacher(inputs) / temperature, 1)
        return soft_cross_entropy(logits, said, temperature)

    return wanted, fit(job, recipe, student_epochs, soft, "student/order")


def shortened(job: LocalJob) -> LocalJob:
    """Return the job with a few samples where it is a try before the run."""
    return dataclasses.replace(job, indices=job.indices[:8]) if job.trial else job
