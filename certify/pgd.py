"""Projected gradient descent in the l_inf ball: the attack that every certificate must survive.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018).
The loss may be the cross-entropy at a temperature, or the logit margin max_{q != y} z_q - z_y of Carlini and Wagner
("Towards Evaluating the Robustness of Neural Networks", S&P 2017): a model whose logits are huge, as distilled ones
are, has float32 cross-entropy gradients of exactly 0, and only a temperature or the margin finds its adversarial
inputs. Of all steps and restarts the first input that is misclassified is kept, so the accuracy never flatters.

`perturb` is the same ascent for training: a fixed number of steps, the last point, no verdict.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from certify.precision import exact_arithmetic
from tasks.errors import CertificationError

Loss = Literal["cross_entropy", "margin"]
Classifier = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class PgdResult:
    """Inputs of the attack [samples, ...] inside the ball and the range, and where the classifier is still right."""

    inputs: Tensor
    correct: Tensor  # [samples], bool: right on the input itself and on every input tried
    clean_correct: Tensor  # [samples], bool

    @property
    def accuracy(self) -> float:
        """Share of samples that the attack did not break."""
        return self.correct.double().mean().item()

    @property
    def clean_accuracy(self) -> float:
        """Share of samples that are right without an attack."""
        return self.clean_correct.double().mean().item()


def pgd(
    classifier: Classifier,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    generator: torch.Generator,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    random_start: bool = True,
    loss: Loss = "cross_entropy",
    temperature: float = 1.0,
    early_stop: bool = True,
    input_range: tuple[float, float] = (0.0, 1.0),
) -> PgdResult:
    """Attack inputs [samples, ...] within eps of them (max norm) and inside `input_range`.

    A step moves every number by `step_size` (2.5 eps / steps unless given). With `early_stop` a sample that is broken
    is left alone. `classifier` maps inputs to logits [samples, classes] and is called in whatever mode it is in.
    """
    _check(inputs, labels, eps, steps, restarts, temperature, loss, input_range)
    with exact_arithmetic():  # the gradients, too
        return _attack(
            classifier, inputs, labels, eps, generator, steps, step_size, restarts, random_start, loss, temperature,
            early_stop, input_range,
        )  # fmt: skip


def perturb(
    classifier: Classifier,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    generator: torch.Generator,
    steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    half_steps: int = 0,
    loss: Loss = "cross_entropy",
    temperature: float = 1.0,
    input_range: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """Return inputs after exactly `steps` steps of the attack, whether the last point fools the classifier or not.

    The first `half_steps` compute logits and slopes in bfloat16: only the sign of a slope is used and every point is
    projected in the type of the inputs, so the ball holds exactly and only the direction of a few steps may differ.
    """
    _check(inputs, labels, eps, steps, 1, temperature, loss, input_range)
    if not 0 <= half_steps <= steps:
        raise CertificationError(f"perturb wants half_steps from 0 to steps = {steps}, got {half_steps}")
    size = _step_size(eps, steps, step_size)
    low, high = (inputs - eps).clamp(*input_range), (inputs + eps).clamp(*input_range)
    current = _random_point(low, high, generator) if random_start else inputs
    for step in range(steps):
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=step < half_steps):
            _, slope = _slope(classifier, current, labels, loss, temperature, True)
        assert slope is not None
        current = torch.minimum(torch.maximum(current + size * slope.sign(), low), high)
    return current


def _step_size(eps: float, steps: int, step_size: float | None) -> float:
    return 2.5 * eps / max(steps, 1) if step_size is None else step_size


def _random_point(low: Tensor, high: Tensor, generator: torch.Generator) -> Tensor:
    """Return a uniform point of every box; drawn where the generator is, so that devices agree."""
    noise = torch.rand(low.shape, generator=generator, dtype=low.dtype, device=generator.device).to(low.device)
    return torch.minimum(torch.maximum(low + noise * (high - low), low), high)


def _attack(
    classifier: Classifier, inputs: Tensor, labels: Tensor, eps: float, generator: torch.Generator, steps: int,
    step_size: float | None, restarts: int, random_start: bool, loss: Loss, temperature: float, early_stop: bool,
    input_range: tuple[float, float],
) -> PgdResult:  # fmt: skip
    size = _step_size(eps, steps, step_size)
    low, high = (inputs - eps).clamp(*input_range), (inputs + eps).clamp(*input_range)
    with torch.no_grad():
        clean = _right(classifier(inputs), labels)
    attacked, correct = inputs.clone(), clean.clone()
    for _ in range(restarts):
        active = (correct if early_stop else torch.ones_like(correct)).nonzero()[:, 0]
        current = inputs[active]
        if random_start:
            current = _random_point(low, high, generator)[active]
        for step in range(steps + 1):
            if active.numel() == 0:
                break
            logits, slope = _slope(classifier, current, labels[active], loss, temperature, step < steps)
            newly = ~_right(logits, labels[active]) & correct[active]
            attacked[active[newly]] = current[newly]
            correct[active[newly]] = False
            if slope is None:
                kept = correct[active]
                attacked[active[kept]] = current[kept]
                break
            current = current + size * slope.sign()
            current = torch.minimum(torch.maximum(current, low[active]), high[active])
            if early_stop and bool(newly.any()):
                active, current = active[~newly], current[~newly]
    return PgdResult(attacked, correct, clean)


def attack_loss(logits: Tensor, labels: Tensor, loss: Loss, temperature: float = 1.0) -> Tensor:
    """Return what the attack maximises, summed over samples: the temperature divides the logits of either loss."""
    scaled = logits / temperature
    if loss == "cross_entropy":
        return functional.cross_entropy(scaled, labels, reduction="sum")
    own = scaled.gather(1, labels[:, None])[:, 0]
    others = scaled.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (others - own).sum()


def _slope(
    classifier: Classifier, inputs: Tensor, labels: Tensor, loss: Loss, temperature: float, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    if not wanted:
        with torch.no_grad():
            return classifier(inputs), None
    with torch.enable_grad():
        variable = inputs.detach().requires_grad_(True)
        logits = classifier(variable)
        (slope,) = torch.autograd.grad(attack_loss(logits, labels, loss, temperature), variable)
    return logits.detach(), slope


def _right(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether the label's logit is above every other; a tie or NaN counts as wrong."""
    own = logits.gather(1, labels[:, None])
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return (own > others).all(1)


def _check(
    inputs: Tensor, labels: Tensor, eps: float, steps: int, restarts: int, temperature: float, loss: str,
    input_range: tuple[float, float],
) -> None:  # fmt: skip
    if not inputs.is_floating_point() or inputs.ndim < 2 or labels.shape != inputs.shape[:1]:
        shapes = f"{tuple(inputs.shape)} of {inputs.dtype} and {tuple(labels.shape)}"
        raise CertificationError(f"pgd wants floating-point inputs [samples, ...] and one label each, got {shapes}")
    if not (0 <= eps < float("inf")) or steps < 0 or restarts < 1 or not temperature > 0:
        given = f"eps={eps}, steps={steps}, restarts={restarts}, temperature={temperature}"
        raise CertificationError(f"pgd wants eps and steps from 0, restarts from 1, temperature above 0, got {given}")
    if loss not in ("cross_entropy", "margin"):
        raise CertificationError(f"unknown loss {loss!r}; there are: cross_entropy, margin")
    if not input_range[0] < input_range[1] or bool(((inputs < input_range[0]) | (inputs > input_range[1])).any()):
        raise CertificationError(f"all inputs must be inside input_range {input_range}")
