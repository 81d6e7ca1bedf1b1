"""Running one arm: kept when it is finished with the same settings, resumed when it was interrupted, else run."""

import contextlib
import dataclasses
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hawthorn.experiment import MACHINE, Arm
from hawthorn.preflight import preflight
from server.record import RoundRecord, RunRecord, read_run
from server.writer import set_aside
from tasks.config import RunConfig
from tasks.errors import AggregationError, EngineError, HawthornError, RecordError

Status = Literal["finished", "kept", "undefined", "failed", "stopped"]
LOCKED = "another process is writing"
POLL = 1.0  # seconds between looks at a run that another process writes


@dataclass(frozen=True)
class Outcome:
    """How an arm ended. `undefined`: its rule refuses its numbers of clients; `kept`: an earlier run serves."""

    label: str
    status: Status
    error: str = ""
    seconds: float = 0.0  # of this call

    @property
    def has_record(self) -> bool:
        """Whether the arm's folder holds a finished run of its settings."""
        return self.status in ("finished", "kept")


@dataclass(frozen=True)
class How:
    """What all arms of a call share: whether earlier runs may serve, how they run, and what is checked before."""

    keep: bool = False  # keep what is finished, go on with what was interrupted
    resume: bool = False  # go on with every arm; one with other settings is refused
    check: bool = True  # try everything once before the first round
    shared: bool = False  # another process may run the same arm now: wait for it


def differing(before: RunConfig, now: RunConfig) -> list[str]:
    """Return the settings that touch a run's numbers and differ, `num-rounds` left out."""
    names = [f.name for f in dataclasses.fields(RunConfig) if f.name not in MACHINE and f.name != "num_rounds"]
    return [name.replace("_", "-") for name in names if getattr(before, name) != getattr(now, name)]


def earlier_run(config: RunConfig) -> tuple[Literal["none", "finished", "begun"], int]:
    """Return what the run's folder holds of these very settings, and how many rounds of it are done."""
    try:
        before = read_run(config.run_folder)
    except RecordError:
        return "none", 0
    done = len(before.rounds)
    if differing(before.config, config) or done > config.num_rounds:
        return "none", 0
    if before.status == "finished" and done == config.num_rounds:
        return ("finished", done) if (before.folder / "model.safetensors").exists() else ("none", 0)
    return "begun", done


def perform(
    arm: Arm,
    engine: Any,
    how: How,
    on_round: Callable[[RoundRecord], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Outcome:
    """Run an arm on an engine's module; errors become its outcome, Ctrl-C and the end of the process do not."""
    begin = time.perf_counter()
    if arm.config is None:
        return Outcome(arm.label, "failed", arm.problem)
    note = arm.config.run_folder / "error.txt"
    try:
        status: Status = _perform(arm.config, engine, how, on_round, on_message)
        note.unlink(missing_ok=True)
        return Outcome(arm.label, status, "", time.perf_counter() - begin)
    except Exception as error:  # an arm's failure is its own: the others go on
        undefined = isinstance(error, AggregationError) or isinstance(error.__context__, AggregationError)
        text = str(error)
        if not isinstance(error, HawthornError):
            text = f"{type(error).__name__}: {error}"
            if note.parent.is_dir():
                with contextlib.suppress(OSError):
                    note.write_text(traceback.format_exc())
                    text += f"; see {note}"
        return Outcome(arm.label, "undefined" if undefined else "failed", text, time.perf_counter() - begin)


def _perform(
    config: RunConfig,
    engine: Any,
    how: How,
    on_round: Callable[[RoundRecord], None] | None,
    on_message: Callable[[str], None] | None,
) -> Status:
    while True:
        state = "begun" if how.resume else earlier_run(config)[0] if how.keep else "none"
        if state == "finished":
            return "kept"
        if how.check:
            warnings = preflight(config)
            for text in warnings if on_message else ():
                on_message(f"{config.name}: {text}")  # type: ignore[misc]
        try:
            if state == "none" and (aside := set_aside(config.run_folder)) and on_message:
                on_message(f"an earlier run of that name is now {aside}")
            engine.run(config.replace(resume=state == "begun"), on_round, on_message)
        except RecordError as error:
            if not (how.shared and str(error).startswith(LOCKED)):
                raise
            time.sleep(POLL)
            continue
        return _ended(config.run_folder)


def _ended(folder: Path) -> Status:
    record: RunRecord = read_run(folder)
    if record.status != "finished":
        raise EngineError(f"the run is {record.status} after {len(record.rounds)} rounds; see {folder}")
    return "finished"
