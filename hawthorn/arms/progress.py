"""What a terminal shows while arms run: one line per arm, or an overall line and those that run now."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.arms.run import Events
from hawthorn.experiment import Arm
from server.record import RoundRecord

MOST_LINES = 24  # arms that all get a line of their own; of more, only the running ones


class Display:
    """Turns what arms tell into lines: moving bars on a terminal, plain lines elsewhere."""

    def __init__(self, console: Console, progress: Progress, arms: list[Arm]) -> None:
        self.console, self.progress = console, progress
        self.many = len(arms) > MOST_LINES
        self.lines: dict[str, TaskID] = {}
        self.done, self.total = 0, len(arms)
        self.begun: dict[str, float] = {}
        self.told: set[tuple[str, str, str]] = set()
        self.overall = progress.add_task(f"{len(arms)} runs", total=len(arms), status="") if len(arms) > 1 else None
        if not self.many:
            for arm in arms:
                self._line(arm, "waiting")

    @property
    def events(self) -> Events:
        """Who to call."""
        return Events(self._begin, self._round, self._message, self._end)

    def _line(self, arm: Arm, status: str) -> TaskID:
        if arm.label not in self.lines:
            total = arm.config.num_rounds if arm.config else 0
            name = arm.config.name if arm.config else arm.label
            self.lines[arm.label] = self.progress.add_task(name, total=total, status=status, start=False)
        return self.lines[arm.label]

    def _begin(self, arm: Arm) -> None:
        line = self._line(arm, "starting")
        self.begun[arm.label] = time.perf_counter()
        self.progress.start_task(line)
        self.progress.update(line, status="starting")

    def _round(self, arm: Arm, record: RoundRecord) -> None:
        self.progress.update(self._line(arm, ""), completed=record.round, status=round_line(record))
        if arm.config is None:
            return
        if not self.many:
            self._tell_drops(arm, record)
        if not self.console.is_terminal and not self.many:
            text = f"{arm.config.name}  round {record.round}/{arm.config.num_rounds}  {round_line(record)}"
            self.console.print(text, soft_wrap=True)

    def _message(self, arm: Arm, text: str) -> None:
        self.progress.console.print(text, soft_wrap=True)

    def _end(self, arm: Arm, outcome: Outcome) -> None:
        self.done += 1
        line = self._line(arm, "")
        self.progress.stop_task(line)
        self.progress.update(line, status=outcome.status)
        if self.overall is not None:
            self.progress.update(self.overall, completed=self.done)
        if self.many:
            self.progress.remove_task(self.lines.pop(arm.label))
        for text, style in self._ending(arm, outcome):
            self.progress.console.print(text, style=style, soft_wrap=True)

    def _ending(self, arm: Arm, outcome: Outcome) -> Iterator[tuple[str, str]]:
        name = arm.config.name if arm.config else arm.label
        place = arm.config.run_folder if arm.config else ""
        if outcome.status == "failed":
            yield f"{name}: failed: {outcome.error}", "bold red"
        elif outcome.status == "stopped":
            yield f"{name}: stopped; go on with: hawthorn run --resume {place}", ""
        elif self.many:
            if not self.console.is_terminal and self.done % 25 == 0:
                yield f"{self.done} of {self.total} runs are done", ""
        elif outcome.status == "kept":
            yield f"{name}: finished before, kept -> {place}", ""
        elif outcome.status == "undefined":
            yield f"{name}: not defined: {outcome.error}", "yellow"
        elif arm.config:
            seconds = time.perf_counter() - self.begun.get(arm.label, time.perf_counter())
            yield f"{name}: {arm.config.num_rounds} rounds in {seconds:.1f} s -> {place}", ""

    def _tell_drops(self, arm: Arm, record: RoundRecord) -> None:
        """Print drops and skips; what happens to a client again and again is printed the first time only."""
        for client, reason in record.dropped.items():
            if (kind := (arm.label, client, reason[:24])) not in self.told:
                self.told.add(kind)
                self._warn(f"round {record.round}: client {client} dropped: {reason}")
        if record.skipped and (kind := (arm.label, "skip", record.skipped[:24])) not in self.told:
            self.told.add(kind)
            self._warn(f"round {record.round} skipped: {record.skipped}")

    def _warn(self, text: str) -> None:
        self.progress.console.print(text, style="yellow", soft_wrap=True)


@contextmanager
def display(console: Console, arms: list[Arm]) -> Iterator[Events]:
    """Show the progress of arms; yields the events to hand to `run_arms`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Display(console, progress, arms).events


def round_line(record: RoundRecord) -> str:
    """Return a round's figures as text."""
    rates = (("ACC", record.acc), ("ASR", record.asr))
    parts = [f"{label} {100 * value:6.2f} %" for label, value in rates if value is not None]
    return "  ".join([*parts, f"{record.seconds:.2f} s"])


def tell_earlier(console: Console, arms: list[Arm]) -> None:
    """Say what of an experiment is done already."""
    states = [(arm, *earlier_run(arm.config)) for arm in arms if arm.config is not None]
    if kept := sum(state == "finished" for _, state, _ in states):
        console.print(f"{kept} of {len(arms)} runs are finished already")
    for arm, state, done in states:
        if state == "begun" and arm.config:
            console.print(f"{arm.config.name}: {done} of {arm.config.num_rounds} rounds are done, going on")
