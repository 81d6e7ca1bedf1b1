"""The round loop: sample, train, aggregate, evaluate, record; the same for every engine."""

import contextlib
import dataclasses
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Iterable
from logging import INFO, WARNING
from pathlib import Path

import torch
from flwr.app import ConfigRecord, Message
from flwr.common import log
from flwr.serverapp import Grid
from torch import Tensor

from client.attack import read_attack
from server.collusion import colluding
from server.crfl import CrflRecorder
from server.evaluate import Evaluator, Metrics
from server.gate import Gate, GateRound
from server.observe import Observers
from server.record import RoundRecord, read_model
from server.root import RootTrainer
from server.writer import RunWriter
from strategies.checks import update_norm
from strategies.context import BROADCAST
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from strategies.sampling import forced_clients, sample_clients
from tasks.config import RunConfig
from tasks.errors import EngineError, RecordError
from tasks.params import digest
from tasks.schedule import Schedule
from tasks.task import Task, load
from tasks.wire import to_record

OnRound = Callable[[RoundRecord], None]


def run_federation(config: RunConfig, grid: Grid, on_round: OnRound | None = None) -> None:
    """Run, or resume, all rounds of a federation over `grid` and write its record."""
    config.resolve_components()
    torch.set_num_threads(1)  # sums in one order on every engine
    task = load(config)
    start = None if config.resume else _start(config, task)
    if config.resume:
        writer, last, vector, memory = RunWriter.resume(config, task.layout)
    else:
        writer, last, vector, memory = RunWriter.create(config, task.layout), 0, None, {}
    observers = None
    try:
        observers = Observers(config, last + 1)
        if vector is None:
            vector = start if start is not None else _start(config, task)
        federation = Federation(config, task, grid, writer)
        gate = federation.gate
        federation.strategy.memory = memory if gate is None or last == 0 else gate.restore(memory)
        federation.run(vector, last, observers.follow(on_round))
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt | SystemExit)
        with contextlib.suppress(RecordError):  # the disk may be what failed; the first error says it
            writer.write_header(status="interrupted" if stopped else "failed")
        raise
    finally:
        if observers is not None:
            observers.close()
        writer.close()


def _start(config: RunConfig, task: Task) -> Tensor:
    """Return the model ([params]) that the first round starts from."""
    return read_model(Path(config.from_model), task.layout) if config.from_model else task.initial_vector()


