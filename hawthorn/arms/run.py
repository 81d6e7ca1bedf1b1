"""Running many arms: one after the other here, or several at a time in forked processes of their own.

Each process takes the next arm when it is done with one, and keeps the data set it has loaded. It trains on one thread
and forks nothing, so N processes use N cores. A process that dies costs its arm and is replaced.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, cast

import torch

from hawthorn.arms.perform import How, Outcome, perform
from hawthorn.engines import find_engine
from hawthorn.experiment import Arm
from server.record import RoundRecord
from tasks.errors import ConfigError

GRACE = 15.0  # seconds a process has to write down that it was stopped


@dataclass(frozen=True)
class Events:
    """Who is told what happens; every field may stay as it is."""

    on_begin: Callable[[Arm], None] = lambda arm: None
    on_round: Callable[[Arm, RoundRecord], None] = lambda arm, record: None
    on_message: Callable[[Arm, str], None] = lambda arm, text: None
    on_end: Callable[[Arm, Outcome], None] = lambda arm, outcome: None


def run_arms(
    arms: Sequence[Arm],
    *,
    engine: str = "in_process",
    jobs: int = 1,
    how: How | None = None,
    events: Events | None = None,
) -> dict[str, Outcome]:
    """Run arms, `jobs` at a time, and return how each ended, by label; a failing arm does not stop the others.

    Ctrl-C, or SIGTERM where it raises SystemExit, ends all processes, which mark their records as interrupted.
    """
    if jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    module = find_engine(engine)
    how, events = how or How(), events or Events()
    if jobs == 1 or len(arms) < 2:
        return _run_here(arms, module, how, events)
    if engine.replace("-", "_") != "in_process":
        raise ConfigError(f"--jobs {jobs} runs arms in processes of their own; it works with --engine in_process")
    with _Pool(min(jobs, len(arms)), module, how) as pool:
        return pool.run(arms, events)


def _run_here(arms: Sequence[Arm], module: Any, how: How, events: Events) -> dict[str, Outcome]:
    outcomes = {}
    for arm in arms:
        events.on_begin(arm)
        try:
            outcome = perform(
                arm, module, how, lambda r, a=arm: events.on_round(a, r), lambda t, a=arm: events.on_message(a, t)
            )
        except BaseException:
            events.on_end(arm, Outcome(arm.label, "stopped"))
            raise
        outcomes[arm.label] = outcome
        events.on_end(arm, outcome)
    return outcomes


@dataclass
class _Worker:
    process: ForkProcess
    pipe: Connection
    arm: Arm | None = field(default=None)


class _Pool:
    """Forked processes, each working on one arm at a time."""

    def __init__(self, size: int, module: Any, how: How) -> None:
        self.module, self.how = module, how
        self.workers: list[_Worker] = []
        for _ in range(size):
            self.workers.append(self._fork())

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        for worker in self.workers:
            if worker.process.is_alive() and (kind is not None or worker.arm is not None):
                worker.process.terminate()
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(GRACE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()

    def run(self, arms: Sequence[Arm], events: Events) -> dict[str, Outcome]:
        """Run the arms in order, as processes become free."""
        queue, outcomes = deque(arms), dict[str, Outcome]()
        for worker in self.workers:
            self._give(worker, queue, events)
        try:
            while busy := {w.pipe: w for w in self.workers if w.arm is not None}:
                for pipe in wait(list(busy)):
                    self._take(busy[cast(Connection, pipe)], queue, events, outcomes)
        except BaseException:
            for worker in self.workers:
                if worker.arm is not None:
                    events.on_end(worker.arm, Outcome(worker.arm.label, "stopped"))
            raise
        return {arm.label: outcomes[arm.label] for arm in arms}

    def _take(self, worker: _Worker, queue: deque[Arm], events: Events, outcomes: dict[str, Outcome]) -> None:
        assert worker.arm is not None
        arm = worker.arm
        kind, value = self._receive(worker, arm)
        if kind == "round":
            events.on_round(arm, value)
        elif kind == "message":
            events.on_message(arm, value)
        else:
            outcomes[arm.label] = value
            worker.arm = None
            events.on_end(arm, value)
            self._give(worker, queue, events)

    def _receive(self, worker: _Worker, arm: Arm) -> tuple[str, Any]:
        """Return what a process says; one that died is replaced, and its arm failed."""
        try:
            return worker.pipe.recv()
        except (EOFError, ConnectionResetError):
            worker.process.join()
            code = worker.process.exitcode
        worker.pipe.close()
        worker.process.close()
        fresh = self._fork()
        worker.process, worker.pipe = fresh.process, fresh.pipe
        return "end", Outcome(arm.label, "failed", f"its process ended with exit code {code}")

    def _give(self, worker: _Worker, queue: deque[Arm], events: Events) -> None:
        if not queue:
            return
        worker.arm = queue.popleft()
        events.on_begin(worker.arm)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead process shows when it is read
            worker.pipe.send(worker.arm)

    def _fork(self) -> _Worker:
        here, there = multiprocessing.Pipe()
        others = [here, *(worker.pipe for worker in self.workers if not worker.pipe.closed)]
        process = multiprocessing.get_context("fork").Process(target=_work, args=(there, others, self.module, self.how))
        process.start()
        there.close()
        return _Worker(process, here)


def _work(pipe: Connection, others: list[Connection], module: Any, how: How) -> None:
    """A process's life: run the arms that come until the pipe closes, or until it is told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which stops the others
    signal.signal(signal.SIGTERM, _stop)
    for other in others:
        other.close()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"

    def send(kind: str, value: object) -> None:
        try:
            pipe.send((kind, value))
        except (BrokenPipeError, ConnectionResetError):
            sys.exit(1)  # nobody listens any more: the record says "interrupted"

    while True:
        try:
            arm: Arm = pipe.recv()
        except (EOFError, ConnectionResetError):
            return
        if arm.config is not None:
            arm = replace(arm, config=arm.config.replace(workers=1))
        send("end", perform(arm, module, how, lambda r: send("round", r), lambda text: send("message", text)))


def _stop(number: int, _: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once is enough: the record is being written
    sys.exit(128 + number)
