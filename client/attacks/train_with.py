"""An attacker's own local training: other rate, more epochs than honest clients (DBA's and FLIP's poison settings)."""

import dataclasses

from client.attack import Attack, change_training
from client.trainer import LocalTrainer
from tasks.spec import resolve


def train_with(
    *,
    training: str | None = None,
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    epochs: int | None = None,
    steps: int | None = None,
    batch_size: int | None = None,
    decay_at: tuple[float, ...] | None = None,
    decay_by: float | None = None,
) -> Attack:
    """Replace the given hyper-parameters of the honest training setting; None keeps the honest value.

    `training`, such as ``"sgd(momentum=0.9)"``, replaces the honest training itself; the others apply to it.
    """
    given = {
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "epochs": epochs,
        "steps": steps,
        "batch_size": batch_size,
        "decay_at": decay_at,
        "decay_by": decay_by,
    }
    changed = change_training({key: value for key, value in given.items() if value is not None})
    if training is None:
        return changed
    own = resolve("training", training)

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        return lambda job: trainer(dataclasses.replace(job, training=own))

    return changed | Attack(wrap)
