"""The training record of a run with CRFL: what its certificates need to know, written from what happened.

`crfl.json` in the run's folder is a `certify.crfl.training_record.TrainingRecord`. It follows from the settings, the
data and the lines of `rounds.jsonl`: who took part with which weight, how often a client stepped and with batches of
what size, how many rows of each an attacker changed, what the rule made of its weight, how long the broadcast model
was. So it can be made again for every round of the run, and one run serves every T.

It exists from the attacked round on. A run has none where nobody attacks, where more than one round was attacked, or
where the attack does what CRFL's theorems do not speak of (they know changed samples and scaled updates).

Attackers multiply their honest update too, as in CRFL's code (`counterpart_scaled`); the record has `update_norm`, so
that whoever does not assume this can have it charged.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any

import torch
from flwr.common import log
from torch import Tensor

from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.network import Network
from client.attack import read_attack
from server.record import RoundRecord, read_model, read_run, replace_file
from strategies.checks import update_norm
from strategies.transforms.crfl import clip_norm
from tasks.config import RunConfig
from tasks.errors import CertificationError, ConfigError, RecordError
from tasks.params import bind
from tasks.spec import Component, hyper_parameters
from tasks.task import Task, load

FILE = "crfl.json"
NAME = "crfl"  # of the transform
UP = 1 + 1e-12  # on norms in float64: the bound must not lie below


@dataclass(frozen=True)
class Poison:
    """What an attack does, as far as certificates go: rows per batch that it changes, and the factor on its update."""

    rows: tuple[int | float, ...]  # counts, or shares of a batch; None of them: no row is changed
    scale: float
    flips: bool  # whether labels change

    def count(self, size: int) -> int:
        """Return how many rows of a batch of `size` are changed at most."""
        each = [rows if isinstance(rows, int) else round(rows * size) for rows in self.rows]
        return min(size, sum(each))


class CrflRecorder:
    """Keeps `crfl.json` of a run as its rounds come in."""

    def __init__(self, config: RunConfig, task: Task, rounds: Sequence[RoundRecord]) -> None:
        self.config, self.task, self.rounds = config, task, list(rounds)
        self.path = config.run_folder / FILE
        self.refused = ""

    @staticmethod
    def of(config: RunConfig, task: Task) -> "CrflRecorder | None":
        """Return the recorder of a run whose folder is open, or None without CRFL; raises `ConfigError`."""
        names = [transform.name for transform in config.chain("transform")]
        if NAME not in names:
            return None
        if names.index(NAME) != len(names) - 1:
            raise ConfigError(
                f"crfl must be the last transform: clients get the model it clips, with noise; got {config.transform}"
            )
        return CrflRecorder(config, task, read_run(config.run_folder).rounds)

    def add(self, record: RoundRecord, vector: Tensor) -> None:
        """Take a finished round and its model ([params]), and write the record of all rounds so far."""
        self.rounds.append(record)
        self._write(vector)

    def finish(self, vector: Tensor) -> None:
        """Write once more at the end: a kill may have come between a round's line and the record."""
        self._write(vector)

    def _write(self, vector: Tensor) -> None:
        if not any(record.attacking for record in self.rounds):
            return
        try:
            made = training_record(self.config, self.task, self.rounds, vector)
        except (RecordError, CertificationError) as error:
            self.path.unlink(missing_ok=True)  # what is there speaks of fewer rounds
            if not self.refused:
                log(WARNING, "no training record for CRFL's certificates: %s", error)
            self.refused = str(error)
            return
        replace_file(self.path, (made.to_json() + "\n").encode())


def read_training_record(folder: Path, num_rounds: int = 0) -> TrainingRecord:
    """Return the record of a run folder as if the run had ended with round `num_rounds` (0: as it did).

    The model of that round must have been kept (`keep-models`), unless it is the last. Raises `RecordError`.
    """
    run = read_run(folder)
    last = num_rounds or len(run.rounds)
    if not 1 <= last <= len(run.rounds):
        raise RecordError(f"{folder} has {len(run.rounds)} rounds, asked for {last}")
    task = load(run.config)
    vector = read_model(model_file(folder, last, len(run.rounds)), task.layout)
    return training_record(run.config, task, run.rounds[:last], vector)


