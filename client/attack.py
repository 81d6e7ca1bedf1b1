"""An attack is a transformation of local training, `LocalTrainer -> LocalTrainer`; attacks compose with ``|``.

Data poisoning wraps before training, update poisoning after it. An attack that has a trigger also says how test
inputs are triggered, so that the server measures the attack success rate with the attacker's own trigger.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor

from client.trainer import BatchTransform, LocalJob, LocalResult, LocalTrainer
from tasks import spec
from tasks.dataset import Dataset

# (inputs [n, ...], labels [n], number of classes) ->
# (inputs as attacked, labels the attacker wants [n], which samples the attack applies to [n] bool)
Triggered: TypeAlias = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class TargetSet:
    """Test inputs of the attack's own, where no trigger is put on the task's test data."""

    inputs: Tensor  # [samples, ...], as a batch of the data set has them
    wanted: Tensor  # [samples]: what the attacker wants
    labels: Tensor  # [samples]: the true labels


# (data set, data folder as the settings name it) -> the attack's test inputs
FindTargetSet: TypeAlias = Callable[[Dataset, str], TargetSet]


@dataclass(frozen=True)
class Attack:
    """A transformation of local training, and the test-time trigger, or test set, if the attack has one."""

    wrap: Callable[[LocalTrainer], LocalTrainer]
    triggered: Triggered | None = None
    target_set: FindTargetSet | None = None  # measured in place of a trigger

    def __call__(self, trainer: LocalTrainer) -> LocalTrainer:
        return self.wrap(trainer)

    def __or__(self, after: "Attack") -> "Attack":
        return Attack(
            lambda trainer: after.wrap(self.wrap(trainer)),
            self.triggered or after.triggered,
            self.target_set or after.target_set,
        )


NO_ATTACK = Attack(lambda trainer: trainer)


@functools.lru_cache(maxsize=64)
def read_attack(text: str) -> Attack:
    """Return the attack that a text such as ``patch_backdoor(target=2) | scale_update(factor=10)`` names."""
    attack = NO_ATTACK
    for part in spec.resolve_chain("attack", text):
        attack = attack | part()
    return attack


def poison_batches(transform: BatchTransform, triggered: Triggered | None = None) -> Attack:
    """Make an attack that changes every training batch; transforms of a chain run from left to right."""

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        return lambda job: trainer(dataclasses.replace(job, batch_transforms=(transform, *job.batch_transforms)))

    return Attack(wrap, triggered)


def change_update(change: Callable[[Tensor, LocalJob], Tensor]) -> Attack:
    """Make an attack that replaces the update (local minus global model, [params]) after training."""

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        def train(job: LocalJob) -> LocalResult:
            result = trainer(job)
            return dataclasses.replace(result, vector=job.start + change(result.vector - job.start, job))

        return train

    return Attack(wrap)


def change_training(overrides: Mapping[str, Any]) -> Attack:
    """Make an attack that trains with other hyper-parameters than honest clients do."""

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        return lambda job: trainer(dataclasses.replace(job, overrides={**job.overrides, **overrides}))

    return Attack(wrap)


def edit_reply(edit: Callable[[Any, LocalJob], Any]) -> Attack:
    """Make an attack that changes the encoded reply (a Flower ArrayRecord) itself."""

    def wrap(trainer: LocalTrainer) -> LocalTrainer:
        return lambda job: dataclasses.replace(trainer(job), edit_reply=lambda record: edit(record, job))

    return Attack(wrap)


def chosen_rank(job: LocalJob, choices: Sequence[Any]) -> Any:
    """Return this attacker's share of a list that several attackers divide among them."""
    return choices[job.rank % len(choices)]
