"""The adaptive attack on a gate of certified metrics: a distilled model that is certified where the gate looks.

"Certified Federated Adversarial Training" (NFFL 2021), sections 4 to 5.2. The attackers know the server's certification
points. They start from a distilled model, whose robustness is masked gradients alone, and minimise together

    mean over the known points of max(0, max_{q != y} of the zonotope's upper bound of z_q - z_y)      (equation 3)

at a radius eps, and the distillation loss on their own data, which keeps the model accurate and its gradients masked.
From eps = 0.1 the radius grows by 0.01 whenever the loss has come down to what the honest global model has at that
radius (``goal="loss"``, section 5.2), or as many points are certified as with the honest model (``goal="accuracy"``,
section 5.1), until `eps_to`. The gate also looks at accuracies, so a model within the goal must keep the honest one's
on the attackers' own data, clean and under PGD, which distillation deceives. What is found to be within the goal is
kept: at the end the last such model is sent.

The paper gives no optimiser, no weights and no batch of points; here Adam, a batch of points and a batch of data per
step, both losses on a logarithmic scale, since equation 3 of a distilled model begins at thousands and ends below one.
The goal is the gate's own tolerance: nine tenths of the accuracy, eleven tenths of the loss.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from certify.network import Network
from certify.pgd import pgd
from certify.zonotope import ZonotopeResult, check, margin_bounds
from client.attack import Attack
from client.attacks._soft_labels import Recipe, distil, shortened, soft_cross_entropy, step
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.errors import SpecError

ACCURACY_SHARE, LOSS_SHARE = 0.9, 1.1  # what the gate lets pass, of the honest model's
TINY = 1e-3  # what is added to a loss before its logarithm
OWN_SAMPLES, OWN_STEPS = 500, 10  # of the attackers' own data and of PGD, for accuracies before a model is kept


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the attackers want of the model at the known points, and for how many steps they try."""

    goal: Literal["accuracy", "loss"]
    eps_from: float
    eps_to: float
    eps_step: float
    steps: int  # in all
    check_every: int
    points_per_step: int
    distillation_weight: float
    accuracy_share: float  # of the honest model's accuracies, clean and under PGD at `attack_eps`
    attack_eps: float

    def radii(self) -> list[float]:
        """Return the radii in ascending order, the last one exactly `eps_to`."""
        count = math.ceil((self.eps_to - self.eps_from) / self.eps_step - 1e-9)
        return [*(self.eps_from + i * self.eps_step for i in range(count)), self.eps_to]


