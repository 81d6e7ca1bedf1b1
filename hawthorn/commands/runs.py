"""`hawthorn run`, `--resume`, and reading run folders back."""

import logging
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hawthorn.arms.perform import How, Outcome
from hawthorn.arms.progress import display, tell_earlier
from hawthorn.arms.run import run_arms
from hawthorn.engines import REMOTE, find_engine
from hawthorn.experiment import Arm, Experiment, distinct, read_experiment
from hawthorn.overrides import read_overrides
from hawthorn.preflight import preflight
from server.record import RunRecord, read_run
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
    variant: str | None = None,
    jobs: int = 1,
    keep: bool = False,
    report: bool,
    verbose: bool,
) -> None:
    """Run every arm of an experiment, print the outcome, write the report; `keep` what is finished already."""
    find_engine(engine)
    overrides = {**read_overrides(pairs), **given}
    experiment = read_experiment(file, overrides, name=name, arm=arm, variant=variant)
    console.print(f"{experiment.title}  [{engine}]", style="bold")
    quiet_flower(verbose)
    arms = distinct(a for a in experiment.arms if arm or not a.extra)  # an extra arm runs when it is named
    if not experiment.axes:
        for config in experiment.runs:
            checked = config.replace(from_model="") if experiment.start else config
            for warning in preflight(checked, elsewhere=engine in REMOTE):
                console.print(f"{config.name}: {warning}", style="yellow", soft_wrap=True)
    if keep:
        tell_earlier(console, arms)
    run_start(console, experiment, engine, jobs if jobs > 1 else 0)
    how = How(keep=keep, check=bool(experiment.axes))
    begin = time.perf_counter()
    with display(console, arms) as events:
        outcomes = run_arms(arms, engine=engine, jobs=jobs, how=how, events=events)
    if experiment.axes:
        _finish_grid(console, experiment, outcomes, report, time.perf_counter() - begin)
    else:
        done = [a.config for a in arms if outcomes[a.label].has_record and a.config]
        if not done:
            raise EngineError(f"no run finished: {next(iter(outcomes.values())).error}")
        folder = experiment.folder if report else None
        _finish(console, [read_run(config.run_folder) for config in done], experiment.title, folder)
    raise_failures(arms, outcomes)


def _finish_grid(
    console: Console, experiment: Experiment, outcomes: dict[str, Outcome], report: bool, seconds: float
) -> None:
    """Print what a grid came to; write its table and, where it has a map, the pictures and the page."""
    from hawthorn.heatmap import cell_text, read_cells, tables

    counts = Counter(outcome.status for outcome in outcomes.values())
    said = ", ".join(f"{number} {status}" for status, number in counts.items())
    console.print(f"{len(outcomes)} runs for {len(experiment.points)} points in {seconds:.0f} s: {said}")
    if experiment.map is not None:
        found, _ = tables(experiment, read_cells(experiment, outcomes))
        table = Table(experiment.map.rows, title=found.title, title_justify="left")
        for column in found.columns:
            table.add_column(f"{experiment.map.columns} = {column}", justify="right")
        for row in found.rows:
            table.add_row(row, *(cell_text(found.cells[row, column]) for column in found.columns))
        console.print(table)
    if report:
        from hawthorn.report.map_page import write_map

        for path in write_map(experiment, outcomes).values():
            console.print(f"{path.name}: {path}", soft_wrap=True)


def run_start(console: Console, experiment: Experiment, engine: str = "in_process", jobs: int = 0) -> None:
    """Run the pretraining that all arms of an experiment start from, unless it is there already."""
    if experiment.start is None or experiment.start.config is None:
        return
    config = experiment.start.config.replace(workers=experiment.start.config.workers or max(jobs, 0))
    start = Arm(experiment.start.label, config, title=experiment.start.title)
    with display(console, [start]) as events:
        outcome = run_arms([start], engine=engine, how=How(keep=True, shared=True), events=events)[start.label]
    if not outcome.has_record:
        raise EngineError(f"the pretraining that all runs start from failed: {outcome.error}")


def raise_failures(arms: Sequence[Arm], outcomes: dict[str, Outcome]) -> None:
    """Raise `EngineError` that names the arms that failed, if any did."""
    failed = [(arm.shown, outcomes[arm.label].error) for arm in arms if outcomes[arm.label].status == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more: {', '.join(name for name, _ in failed[1:9])})" if len(failed) > 1 else ""
        name = f"{failed[0][0]}: " if failed[0][0] else ""
        raise EngineError(f"{len(failed)} of {len(arms)} runs failed; {name}{failed[0][1]}{more}")


def quiet_flower(verbose: bool) -> None:
    """Let Flower log, or keep it to its errors."""
    logging.getLogger("flwr").setLevel(logging.INFO if verbose else logging.ERROR)


def resume(
    console: Console,
    folder: Path,
    pairs: Sequence[str],
    given: dict[str, Any],
    engine: str,
    *,
    jobs: int = 1,
    report: bool,
    verbose: bool,
) -> None:
    """Continue the unfinished runs in a folder from their last finished round."""
    find_engine(engine)
    quiet_flower(verbose)
    changes = {**read_overrides(pairs), **given}
    arms: list[Arm] = []
    for before in read_all([folder]):
        home = before.folder.resolve()
        depth = len(Path(before.config.name).parts)
        values = {**before.config.settings(), **changes, "runs-dir": str(home.parents[depth - 1]), "resume": True}
        config = RunConfig.read({**values, "name": str(home.relative_to(home.parents[depth - 1]))})
        arms.append(Arm(config.name, config))
        if before.status == "finished" and len(before.rounds) >= config.num_rounds:
            console.print(f"{config.name}: finished after {len(before.rounds)} rounds, nothing to do")
        else:
            console.print(f"{config.name}: {len(before.rounds)} of {config.num_rounds} rounds are done, going on")
    todo = [arm for arm in arms if arm.config and not _is_done(arm.config)]
    outcomes: dict[str, Outcome] = {}
    if todo:
        with display(console, todo) as events:
            outcomes = run_arms(todo, engine=engine, jobs=jobs, how=How(resume=True, check=False), events=events)
    records = [read_run(arm.config.run_folder) for arm in arms if arm.config]
    _finish(console, records, records[0].config.name, folder if report else None)
    raise_failures(todo, outcomes)


def _is_done(config: RunConfig) -> bool:
    before = read_run(config.run_folder)
    return before.status == "finished" and len(before.rounds) >= config.num_rounds


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


def _doubts(record: RunRecord) -> list[str]:
    """What makes a run's figures mean less than they seem to."""
    doubts, rounds = [], record.rounds
    if rounds and all(r.skipped for r in rounds):
        doubts.append(f"every round was skipped, the model was never trained: {rounds[-1].skipped}")
    attacks = [(r, client) for r in rounds for client in r.attacking]
    if attacks and all(str(client) in r.dropped for r, client in attacks):
        doubts.append("every attacking client's reply was dropped, so the attack had no part in the result")
    if failed := [r for r in rounds if r.collusion_failed]:
        doubts.append(f"the attackers could not collude in {len(failed)} rounds: {failed[-1].collusion_failed}")
    here = record.facts.get("clients_here", record.config.num_clients)
    if here < record.config.num_clients:
        doubts.append(f"only {here} of {record.config.num_clients} clients took part")
    return doubts


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