class Federation:
    """One run: its task, strategy, evaluator and record."""

    def __init__(self, config: RunConfig, task: Task, grid: Grid, writer: RunWriter) -> None:
        self.config, self.task, self.grid, self.writer = config, task, grid, writer
        self.schedule: Schedule = config.component("attack_schedule")()
        self.population = Population(config.num_clients, restarts=not has_fixed_members(grid))
        attack = read_attack(config.attack)
        target_set = attack.target_set(task.dataset, config.data_dir) if attack.target_set else None
        self.evaluate = Evaluator(task, attack.triggered, config.tau, target_set)
        self.crfl = CrflRecorder.of(config, task)
        self.gate = Gate.of(config, task)
        self.strategy = RobustStrategy(
            pipeline=Pipeline(config.component("rule"), config.chain("mixing")),
            step=ServerStep(config.component("optimizer"), config.chain("transform"), config.server_lr),
            layout=task.layout,
            population=self.population,
            sample=self._sample,
            seed=config.seed,
            root=RootTrainer(config, task) if config.root_samples else None,
            collude=colluding(config, self.schedule, self._malicious),
            gate=self.gate,
            client_weights=config.client_weights,
            min_replies=config.min_replies,
            max_update_norm=config.max_update_norm,
            round_timeout=config.round_timeout,
        )

    def run(self, vector: Tensor, last: int, on_round: OnRound | None) -> None:
        """Run the rounds after `last` from the model `vector` ([params]), then write the final model."""
        self._wait_for_clients()
        if last == 0:
            facts, initial = self._facts(), dict[str, object](_rounded(self.evaluate(vector)))
            if self.gate is not None:
                initial["gate"] = self.gate.begin(vector)
            self.writer.write_header(initial=initial, facts=facts, started=time.time())
        for number in range(last + 1, self.config.num_rounds + 1):
            record, vector = self._round(number, vector)
            memory = self.strategy.memory | ({} if self.gate is None else self.gate.tensors())
            self.writer.write_round(record, vector, self._kept(), memory, self._beside())
            if self.crfl is not None:
                self.crfl.add(record, vector)
            if on_round is not None:
                on_round(record)
        if self.crfl is not None:
            self.crfl.finish(vector)
        self.writer.finish(vector, sha256=digest(vector))

    def _round(self, number: int, vector: Tensor) -> tuple[RoundRecord, Tensor]:
        begin = time.perf_counter()
        self._wait_for_enough(number)
        sent = self.strategy.memory.get(BROADCAST, vector)
        messages = self.strategy.configure_train(number, to_record(sent, self.task.layout), ConfigRecord(), self.grid)
        replies = self.grid.send_and_receive(messages, timeout=self.config.round_timeout)
        trained = time.perf_counter()
        vector, gated = self._take(number, vector, replies)
        outcome = self.strategy.outcome
        aggregated = time.perf_counter()
        evaluated = number % self.config.eval_every == 0 or number == self.config.num_rounds
        metrics = self.evaluate(vector) if evaluated else None
        end = time.perf_counter()
        malicious, listed = self._malicious(), self.config.malicious_ids
        attacking = [c for c in outcome.sampled if c in malicious and self.schedule.attacks(c, listed, number)]
        if outcome.collusion_failed and not self.config.attack:
            attacking = []
        record = RoundRecord(
            round=number,
            **(_rounded(metrics) if metrics else {"acc": None, "asr": None}),
            seconds=round(end - begin, 4),
            sampled=outcome.sampled,
            malicious=[c for c in outcome.sampled if c in malicious],
            attacking=attacking,
            clients=outcome.clients,
            dropped={str(c): reason for c, reason in sorted(outcome.dropped.items())},
            weights=outcome.weights,
            norms=outcome.norms,
            aggregate_norm=outcome.aggregate_norm,
            model_norm=update_norm(vector),
            skipped=outcome.skipped,
            exposed=outcome.exposed,
            collusion_failed=outcome.collusion_failed,
            sha256=digest(vector),
            seconds_train=round(trained - begin, 4),
            seconds_aggregate=round(aggregated - trained - (gated.seconds if gated else 0.0), 4),
            seconds_evaluate=round(end - aggregated, 4),
            broadcast_norm=None if (noisy := self.strategy.memory.get(BROADCAST)) is None else update_norm(noisy),
            gate=None if gated is None else gated.to_record(),
            seconds_gate=0.0 if gated is None else round(gated.seconds, 4),
        )
        return record, vector

    def _take(self, number: int, vector: Tensor, replies: Iterable[Message]) -> tuple[Tensor, GateRound | None]:
        """Return the model ([params]) after the round's replies, and what the gate said of the candidate."""
        if self.gate is not None:
            self.gate.open()
        self.strategy.aggregate_train(number, replies)
        skipped = self.strategy.outcome.skipped
        vector = vector if skipped else self.strategy.model
        if self.gate is None:
            return vector, None
        vector, self.strategy.memory = self.gate.settle(number, vector, self.strategy.memory, skipped)
        return vector, self.gate.this_round

    def _kept(self) -> tuple[list[int], Tensor] | None:
        updates = self.strategy.outcome.updates
        return None if updates is None else (self.strategy.outcome.clients, updates)

    def _beside(self) -> dict[str, Tensor]:
        """What the rule had besides the updates."""
        outcome, found = self.strategy.outcome, dict[str, Tensor]()
        if outcome.claims is not None:
            found["claims"] = torch.tensor(outcome.claims, dtype=torch.float64)
        if outcome.root_update is not None:
            found["root_update"] = outcome.root_update
        return found

    def _sample(self, available: list[int], number: int) -> list[int]:
        forced = forced_clients(self.schedule, self.config.malicious_ids, number)
        return sample_clients(available, self.config.num_sampled, seed=self.config.seed, round=number, forced=forced)

    def _malicious(self) -> set[int]:
        """The malicious clients: those of the settings and those that say so, but no process that runs as benign."""
        roles = self.population.roles
        listed = {client for client in self.config.malicious_ids if roles.get(client) != "benign"}
        return listed | {client for client, role in roles.items() if role == "malicious"}

    def _wait_for_clients(self) -> None:
        """Wait until every client is here, or the startup timeout; go on with those that are, if any."""
        deadline, wanted = time.monotonic() + self.config.startup_timeout, self.config.num_clients
        while len(here := self.population.refresh(self.grid)) < wanted:
            complete = has_fixed_members(self.grid) and len(here) == len(list(self.grid.get_node_ids()))
            if complete or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if len(here) < min(wanted, self.config.min_replies):
            raise EngineError(f"only {len(here)} of {wanted} clients came up in {self.config.startup_timeout:g} s")
        if len(here) < wanted:
            log(WARNING, "only %d of %d clients are here (num-clients); going on with those", len(here), wanted)
        log(INFO, "%d of %d clients are here", len(here), wanted)

    def _wait_for_enough(self, number: int) -> None:
        """Wait, at most the round's timeout, while fewer clients could be asked than must answer.

        While a network or the SuperLink is away, a run's rounds would all be over, empty, before anybody is back.
        """
        deadline = time.monotonic() + self.config.round_timeout
        wanted = min(self.config.min_replies, self.config.num_clients)
        self.population.refresh(self.grid)
        if self.population.num_free < wanted:
            log(WARNING, "round %d waits for clients: %d are here and free", number, self.population.num_free)
        while self.population.num_free < wanted and time.monotonic() < deadline:
            time.sleep(0.1)
            self.population.refresh(self.grid)

    def _facts(self) -> dict[str, object]:
        dataset = self.task.dataset
        return {
            "dataset": dataset.name,
            "train_samples": len(dataset.train_labels),
            "test_samples": len(dataset.test_labels),
            "num_params": self.task.layout.num_params,
            "client_sizes": [len(share) for share in self.task.partition],
            "clients_here": len(self.population.node_of),
            "malicious_clients": sorted(self._malicious()),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "flwr": importlib.metadata.version("flwr"),
            "numba": _version("numba"),
            "hawthorn": importlib.metadata.version("hawthorn"),
        }


def has_fixed_members(grid: Grid) -> bool:
    """Whether no further node will ever come: so in Flower's simulation and in the in-process engine."""
    return type(grid).__name__ in ("InMemoryGrid", "InProcessGrid")


def _version(package: str) -> str | None:
    """Return an optional package's version: with and without it the last bits of a sum may differ."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _rounded(metrics: Metrics) -> dict[str, float | None]:
    """Return the metrics for the record, None where there is no finite number (a broken model has no loss)."""
    values = dataclasses.asdict(metrics)
    return {k: None if v is None or not math.isfinite(v) else round(v, 6) for k, v in values.items()}