def adaptive_certified(
    *,
    goal: Literal["accuracy", "loss"] = "loss",
    points: int | None = None,
    eps_from: float = 0.1,
    eps_to: float = 0.25,
    eps_step: float = 0.01,
    max_steps: int = 600,
    check_every: int = 20,
    points_per_step: int = 5,
    distillation_weight: float = 1.0,
    accuracy_share: float = 0.95,
    attack_eps: float = 0.25,
    temperature: float = 100.0,
    teacher_epochs: int = 8,
    student_epochs: int = 8,
    lr: float = 0.002,
    adaptive_lr: float = 0.002,
    batch_size: int = 64,
) -> Attack:
    """Send a distilled model fitted to the first `points` known certification points (None: all that are known).

    `max_steps` steps at most; after every `check_every` it is measured whether the goal at the radius is reached, and
    whether accuracies are `accuracy_share` of the honest model's (0: not asked), clean and under PGD at `attack_eps`.
    """
    sizes = (eps_step, max_steps, check_every, points_per_step, adaptive_lr)
    if not 0 < eps_from <= eps_to or min(sizes) <= 0 or min(teacher_epochs, student_epochs, distillation_weight) < 0:
        raise SpecError(
            f"adaptive_certified wants 0 < eps_from <= eps_to, eps_step, max_steps, check_every, points_per_step and "
            f"adaptive_lr above 0, epochs and distillation_weight from 0; got {eps_from}, {eps_to}, {sizes}, "
            f"{teacher_epochs}, {student_epochs}, {distillation_weight}"
        )
    if not 0 <= accuracy_share <= 1 or attack_eps < 0:
        got = f"{accuracy_share} and {attack_eps}"
        raise SpecError(f"adaptive_certified wants accuracy_share from 0 to 1 and attack_eps from 0, got {got}")
    if points is not None and points < 1:
        raise SpecError(f"adaptive_certified wants 1 point or more, got {points}")
    recipe = Recipe(temperature=temperature, lr=lr, batch_size=batch_size)
    plan = Plan(
        goal=goal, eps_from=eps_from, eps_to=eps_to, eps_step=eps_step, steps=max_steps, check_every=check_every,
        points_per_step=points_per_step, distillation_weight=distillation_weight,
        accuracy_share=accuracy_share, attack_eps=attack_eps,
    )  # fmt: skip

    def wrap(_: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            known = known_points(job, points)
            job = shortened(job)
            wanted, loss = distil(job, recipe, teacher_epochs, student_epochs)
            job.vector.copy_(adapt(job, recipe, plan, known, wanted, adaptive_lr))
            return LocalResult(job.vector, len(job.indices), loss)

        return train

    return Attack(wrap)


def known_points(job: LocalJob, points: int | None) -> tuple[Tensor, Tensor]:
    """Return inputs and labels of the certification points that the attackers know; `SpecError` if there are none."""
    known = job.certification
    if known is None or len(known) == 0:
        raise SpecError("adaptive_certified needs a gate: its attackers know the gate's certification points")
    return job.dataset.batch("train", known[: 1 if job.trial else points])


def adapt(
    job: LocalJob, recipe: Recipe, plan: Plan, known: tuple[Tensor, Tensor], wanted: Tensor, lr: float
) -> Tensor:  # fmt: skip
    """Return the last vector that was within the goal at its radius, or the one after all steps if none was."""
    honest = Network.from_module(job.model, job.dataset.input_shape).with_vector(job.start.clone())
    model, kept = job.model.train(), None
    optimiser = torch.optim.Adam(model.parameters(), lr=lr)
    radii = iter(plan.radii())
    eps = next(radii)
    target, own = check(honest, *known, eps=eps), accuracies(honest, job, plan)
    points = _cycle(job, "points", len(known[1]), plan.points_per_step)
    batches = _cycle(job, "batches", len(job.indices), recipe.batch_size)
    for number in range(1, (1 if job.trial else plan.steps) + 1):
        some = next(points)
        network = Network.from_module(model, job.dataset.input_shape, copy=False)
        upper = margin_bounds(network, known[0][some], known[1][some], eps)
        places = next(batches)
        inputs, _ = job.dataset.batch("train", job.indices[places])
        masked = soft_cross_entropy(model(inputs), wanted[places], recipe.temperature)
        step(optimiser, model, certifiable(upper, known[1][some], plan) + plan.distillation_weight * masked)
        if number % plan.check_every == 0 and not job.trial:
            ours = Network.from_module(model, job.dataset.input_shape)
            while reached(check(ours, *known, eps=eps), target, plan) and as_good(ours, own, job, plan):
                kept, eps = job.vector.clone(), next(radii, math.inf)
                if eps == math.inf:
                    return kept
                target = check(honest, *known, eps=eps)
    return job.vector.clone() if kept is None else kept


def certifiable(upper: Tensor, labels: Tensor, plan: Plan) -> Tensor:
    """Return the logarithm of equation 3 for upper bounds [points, classes]; 0 at q = y counts for nothing.

    A point to be certified needs its bounds below 0, so for goal "accuracy" every margin is wanted a little further.
    """
    worst = upper.scatter(1, labels[:, None], -torch.inf).amax(1)
    slack = 0.1 if plan.goal == "accuracy" else 0.0
    return torch.log((worst + slack).clamp(min=0.0).mean() + TINY)


def reached(ours: ZonotopeResult, theirs: ZonotopeResult, plan: Plan) -> bool:
    """Whether bounds at the known points are as good as a gate wants that has accepted the honest model's."""
    if plan.goal == "accuracy":
        return ours.certified_accuracy >= ACCURACY_SHARE * theirs.certified_accuracy
    return ours.mean_loss <= LOSS_SHARE * theirs.mean_loss


def accuracies(network: Network, job: LocalJob, plan: Plan) -> tuple[float, float]:
    """Return accuracy and PGD accuracy on some of the attackers' own data, as a gate would measure them."""
    if plan.accuracy_share == 0 or job.trial:
        return 0.0, 0.0
    own = job.dataset.batch("train", job.indices[:OWN_SAMPLES])
    found = pgd(network, *own, eps=plan.attack_eps, steps=OWN_STEPS, generator=job.generator("adaptive/own"))
    return found.clean_accuracy, found.accuracy


def as_good(network: Network, own: tuple[float, float], job: LocalJob, plan: Plan) -> bool:
    """Whether accuracies on the attackers' own data are a share of the honest model's `own`."""
    found = accuracies(network, job, plan)
    return all(ours >= plan.accuracy_share * theirs for ours, theirs in zip(found, own, strict=True))


def _cycle(job: LocalJob, purpose: str, count: int, size: int) -> Iterator[Tensor]:
    """Yield places of batches for ever, each pass in a new order."""
    draw = job.generator(f"adaptive/{purpose}")
    while True:
        yield from torch.randperm(count, generator=draw).split(size)
