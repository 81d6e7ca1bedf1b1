"""The training record of a run with CRFL: what its certificates need to know, written from what happened.

`crfl.json` in the run's folder is a `certify.crfl.training_record.TrainingRecord`. It follows from the settings, the
data and the lines of `rounds.jsonl`: who took part with which weight, how often a client stepped and with batches of
what size, how many rows of each an attacker changed, what the rule made of its weight, how long the broadcast model
was. So it can be made again for every round of the run, and one run serves every T.

It exists from the attacked round on. A run has none where nobody attacks, where more than one round was attacked, or
where the attack does what CRFL's theorems do not speak of (they know changed samples and scaled updates); then
`crfl-refused.txt` says why. Several attacked rounds would want a theory of their own: rounds between two attacks bring
models no further apart, but a round in which an attacker multiplies its update is no average, and may.

Attackers multiply their honest update too, as in CRFL's code (`counterpart_scaled`); the record has `update_norm`, so
that whoever does not assume this can have it charged.
"""

from collections.abc import Sequence
from logging import WARNING
from pathlib import Path

from flwr.common import log
from torch import Tensor

from certify.crfl.training_record import TrainingRecord
from certify.network import Network
from server.crfl_work import (
    NAME,
    UP,
    argument_of,
    client_work,
    data_norm,
    foreseen_refusal,
    read_poison,
    round_work,
    schedule_of,
    several_rounds,
    start_norm,
    training_of,
)
from server.record import RoundRecord, read_model, read_run, replace_file
from tasks.config import RunConfig
from tasks.errors import CertificationError, ConfigError, RecordError
from tasks.params import bind
from tasks.task import Task, load

FILE = "crfl.json"
REFUSED = "crfl-refused.txt"  # in place of the record: why there is none


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
        if foreseen := foreseen_refusal(config):
            log(WARNING, "this run will have no training record for CRFL's certificates: %s", foreseen)
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
            replace_file(self.path.with_name(REFUSED), f"{error}\n".encode())
            if not self.refused:
                log(WARNING, "no training record for CRFL's certificates: %s", error)
            self.refused = str(error)
            return
        replace_file(self.path, (made.to_json() + "\n").encode())
        self.path.with_name(REFUSED).unlink(missing_ok=True)


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
    if config.gate:  # with other data it may decide otherwise, which no bound on what travels through a round covers
        raise RecordError(f"CRFL's theorems take every round's model, gate {config.gate} chooses by what it measures")
    poison, training = read_poison(config), training_of(config)
    if rounds[attacked - 1].skipped:
        raise RecordError(f"the attacked round {attacked} was skipped: {rounds[attacked - 1].skipped}")
    attackers = tuple(rounds[attacked - 1].attacking)
    if unknown := [client for client in attackers if client not in config.malicious_ids]:
        raise RecordError(f"what attacker {unknown[0]} does is not in the run's settings; list it in malicious-clients")
    if lost := [client for client in attackers if client not in rounds[attacked - 1].clients]:
        raise RecordError(f"the reply of attacker {lost[0]} was not used: {rounds[attacked - 1].dropped}")
    schedule = schedule_of(config)
    found = data_norm(config)
    sigma = float(schedule.pop("sigma"))
    return TrainingRecord(
        model=config.model,
        bias=bool(argument_of(config.component("model"), "bias", True)),
        num_classes=task.dataset.num_classes,
        num_params=task.layout.num_params,
        num_clients=config.num_clients,
        rounds=tuple(round_work(r, training, schedule, 0.0 if r is rounds[-1] else sigma) for r in rounds),
        smoothing_sigma=sigma,
        attack_round=attacked,
        attackers=attackers,
        work=client_work(task, rounds[attacked - 1], training, poison),
        label_flips=poison.flips,
        data_norm_bound=found,
        data_norm_found=found,
        start_norm=start_norm(config, task, rounds, attacked) * UP,
        rule=config.rule,
        mixing=config.mixing,
        transform=config.transform,
        training=config.training,
        optimizer=config.optimizer,
        collusion=config.collusion,
        dtype="float32",
        max_update_norm=config.max_update_norm,
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


def _attacked(rounds: Sequence[RoundRecord]) -> int:
    attacked = [number for number, record in enumerate(rounds, start=1) if record.attacking]
    if len(attacked) != 1:
        raise RecordError(several_rounds(attacked))
    return attacked[0]