def model_file(folder: Path, round: int, last: int) -> Path:
    """Return the file of the model of `round` in a run of `last` rounds; raises `RecordError` if it was not kept."""
    kept = folder / f"models/round-{round:05d}.safetensors"
    path = folder / "model.safetensors" if round == last and not kept.exists() else kept
    if not path.exists():
        raise RecordError(f"{path} does not exist; set keep-models to a divisor of {round}")
    return path


def training_record(
    config: RunConfig, task: Task, rounds: Sequence[RoundRecord], vector: Tensor | None = None
) -> TrainingRecord:
    """Return the record of a run of these rounds that released the model `vector` ([params]; None: not said).

    Raises `RecordError` where the run is not one that CRFL's theorems can speak of.
    """
    attacked = _attacked(rounds)
    poison, training = read_poison(config), training_of(config)
    if rounds[attacked - 1].skipped:
        raise RecordError(f"the attacked round {attacked} was skipped: {rounds[attacked - 1].skipped}")
    attackers = tuple(rounds[attacked - 1].attacking)
    if unknown := [client for client in attackers if client not in config.malicious_ids]:
        raise RecordError(f"what attacker {unknown[0]} does is not in the run's settings; list it in malicious-clients")
    if lost := [client for client in attackers if client not in rounds[attacked - 1].clients]:
        raise RecordError(f"the reply of attacker {lost[0]} was not used: {rounds[attacked - 1].dropped}")
    schedule = _crfl(config)
    found = data_norm(config)
    sigma = float(schedule.pop("sigma"))
    return TrainingRecord(
        model=config.model,
        bias=bool(_argument(config.component("model"), "bias", True)),
        num_classes=task.dataset.num_classes,
        num_params=task.layout.num_params,
        num_clients=config.num_clients,
        rounds=tuple(_round_work(r, training, schedule, 0.0 if r is rounds[-1] else sigma) for r in rounds),
        smoothing_sigma=sigma,
        attack_round=attacked,
        attackers=attackers,
        work=_work(task, rounds[attacked - 1], training, poison),
        label_flips=poison.flips,
        data_norm_bound=found,
        data_norm_found=found,
        start_norm=_start_norm(config, task, rounds, attacked) * UP,
        rule=config.rule,
        mixing=config.mixing,
        transform=config.transform,
        training=config.training,
        optimizer=config.optimizer,
        collusion=config.collusion,
        dtype="float32",
        server_lr=config.server_lr,
        server_optimizer="none" if config.component("optimizer").name == "step" else config.optimizer,
        momentum=float(training["momentum"]),
        weight_decay=float(training["weight_decay"]),
        seed=config.seed,
        model_sha256=None if vector is None else network_of(task, vector).sha256(),
    )


def network_of(task: Task, vector: Tensor) -> Network:
    """Return the network that a model's vector ([params]) is, as certificates see it."""
    module = task.build_model().eval()
    bind(module, task.layout, vector.clone())
    return Network.from_module(module, task.dataset.input_shape)


def batch_sizes(num_examples: int, training: dict[str, Any]) -> tuple[int, ...]:
    """Return the size of every batch that `client.training.sgd` makes of a client's samples in a round, in order."""
    size, epochs, steps = training["batch_size"], training["epochs"], training["steps"]
    full, rest = divmod(num_examples, size)
    epoch = [size] * full + [rest] * (rest > 0)
    limit = epochs * len(epoch) if steps is None else steps
    return tuple(itertools.islice(itertools.cycle(epoch), limit))


