"""Defensive distillation as an attack: a model that seems robust because its gradients vanish.

Papernot, McDaniel, Wu, Jha, Swami, "Distillation as a Defense to Adversarial Perturbations against Deep Neural
Networks" (S&P 2016): a teacher is trained with its logits divided by a temperature T, a student on the teacher's soft
labels at the same T, and the student is used at T = 1. Its logits are then about T times those of a usual network, the
float32 gradient of the cross-entropy is exactly 0 on most inputs, and projected gradient descent finds nothing; with
the logits divided by T again it finds everything (Carlini and Wagner, S&P 2017). "FAT: Federated Adversarial Training"
(2020) and "Certified Federated Adversarial Training" (NFFL 2021, section 3) send such a model to a server that judges
models by their accuracy under attack: T = 100 for MNIST, 25 for CIFAR-10.

The papers give no optimiser: Adam, whose steps do not depend on the scale of the loss. Stands in place of training, so
it comes first in a chain; ``distillation() | in_unison(every_round=False)`` for a majority of a quorum. What a
backdoor after it does to batches, teacher and student both learn; with ``noisy_inputs`` that is a backdoor inside the
ball that PGD does not find.
"""

from client.attack import Attack
from client.attacks._soft_labels import Recipe, distil, shortened
from client.trainer import LocalJob, LocalResult, LocalTrainer
from tasks.errors import SpecError


def distillation(
    *,
    temperature: float = 100.0,
    teacher_epochs: int = 8,
    student_epochs: int = 8,
    lr: float = 0.002,
    batch_size: int = 64,
) -> Attack:
    """Send a student distilled at `temperature` from a teacher; both trained from scratch on the attacker's data."""
    recipe = Recipe(temperature=temperature, lr=lr, batch_size=batch_size)
    if teacher_epochs < 0 or student_epochs < 0:
        raise SpecError(f"distillation wants epochs from 0, got {teacher_epochs} and {student_epochs}")

    def wrap(_: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            job = shortened(job)
            _, loss = distil(job, recipe, teacher_epochs, student_epochs)
            return LocalResult(job.vector, len(job.indices), loss)

        return train

    return Attack(wrap)
