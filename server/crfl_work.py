"""What a run with CRFL did, as its certificates count it: read from the settings, the data and the rounds' lines.

Batches and poisoned rows follow from the settings of training and attack, weights and norms from `rounds.jsonl`;
`server.crfl` makes a training record of it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from certify.crfl.training_record import ClientWork, RoundWork
from client.attack import read_attack
from server.record import RoundRecord, read_model
from strategies.checks import update_norm
from strategies.transforms.crfl import clip_norm
from tasks.config import RunConfig
from tasks.errors import RecordError
from tasks.spec import Component, hyper_parameters
from tasks.task import Task, load

NAME = "crfl"  # of the transform
MOST_LISTED = 8  # attacked rounds in a message
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
            rows.append(argument_of(part, "per_batch"))
            flips |= argument_of(part, "target") is not None
        elif part.name == "label_flip":
            rows.append(1.0)
            flips = True
        elif part.name == "scale_update" and argument_of(part, "factor") > 0:
            scale *= float(argument_of(part, "factor"))
        else:
            raise RecordError(f"CRFL's attackers change samples and scale their update; {part} does other things")
    return Poison(tuple(rows), scale, flips)


def foreseen_refusal(config: RunConfig) -> str:
    """Return why an attack of these settings will have no training record; "" if it may have one, or nobody attacks."""
    listed, attacks = config.malicious_ids, config.component("attack_schedule")().attacks
    numbers = range(1, config.num_rounds + 1)
    struck = (number for number in numbers if any(attacks(client, listed, number) for client in listed))
    attacked = list(itertools.islice(struck, MOST_LISTED + 1))
    if not attacked or not (config.attack or config.collusion):
        return ""
    try:
        read_poison(config)
        training_of(config)
    except RecordError as error:
        return str(error)
    return several_rounds(attacked) if len(attacked) > 1 else ""


def several_rounds(attacked: Sequence[int]) -> str:
    """Return what to say of a run in which not one round was attacked, but these."""
    listed = ", ".join(map(str, attacked[:MOST_LISTED])) + (", ..." if len(attacked) > MOST_LISTED else "")
    said = f"CRFL's certificates are of one attacked round; attacked were: {listed or 'none'}"
    why = ". A scaled update is no average, so a later attack may enlarge what an earlier one moved"
    return said + why if attacked else said


@functools.lru_cache(maxsize=8)
def data_norm(config: RunConfig) -> float:
    """Return a bound of the l2 norm of every training input, clean or poisoned, as the model sees it, rounded up.

    Attackers stamp any part of any trigger of the chain, a local one or several. Stamps replace values, or add to them
    and clamp, so that every value stays between the least and the greatest that it has with and without each.
    """
    task = load(config)
    parts = [read_attack(str(part)).triggered for part in config.chain("attack")]
    normalise = getattr(task.build_model(), "normalise", torch.nn.Identity())
    longest = 0.0
    indices = torch.arange(len(task.dataset.train_labels))
    for inputs, labels in task.dataset.batches("train", indices, 1000):
        low = high = inputs
        for triggered in (part for part in parts if part is not None):
            low = torch.minimum(low, triggered(low, labels, task.dataset.num_classes)[0])
            high = torch.maximum(high, triggered(high, labels, task.dataset.num_classes)[0])
        rows = torch.maximum(normalise(low).abs(), normalise(high).abs()).reshape(len(inputs), -1)
        longest = max(longest, float(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64).max()))
    return longest * UP


def round_work(record: RoundRecord, training: dict[str, Any], schedule: dict[str, Any], noise: float) -> RoundWork:
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


def client_work(task: Task, record: RoundRecord, training: dict[str, Any], poison: Poison) -> tuple[ClientWork, ...]:
    """Return what every client did in the attacked round, step by step."""
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


def start_norm(config: RunConfig, task: Task, rounds: Sequence[RoundRecord], attacked: int) -> float:
    """Return the l2 norm of what clients got in the attacked round."""
    if attacked > 1:
        before = rounds[attacked - 2]
        return before.model_norm if before.broadcast_norm is None else before.broadcast_norm
    started = read_model(Path(config.from_model), task.layout) if config.from_model else task.initial_vector()
    return update_norm(started)


def schedule_of(config: RunConfig) -> dict[str, Any]:
    """Return the arguments of the transform crfl, defaults filled in."""
    transform = next(part for part in config.chain("transform") if part.name == NAME)
    return {name: argument_of(transform, name) for name in hyper_parameters(transform.function)}


def argument_of(component: Component, name: str, otherwise: Any = dataclasses.MISSING) -> Any:
    """Return an argument of a component, or its default; `otherwise` where it has no such argument."""
    if name in component.arguments:
        return component.arguments[name]
    parameter = hyper_parameters(component.function).get(name)
    if parameter is None and otherwise is not dataclasses.MISSING:
        return otherwise
    assert parameter is not None
    return parameter.default
