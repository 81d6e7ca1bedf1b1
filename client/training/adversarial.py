"""Adversarial training: every batch is replaced by what projected gradient descent makes of it in the l_inf ball.

Madry, Makelov, Schmidt, Tsipras, Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018);
in a federation: Zizzo, Rawat, Sinn, Buesser, "FAT: Federated Adversarial Training" (2020), and "Certified Federated
Adversarial Training" (NFFL 2021), whose clients train with l_inf radius 0.25 (MNIST) and 8/255 (CIFAR-10). Steps and
step size are not in the papers; the step size is 2.5 eps / steps unless given, as in Madry et al.

The attack is `certify.pgd`'s, on the model in evaluation mode, so that batch-norm statistics and dropout see the
training pass alone; the rest is `sgd`. What an attacker does to a batch comes before: a backdoor of such a client is
adversarially trained, too. ``attack_steps=1, step_size=1.25 * eps`` is fast adversarial training (Wong, Rice, Kolter,
ICLR 2020).
"""

import dataclasses

import torch
from torch import Tensor

from certify.pgd import perturb
from client.trainer import BatchTransform, LocalJob, LocalResult
from client.training.sgd import sgd
from tasks.errors import SpecError


def adversarial(
    job: LocalJob,
    *,
    eps: float = 0.25,
    attack_steps: int = 10,
    step_size: float | None = None,
    random_start: bool = True,
    half_steps: int = 0,
    eps_rounds: int = 0,
    input_range: tuple[float, float] = (0.0, 1.0),
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
    """Train as `sgd` does on batches that are attacked within `eps` (input units, max norm) first.

    `half_steps` of the attack, the first ones, run in bfloat16. Over the first `eps_rounds` rounds the radius grows
    evenly to `eps`: from scratch a large one can hold a network at the constant answer.
    """
    if eps < 0 or attack_steps < 0 or eps_rounds < 0 or not 0 <= half_steps <= attack_steps:
        raise SpecError(
            f"adversarial wants eps, attack_steps, eps_rounds >= 0 and half_steps from 0 to attack_steps; got {eps}, "
            f"{attack_steps}, {eps_rounds}, {half_steps}"
        )
    if not input_range[0] < input_range[1] or (step_size is not None and not step_size > 0):
        raise SpecError(
            f"adversarial wants an ascending input_range and a step_size above 0, got {input_range}, {step_size}"
        )
    grown = min(1.0, job.round / eps_rounds) if eps_rounds else 1.0
    attack = against(
        job, eps=eps * grown, steps=attack_steps, step_size=None if step_size is None else step_size * grown,
        random_start=random_start, half_steps=half_steps, input_range=input_range,
    )  # fmt: skip
    return sgd(
        dataclasses.replace(job, batch_transforms=(*job.batch_transforms, attack)),
        lr=lr, momentum=momentum, weight_decay=weight_decay, epochs=epochs, steps=steps, batch_size=batch_size,
        decay_at=decay_at, decay_by=decay_by, round_decay=round_decay, max_gradient_norm=max_gradient_norm,
    )  # fmt: skip


def against(
    job: LocalJob, *, eps: float, steps: int, step_size: float | None, random_start: bool, half_steps: int,
    input_range: tuple[float, float],
) -> BatchTransform:  # fmt: skip
    """Return the transform that attacks a batch with the job's model as it is at that moment."""
    draw, model = job.generator("adversarial"), job.model

    def attacked(inputs: Tensor, labels: Tensor, _: torch.Generator, __: LocalJob) -> tuple[Tensor, Tensor]:
        training = model.training
        model.eval()
        try:
            found = perturb(
                model, inputs, labels, eps=eps, generator=draw, steps=steps, step_size=step_size,
                random_start=random_start, half_steps=half_steps, input_range=input_range,
            )  # fmt: skip
        finally:
            model.train(training)
        return found, labels

    return attacked
