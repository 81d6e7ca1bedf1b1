"""`hawthorn run`, `--resume`, and reading run folders back."""

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from hawthorn.engines import find_engine
from hawthorn.experiment import read_experiment, read_overrides
from hawthorn.preflight import preflight
from server.record import RoundRecord, RunRecord, read_run, set_aside
from tasks.config import RunConfig
from tasks.errors import EngineError, RecordError


def run(
    console: Console,
    file: str | None,
    pairs: Sequence[str],
    given: dict[str, Any],
    engine: str,
    *,
    name: str | None,
    arm: str | None,
    report: bool,
    verbose: bool,
) -> None:
    """Run every arm of an experiment, print the outcome, write the report."""
    module = find_engine(engine)
    experiment = read_experiment(file, {**read_overrides(pairs), **given}, name=name, arm=arm)
    configs = [c.replace(runs_dir=str(Path(c.runs_dir).expanduser().resolve())) for c in experiment.runs]
    console.print(f"{experiment.title}  [{engine}]", style="bold")
    for config in configs:
        for warning in preflight(config):
            console.print(f"{config.name}: {warning}", style="yellow", soft_wrap=True)
    for config in configs:
        if aside := set_aside(config.run_folder):
            console.print(f"an earlier run of that name is now {aside}", soft_wrap=True)
    records = [_run_one(console, module, config, verbose) for config in configs]
    _finish(console, records, experiment.title, experiment.folder if report else None)


def resume(
    console: Console,
    folder: Path,
    pairs: Sequence[str],
    given: dict[str, Any],
    engine: str,
    *,
    report: bool,
    verbose: bool,
) -> None:
    """Continue the unfinished runs in a folder from their last finished round."""
    module = find_engine(engine)
    changes = {**read_overrides(pairs), **given}
    records = []
    for before in read_all([folder]):
        home = before.folder.resolve()
        depth = len(Path(before.config.name).parts)
        values = {**before.config.settings(), **changes, "runs-dir": str(home.parents[depth - 1]), "resume": True}
        config = RunConfig.read({**values, "name": str(home.relative_to(home.parents[depth - 1]))})
        if before.status == "finished" and len(before.rounds) >= config.num_rounds:
            console.print(f"{config.name}: finished after {len(before.rounds)} rounds, nothing to do")
            records.append(before)
            continue
        console.print(f"{config.name}: {len(before.rounds)} of {config.num_rounds} rounds are done, going on")
        records.append(_run_one(console, module, config, verbose, done=len(before.rounds)))
    _finish(console, records, records[0].config.name, folder if report else None)


def read_all(folders: Sequence[Path]) -> list[RunRecord]:
    """Read run folders; a folder of an experiment stands for the runs in it, by time of start."""
    records: list[RunRecord] = []
    for folder in folders:
        inside = sorted(folder.glob("*/run.json"), key=lambda p: p.stat().st_ctime) if folder.is_dir() else []
        if (folder / "run.json").exists() or not inside:
            records.append(read_run(folder))
        else:
            records.extend(read_run(path.parent) for path in inside)
    return records


def write(records: list[RunRecord], out: Path, title: str | None = None) -> Path:
    """Write the HTML report (matplotlib is loaded only here)."""
    from hawthorn.report import write_report

    return write_report(records, out, title)


def _run_one(console: Console, module: Any, config: RunConfig, verbose: bool, done: int = 0) -> RunRecord:
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.ERROR)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    begin, told = time.perf_counter(), set()
    with Progress(
        *columns, TextColumn("{task.fields[status]}"), console=console, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task(config.name, total=config.num_rounds, completed=done, status="starting")

        def on_round(record: RoundRecord) -> None:
            progress.update(bar, completed=record.round, status=_line(record))
            if record.skipped or record.dropped:
                _tell_drops(progress.console, record, told)
            if not console.is_terminal:
                console.print(
                    f"{config.name}  round {record.round}/{config.num_rounds}  {_line(record)}", soft_wrap=True
                )

        try:
            module.run(config, on_round, lambda text: progress.console.print(text, soft_wrap=True))
        except KeyboardInterrupt:
            progress.stop()
            console.print(f"stopped; go on with: hawthorn run --resume {config.run_folder}", soft_wrap=True)
            raise
    record = read_run(config.run_folder)
    if record.status != "finished":
        raise EngineError(f"the run is {record.status} after {len(record.rounds)} rounds; see {config.run_folder}")
    console.print(
        f"{config.name}: {len(record.rounds)} rounds in {time.perf_counter() - begin:.1f} s -> {config.run_folder}",
        soft_wrap=True,
    )
    return record


def _doubts(record: RunRecord) -> list[str]:
    """What makes a run's figures mean less than they seem to."""
    doubts, rounds = [], record.rounds
    if rounds and all(r.skipped for r in rounds):
        doubts.append(f"every round was skipped, the model was never trained: {rounds[-1].skipped}")
    attacks = [(r, client) for r in rounds for client in r.attacking]
    if attacks and all(str(client) in r.dropped for r, client in attacks):
        doubts.append("every attacking client's reply was dropped, so the attack had no part in the result")
    here = record.facts.get("clients_here", record.config.num_clients)
    if here < record.config.num_clients:
        doubts.append(f"only {here} of {record.config.num_clients} clients took part")
    return doubts


def _line(record: RoundRecord) -> str:
    parts = [
        f"{label} {100 * value:6.2f} %"
        for label, value in (("ACC", record.acc), ("ASR", record.asr))
        if value is not None
    ]
    return "  ".join([*parts, f"{record.seconds:.2f} s"])


def _tell_drops(console: Console, record: RoundRecord, told: set[tuple[str, str]]) -> None:
    """Print drops and skips; what happens to a client again and again is printed the first time only."""
    for client, reason in record.dropped.items():
        if (kind := (client, reason[:24])) not in told:
            told.add(kind)
            text = f"round {record.round}: client {client} dropped: {reason}"
            console.print(text, style="yellow", soft_wrap=True)
    if record.skipped:
        text = f"round {record.round} skipped: {record.skipped}"
        console.print(text, style="yellow", soft_wrap=True)


def _finish(console: Console, records: list[RunRecord], title: str, folder: Path | None) -> None:
    if not records:
        raise RecordError("there is no run to report")
    for attack in dict.fromkeys(record.config.attack for record in records if record.config.attack):
        console.print(f"attack: {attack}", soft_wrap=True)
    table = Table("run", "rule", "ACC", "ASR", "rounds", "dropped", "skipped")
    for record in records:
        last = record.final
        rates = [None, None] if last is None else [last.acc, last.asr]
        table.add_row(
            record.name,
            record.config.rule,
            *("-" if rate is None else f"{100 * rate:.2f} %" for rate in rates),
            str(len(record.rounds)),
            str(sum(len(r.dropped) for r in record.rounds)),
            str(sum(r.skipped is not None for r in record.rounds)),
        )
    console.print(table)
    for record in records:
        for warning in _doubts(record):
            console.print(f"{record.name}: {warning}", style="bold yellow", soft_wrap=True)
    for record in records:
        last = record.final
        if last is not None and last.acc is not None:
            asr = "" if last.asr is None else f" ASR={100 * last.asr:.2f}"
            print(f"{record.name}: ACC={100 * last.acc:.2f}{asr} sha256={record.facts.get('sha256', '')}")
    sys.stdout.flush()
    if folder is not None:
        console.print(f"report: {write(records, folder / 'report.html', title)}", soft_wrap=True)
