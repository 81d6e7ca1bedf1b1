"""What all faults share: a run in a thread whose rounds are waited for, and the row of the table it ends in."""

import json
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from hawthorn.engines import cluster, in_process
from hawthorn.engines.cluster import Cluster
from server.record import RoundRecord, RunRecord, read_run
from tasks.config import RunConfig
from tasks.errors import EngineError

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, CLIENTS, TIMEOUT = 6, 4, 12.0


@dataclass
class Row:
    """One fault: what was seen, what was lost (nothing finished may be), seconds until rounds went on."""

    fault: str
    seen: str
    lost: str
    seconds: float | None
    passed: bool


@dataclass
class Run:
    """A run in a thread: its rounds as they came, its messages, its error."""

    config: RunConfig
    make: type[Cluster] | None = None
    engine: str = "cluster"
    times: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    error: Exception | None = None

    def start(self) -> "Run":
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def wait_round(self, number: int, seconds: float = 180.0) -> None:
        """Wait until a round is finished."""
        deadline = time.monotonic() + seconds
        while len(self.times) < number:
            if time.monotonic() > deadline or not self.thread.is_alive():
                raise EngineError(f"round {number} did not come: {self.error or self.messages}")
            time.sleep(0.02)

    def join(self, seconds: float = 240.0) -> RunRecord:
        """Wait for the end; return the record."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            raise EngineError(f"the run did not end within {seconds:g} s")
        if self.error is not None and not (self.config.run_folder / "run.json").exists():
            raise self.error
        return read_run(self.config.run_folder)

    def pids(self) -> dict[str, object]:
        return json.loads((self.config.run_folder / "cluster.json").read_text())

    def _work(self) -> None:
        try:
            if self.engine == "cluster":
                cluster.run(self.config, self._note, self.messages.append, self.make)
            else:
                in_process.run(self.config, self._note, self.messages.append)
        except Exception as error:
            self.error = error

    def _note(self, record: RoundRecord) -> None:
        self.times.append(time.monotonic())


def settings(folder: Path, name: str, **changes: bool | int | float | str) -> RunConfig:
    """Return a federation that takes about a second a round."""
    base = RunConfig(
        runs_dir=str(folder), num_clients=CLIENTS, num_rounds=ROUNDS, rule="geometric_median()",
        training="sgd(lr=0.5, epochs=8, batch_size=16)", round_timeout=TIMEOUT, startup_timeout=90.0, workers=1,
    )  # fmt: skip
    return base.replace(name=name, **changes)


def clean(config: RunConfig) -> str:
    """Return the hash of the model that the run ends with when nothing happens to it."""
    quiet = config.replace(name=f"{config.name}-clean", resume=False, gate_service="", round_timeout=600.0)
    in_process.run(quiet)
    return str(read_run(quiet.run_folder).facts["sha256"])


def complete(record: RunRecord) -> bool:
    """Whether a run is finished and has every round once, in order."""
    return record.status == "finished" and [r.round for r in record.rounds] == list(
        range(1, record.config.num_rounds + 1)
    )


def reasons(record: RunRecord) -> str:
    """Return the first reason for which each client was dropped, and in how many rounds."""
    found: dict[str, list[str]] = {}
    for r in record.rounds:
        for client, reason in r.dropped.items():
            found.setdefault(client, []).append(reason)
    return "; ".join(f"client {c} dropped in {len(all_)} rounds: {all_[0][:60]}" for c, all_ in found.items())