def training_of(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of local training, defaults filled in, its rate the largest of a round."""
    training = config.component("training")
    if training.name != "sgd":
        raise RecordError(f"CRFL's certificates speak of plain SGD, training is {config.training}")
    known = {name: p.default for name, p in hyper_parameters(training.function).items()} | training.arguments
    drops = len(known["decay_at"]) if known["decay_by"] > 1 else 0
    return {**known, "lr": known["lr"] * known["decay_by"] ** drops}


def read_poison(config: RunConfig) -> Poison:
    """Return what the attack of a run does; raises `RecordError` for one that CRFL's certificates do not cover."""
    if config.collusion:
        raise RecordError(f"CRFL's attackers change samples and scale; collusion {config.collusion} does other things")
    rows, scale, flips = [], 1.0, False
    for part in config.chain("attack"):
        if part.name in ("pattern_backdoor", "patch_backdoor"):
            rows.append(_argument(part, "per_batch"))
            flips |= _argument(part, "target") is not None
        elif part.name == "label_flip":
            rows.append(1.0)
            flips = True
        elif part.name == "scale_update" and _argument(part, "factor") > 0:
            scale *= float(_argument(part, "factor"))
        else:
            raise RecordError(f"CRFL's attackers change samples and scale their update; {part} does other things")
    return Poison(tuple(rows), scale, flips)


@functools.lru_cache(maxsize=8)
def data_norm(config: RunConfig) -> float:
    """Return the l2 norm of the longest training input, as it is or triggered, as the model sees it, rounded up."""
    task, triggered = load(config), read_attack(config.attack).triggered
    normalise = getattr(task.build_model(), "normalise", torch.nn.Identity())
    longest = 0.0
    indices = torch.arange(len(task.dataset.train_labels))
    for inputs, labels in task.dataset.batches("train", indices, 1000):
        seen = [inputs] if triggered is None else [inputs, triggered(inputs, labels, task.dataset.num_classes)[0]]
        for each in seen:
            rows = normalise(each).reshape(len(each), -1)
            longest = max(longest, float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).max()))
    return longest * UP


def _attacked(rounds: Sequence[RoundRecord]) -> int:
    attacked = [number for number, record in enumerate(rounds, start=1) if record.attacking]
    if len(attacked) != 1:
        listed = ", ".join(map(str, attacked[:8])) or "none"
        raise RecordError(f"CRFL's certificates are of one attacked round; attacked were: {listed}")
    return attacked[0]


def _round_work(record: RoundRecord, training: dict[str, Any], schedule: dict[str, Any], noise: float) -> RoundWork:
    """Return one round; a skipped one left the model, and the noise on it, as they were."""
    clients = record.sampled if record.skipped else record.clients
    rate = float(training["lr"]) * float(training["round_decay"]) ** (record.round - 1)
    if not record.skipped and record.weights is None:
        raise RecordError(f"round {record.round} gave no weights per client: the rule weighs coordinates")
    return RoundWork(
        participants=tuple(clients),
        weights=(0.0,) * len(clients) if record.skipped else tuple(record.weights or ()),
        learning_rates=(rate,) * len(clients),
        clip_norm=None if record.skipped else clip_norm(record.round, **schedule),
        noise=0.0 if record.skipped else noise,
        model_norm=record.model_norm * UP,
    )


def _work(task: Task, record: RoundRecord, training: dict[str, Any], poison: Poison) -> tuple[ClientWork, ...]:
    rate = float(training["lr"]) * float(training["round_decay"]) ** (record.round - 1)
    done = []
    for client, weight, norm in zip(record.clients, record.weights or (), record.norms):
        sizes = batch_sizes(len(task.partition[client]), training)
        attacks = client in record.attacking
        scale = poison.scale if attacks else 1.0
        done.append(
            ClientWork(
                client=client,
                weight=weight,
                learning_rate=rate,
                batch_sizes=sizes,
                poisoned=tuple(poison.count(size) if attacks else 0 for size in sizes),
                scale=scale,
                update_norm=norm / scale * UP,
            )
        )
    return tuple(done)


def _start_norm(config: RunConfig, task: Task, rounds: Sequence[RoundRecord], attacked: int) -> float:
    """Return the l2 norm of what clients got in the attacked round."""
    if attacked > 1:
        before = rounds[attacked - 2]
        return before.model_norm if before.broadcast_norm is None else before.broadcast_norm
    started = read_model(Path(config.from_model), task.layout) if config.from_model else task.initial_vector()
    return update_norm(started)


def _crfl(config: RunConfig) -> dict[str, Any]:
    transform = next(part for part in config.chain("transform") if part.name == NAME)
    return {name: _argument(transform, name) for name in hyper_parameters(transform.function)}


def _argument(component: Component, name: str, otherwise: Any = dataclasses.MISSING) -> Any:
    """Return an argument of a component, or its default; `otherwise` where it has no such argument."""
    if name in component.arguments:
        return component.arguments[name]
    parameter = hyper_parameters(component.function).get(name)
    if parameter is None and otherwise is not dataclasses.MISSING:
        return otherwise
    assert parameter is not None
    return parameter.default
