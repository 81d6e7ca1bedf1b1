"""`hawthorn reproduce NAME`: run a paper's table, and set our numbers beside the paper's; or draw a paper's figure."""

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from hawthorn.commands.runs import quiet_flower, raise_failures, run_start
from hawthorn.experiment import Arm, distinct
from hawthorn.overrides import read_overrides
from tasks.errors import ConfigError

console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)


def reproduce(
    name: Annotated[str | None, typer.Argument(help="Which table or figure, such as flip-table2 or crfl-fig2.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show what there is, and its rows.")] = False,
    dataset: Annotated[str | None, typer.Option(help="Which of its data sets; default: the first.")] = None,
    jobs: Annotated[int, typer.Option(help="Rows that run at a time; 0: one per core.")] = 0,
    rows: Annotated[str | None, typer.Option(help="Rows by name, with commas; all: the extra ones too.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of every row, in place of the paper's.")] = None,
    seeds: Annotated[str, typer.Option("--seeds", "--seed", help="Seeds, with commas.")] = "1",
    runs_dir: Annotated[str | None, typer.Option(help="Folder that holds run folders.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Run finished rows again.")] = False,
    show: Annotated[bool, typer.Option("--show", help="Run nothing: show what is finished.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's log.")] = False,
) -> None:
    """Run a paper's table, our numbers beside the paper's, or its figure: as table, CSV, Markdown and picture.

    Finished rows are not run again; an interrupted call goes on where it stopped.
    """
    if list_ or name is None:
        console.print(_studies())
        return
    from hawthorn.reproduce.results import result_table, write_results
    from hawthorn.reproduce.study import read_rows, read_study

    quiet_flower(verbose)
    overrides = _overrides(set_ or [], rounds, runs_dir, data_dir)
    wanted = [row.strip() for row in rows.split(",") if row.strip()] if rows else []
    study = read_study(name, overrides, dataset=dataset, rows=wanted, seeds=_seeds(seeds))
    console.print(study.first.title + (f"  [{study.first.variant}]" if study.first.variant else ""), style="bold")
    outcomes = {} if show else _run(study, jobs or os.cpu_count() or 1, fresh)
    if (robust := _measure(study, outcomes)) is not None:
        written = robust
    elif study.figure is None:
        rows_found = read_rows(study, outcomes)
        console.print(result_table(study, rows_found))
        written = write_results(study, rows_found)
        if study.theory is not None:
            written |= _check(study)
    else:
        written = _draw(study, outcomes)
    for kind, path in written.items():
        console.print(f"{kind}: {path}", soft_wrap=True)
    if outcomes:
        arms = [dataclasses.replace(arm, label=label) for label, arm in _arms(study).items()]
        raise_failures(arms, outcomes)


def _check(study: Any) -> dict[str, Path]:
    """Check the theory on the finished rows; print and write what comes of it."""
    from hawthorn.reproduce.study import check_theory
    from hawthorn.reproduce.theory_results import theory_tables, write_theory

    found = check_theory(study)
    for table in theory_tables(found):
        console.print(table)
    return write_theory(study.folder, study.first.title, found)


def _measure(study: Any, outcomes: dict[str, Any]) -> dict[str, Path] | None:
    """Print and write what a study of robustness came to; None for any other study."""
    from hawthorn.reproduce.robustness import measure_robustness, read_robustness
    from hawthorn.reproduce.robustness_results import robustness_table, write_robustness

    if (shown := read_robustness(study)) is None:
        return None
    found = measure_robustness(study, shown, outcomes)
    console.print(robustness_table(study, found))
    return write_robustness(study, shown, found)


def _draw(study: Any, outcomes: dict[str, Any]) -> dict[str, Path]:
    """Certify, or compare, the finished runs of a figure; print and write what comes of it."""
    from hawthorn.reproduce.figure_results import measure, write_figure
    from hawthorn.reproduce.figure_tables import figure_table

    if study.figure.kind == "attacks":
        from hawthorn.reproduce.attack_curves import curves_table, read_curves, verdicts_of, write_curves

        curves = read_curves(study, outcomes)
        verdicts = verdicts_of(study, curves)
        console.print(*curves_table(curves, verdicts), sep="\n")
        return write_curves(study, curves, verdicts)
    found = measure(study, outcomes, lambda text: console.print(text, soft_wrap=True))
    console.print(figure_table(study, found))
    return write_figure(study, found)


def _arms(study: Any) -> dict[str, Arm]:
    """Return the arms of all seeds by the name of their run; rows that read one run share it."""
    arms = distinct(arm for label in study.rows for arm in study.arms(label))
    several = len(study.seeds) > 1
    named = {}
    for arm in arms:
        seed = f", seed {arm.config.seed}" if several and arm.config else ""
        named[arm.config.name if arm.config else arm.label] = dataclasses.replace(arm, title=arm.shown + seed)
    return named


def _run(study: Any, jobs: int, fresh: bool) -> dict[str, Any]:
    """Run the pretraining of each seed, then the rows of all seeds; return how each ended, by the name of its run."""
    from hawthorn.arms.perform import How
    from hawthorn.arms.progress import display, tell_earlier
    from hawthorn.arms.run import run_arms

    arms = [dataclasses.replace(arm, label=label) for label, arm in _arms(study).items()]
    if not fresh:
        tell_earlier(console, arms)
    for experiment in study.experiments:
        run_start(console, experiment, jobs=jobs)
    with display(console, arms) as events:
        how = How(keep=not fresh, shared=study.figure is not None)  # figures share arms
        return run_arms(arms, jobs=jobs, how=how, events=events)


def _overrides(pairs: list[str], rounds: int | None, runs_dir: str | None, data_dir: str | None) -> dict[str, Any]:
    overrides = read_overrides(pairs)
    if rounds is not None:
        overrides["num-rounds"] = rounds
    for key, path in (("runs-dir", runs_dir), ("data-dir", data_dir)):
        if path:
            overrides[key] = os.path.abspath(os.path.expanduser(path))
    return overrides


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds wants whole numbers with commas, got {text!r}") from None


def _studies() -> Table:
    from hawthorn.experiment import read_experiment
    from hawthorn.reproduce.study import shipped_studies

    table = Table("name", "what it is", "data sets", "rows", "extra rows")
    for name, path in shipped_studies().items():
        experiment = read_experiment(str(path), {}, lenient=True)
        table.add_row(
            name,
            experiment.title,
            ", ".join(experiment.variants),
            ", ".join(arm.label for arm in experiment.arms if not arm.extra),
            ", ".join(arm.label for arm in experiment.arms if arm.extra),
        )
    return table
