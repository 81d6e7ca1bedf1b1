"""A small federation of softmax regressions, run in many worlds at once that share everything but the attack.

All worlds have the same start, batches and noise (what the coupled certificates speak of), in float64. Rounds are
CRFL's (Xie et al., ICML 2021, Algorithm 1): local SGD, an average with equal weights, clipping, noise. The attackers'
first rows of every batch are replaced in the attacked round, and their updates scaled.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.network import Network
from tasks.rng import generator


@dataclass(frozen=True, eq=False)
class Poison:
    """What attackers train on instead, per attacker, step and poisoned row."""

    inputs: Tensor  # [attackers, steps, rows, features]
    labels: Tensor  # [attackers, steps, rows]


@dataclass(frozen=True, kw_only=True, eq=False)
class Federation:
    """Clients' data in batches, and the settings of the run; parameters are [worlds, classes, features + 1]."""

    inputs: Tensor  # [clients, samples, features], float64
    labels: Tensor  # [clients, samples]
    num_classes: int
    batch_size: int = 100
    rate: float = 1e-3
    late_rate: float | None = None  # from the attacked round on; the same rate if None
    clip_norm: float = 2.0  # rho_t is clip_norm + clip_growth t
    clip_growth: float = 0.1
    sigma: float = 0.01
    scale: float = 10.0  # gamma
    attackers: int = 1
    rows: int = 5  # q_B
    attack_round: int = 2
    num_rounds: int = 4
    seed: int = 1

    @property
    def steps(self) -> int:
        return self.inputs.shape[1] // self.batch_size

    @cached_property
    def lifted(self) -> Tensor:
        """Inputs with a 1 appended, [clients, samples, features + 1]."""
        return _lift(self.inputs)

    def rate_of(self, number: int) -> float:
        """Return the learning rate of round `number`."""
        return self.rate if self.late_rate is None or number < self.attack_round else self.late_rate

    def clip_of(self, number: int) -> float:
        """Return the clipping norm of round `number`."""
        return self.clip_norm + self.clip_growth * number

    def batches(self, number: int) -> Tensor:
        """Return sample numbers [clients, steps, batch] of round `number`; a short rest of the data is left out."""
        clients, samples, _ = self.inputs.shape
        kept = self.steps * self.batch_size
        rows = [
            torch.randperm(samples, generator=generator(self.seed, "batches", c, number))[:kept]
            for c in range(clients)
        ]  # fmt: skip
        return torch.stack(rows).view(clients, self.steps, self.batch_size)

    @cached_property
    def start(self) -> Tensor:
        """Parameters [1, classes, features + 1] that the attacked round starts from."""
        features = self.lifted.shape[2]
        bound = 1 / math.sqrt(features - 1)
        drawn = torch.rand(1, self.num_classes, features, generator=generator(self.seed, "model"), dtype=torch.float64)
        model = (2 * drawn - 1) * bound
        for number in range(1, self.attack_round):
            model = self.close(self.honest_round(model, number), number)
        return model

    def clean_poison(self) -> Poison:
        """Return the rows that a poison replaces, unchanged."""
        batches = self.batches(self.attack_round)[: self.attackers, :, : self.rows]
        rows = [(self.inputs[c][batches[c]], self.labels[c][batches[c]]) for c in range(self.attackers)]
        return Poison(torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows]))

    def run(self, poisons: Sequence[Poison]) -> Tensor:
        """Return the released models [worlds, classes, features + 1] of every poison."""
        number = self.attack_round
        local = self.local_models(self.start, number)[0]  # of the world without poison
        honest = local[self.attackers :].sum(0)
        update = torch.stack([self.attacked(poison).sum(0) for poison in poisons]) + honest
        update -= len(self.inputs) * self.start  # attackers' models are their scaled updates on the start
        model = self.close(self.start + update / len(self.inputs), number)
        for number in range(self.attack_round + 1, self.num_rounds + 1):
            model = self.close(self.honest_round(model, number), number)
        return model

    def attacked(self, poison: Poison) -> Tensor:
        """Return start + gamma (local model - start) of every attacker, [attackers, classes, features + 1]."""
        batches = self.batches(self.attack_round)[: self.attackers]
        model = self.start.expand(self.attackers, -1, -1)
        clients = torch.arange(self.attackers)[:, None]
        for step in range(self.steps):
            inputs, labels = self.lifted[clients, batches[:, step]], self.labels[clients, batches[:, step]]
            inputs = torch.cat([_lift(poison.inputs[:, step]), inputs[:, self.rows :]], dim=1)
            labels = torch.cat([poison.labels[:, step], labels[:, self.rows :]], dim=1)
            model = model - self.rate_of(self.attack_round) * _gradient(model, inputs, labels)
        return self.start + self.scale * (model - self.start)

    def local_models(self, model: Tensor, number: int) -> Tensor:
        """Return local models [worlds, clients, classes, features + 1] after a round of honest training."""
        worlds, classes, features = model.shape
        clients = len(self.inputs)
        local = model.expand(clients, -1, -1, -1).reshape(clients, worlds * classes, features).clone()
        batches, order = self.batches(number), torch.arange(clients)[:, None]
        for step in range(self.steps):
            inputs, labels = self.lifted[order, batches[:, step]], self.labels[order, batches[:, step]]
            logits = (inputs @ local.mT).view(clients, -1, worlds, classes)
            residual = logits.softmax(3)
            residual -= torch.nn.functional.one_hot(labels, classes).unsqueeze(2)
            local -= (self.rate_of(number) / self.batch_size) * (residual.flatten(2).mT @ inputs)
        return local.view(clients, worlds, classes, features).transpose(0, 1)

    def honest_round(self, model: Tensor, number: int) -> Tensor:
        """Return the average of the local models, which is the model plus the average update."""
        return self.local_models(model, number).mean(1)

    def close(self, model: Tensor, number: int) -> Tensor:
        """Return the clipped model with the round's noise; the last round adds none."""
        norms = model.flatten(1).norm(dim=1)[:, None, None]
        clipped = model / (norms / self.clip_of(number)).clamp(min=1)
        if number == self.num_rounds:
            return clipped
        noise = torch.randn(model.shape[1:], generator=generator(self.seed, "noise", number), dtype=torch.float64)
        return clipped + self.sigma * noise

    def network(self, model: Tensor) -> Network:
        """Return one released model [classes, features + 1] as a network."""
        described = [{"kind": "linear", "weight": "weight", "bias": "bias"}]
        tensors = {"weight": model[:, :-1].contiguous(), "bias": model[:, -1].contiguous()}
        return Network.from_parts(described, tensors, (model.shape[1] - 1,))

    def record(self, released: Tensor, *, label_flips: bool = False, data_norm: float | None = None) -> TrainingRecord:
        """Return the training record of the run; `data_norm` bounds inputs, the longest one found if None."""
        clients = len(self.inputs)
        longest = float(self.inputs.norm(dim=2).max()) * (1 + 1e-12)
        weights = (1 / clients,) * clients
        rounds = tuple(
            RoundWork(
                participants=tuple(range(clients)), weights=weights, learning_rates=(self.rate_of(number),) * clients,
                clip_norm=self.clip_of(number), noise=self.sigma,
            )
            for number in range(1, self.num_rounds + 1)
        )  # fmt: skip
        start = self.start
        updates = (self.local_models(start, self.attack_round)[0] - start).flatten(1)
        norms = (updates.norm(dim=1) * (1 + 1e-12)).tolist()
        local = tuple(
            ClientWork(
                client=c, weight=weights[c], learning_rate=self.rate_of(self.attack_round),
                batch_sizes=(self.batch_size,) * self.steps,
                poisoned=(self.rows if c < self.attackers else 0,) * self.steps,
                scale=self.scale if c < self.attackers else 1.0, update_norm=norms[c],
            )
            for c in range(clients)
        )  # fmt: skip
        return TrainingRecord(
            model="logistic_regression()", bias=True, num_classes=self.num_classes, num_clients=clients,
            num_params=released.numel(), rounds=rounds, smoothing_sigma=self.sigma,
            attack_round=self.attack_round, attackers=tuple(range(self.attackers)), work=local,
            label_flips=label_flips, data_norm_bound=data_norm or longest, data_norm_found=longest,
            start_norm=float(self.start.norm()) * (1 + 1e-12), seed=self.seed,
            model_sha256=self.network(released).sha256(), dtype="float64", mixing="", collusion="",
            clip_error=2.0**-48,  # the clip here is exact but for float64's rounding
        )  # fmt: skip


def _lift(inputs: Tensor) -> Tensor:
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def _gradient(model: Tensor, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return the mean gradient [.., classes, features + 1] of the cross entropy over a batch."""
    residual = (inputs @ model.mT).softmax(-1) - torch.nn.functional.one_hot(labels, model.shape[-2])
    return residual.mT @ inputs / inputs.shape[-2]
