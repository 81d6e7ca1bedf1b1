"""Local training: the job a client is given, the result it returns, and the shape of a trainer."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from tasks.config import RunConfig
from tasks.dataset import Dataset
from tasks.errors import SpecError
from tasks.params import Layout
from tasks.rng import generator
from tasks.spec import Component, hyper_parameters


@dataclass(frozen=True)
class LocalJob:
    """One client's work in one round. `vector` holds the global model on entry and is trained in place."""

    dataset: Dataset
    indices: Tensor  # [examples], int64, into the training split
    model: nn.Module  # its parameters are views into `vector`
    layout: Layout
    start: Tensor  # [params]: the global model of this round; read only
    vector: Tensor  # [params]: the working copy
    client: int
    round: int
    seed: int
    rank: int = 0  # position among the malicious clients, for attacks that share work
    num_attackers: int = 0
    batch_transforms: "tuple[BatchTransform, ...]" = ()  # before what the training does to a batch itself
    late_transforms: "tuple[BatchTransform, ...]" = ()  # after it, as on what adversarial training made of a batch
    overrides: Mapping[str, Any] = field(default_factory=dict)  # hyper-parameters an attacker trains with
    training: Component | None = None  # an attacker's own way of training, instead of the honest one
    state: MutableMapping[str, Tensor] = field(default_factory=dict)  # what this client keeps for its next round
    after_step: "tuple[AfterStep, ...]" = ()  # what happens to `vector` between the steps of training
    settings: RunConfig | None = None  # of the run, all of which an attacker knows
    pool: Tensor | None = None  # [examples]: the indices of all malicious clients, for attackers that act as one
    certification: Tensor | None = None  # [points]: training samples of the server's gate, where attackers know them
    trial: bool = False  # a try before the run: one step shows whether everything fits together

    def generator(self, purpose: str) -> torch.Generator:
        """Return this client's generator of this round for one purpose, such as "shuffle"."""
        return generator(self.seed, "client", self.client, "round", self.round, purpose)


@dataclass(frozen=True)
class LocalResult:
    """What a client sends: its model after training, how many examples it used, its mean training loss.

    `edit_reply` lets an attack change the encoded arrays themselves (names, shapes, bytes).
    """

    vector: Tensor  # [params]
    num_examples: int
    loss: float
    edit_reply: Callable[[Any], Any] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)  # what else the client says about its training


LocalTrainer: TypeAlias = Callable[[LocalJob], LocalResult]
# (inputs [batch, ...], labels [batch], generator, job) -> (inputs, labels); may change its inputs, never the labels
BatchTransform: TypeAlias = Callable[[Tensor, Tensor, torch.Generator, LocalJob], tuple[Tensor, Tensor]]
# (number of the batch within its epoch from 0, number of batches in an epoch, job); may change the job's vector
AfterStep: TypeAlias = Callable[[int, int, LocalJob], None]


def honest(training: Component) -> LocalTrainer:
    """Return the trainer of a `training` setting; a job may bring a training of its own, or other hyper-parameters."""

    def train(job: LocalJob) -> LocalResult:
        chosen = job.training or training
        if unknown := job.overrides.keys() - hyper_parameters(chosen.function).keys():
            raise SpecError(
                f"the attack trains with {min(unknown)}, which {chosen.name} does not have; give it a training of its "
                f"own, such as train_with(training='sgd()', {min(unknown)}=...)"
            )
        return chosen.function(job, **{**chosen.arguments, **job.overrides})

    return train
