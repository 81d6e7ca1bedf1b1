"""The result of a grid: what every point came to, and the worst over one axis.

The worst over the attacks, by rule and number of malicious clients, is the picture by which robust rules are compared
(ByzFL's "aggregated heat map"). The lowest accuracy is the worst, or the highest attack success rate.
"""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from hawthorn.arms.perform import Outcome
from hawthorn.compare import DASH
from hawthorn.experiment import Experiment
from hawthorn.grid import Map
from server.record import RunRecord, read_run
from tasks.config import RunConfig
from tasks.errors import RecordError

State = Literal["done", "undefined", "failed", "missing"]
RATES = {"acc": "accuracy (ACC), %", "asr": "attack success rate (ASR), %"}


@dataclass(frozen=True)
class Cell:
    """A point of the grid, or the worst of several: its rate in [0, 1], None unless `state` is "done"."""

    state: State
    rate: float | None = None
    acc: float | None = None
    asr: float | None = None
    by: str = ""  # of the worst: the label it was found at
    partial: bool = False  # of the worst: some points failed, so that it may be worse
    error: str = ""
    run: str = ""


def read_cells(experiment: Experiment, outcomes: Mapping[str, Outcome]) -> dict[tuple[str, ...], Cell]:
    """Return a cell per point of the grid (one label per axis), from the records of the finished runs."""
    value = experiment.map.value if experiment.map else "acc"
    arms = {arm.label: arm for arm in experiment.arms}
    cells = {
        label: _read_cell(arms[label].config, arms[label].problem, outcomes.get(label), value)
        for label in dict.fromkeys(experiment.points.values())
    }
    return {point: cells[label] for point, label in experiment.points.items()}


def _read_cell(config: RunConfig | None, problem: str, outcome: Outcome | None, value: str) -> Cell:
    if config is None:
        return Cell("failed", error=problem)
    if outcome is not None and not outcome.has_record:
        return Cell("undefined" if outcome.status == "undefined" else "failed", error=outcome.error, run=config.name)
    try:
        record: RunRecord = read_run(config.run_folder)
    except RecordError as error:
        return Cell("missing", error=str(error), run=config.name)
    last = record.final
    if last is None or (rate := getattr(last, value)) is None:
        return Cell("failed", error=f"the run has no {value.upper()}", run=config.name)
    return Cell("done", rate, last.acc, last.asr, run=config.name)


def worst(cells: Mapping[str, Cell], value: str) -> Cell:
    """Return the worst of the cells at these labels: the lowest accuracy, or the highest attack success rate."""
    sign = 1 if value == "acc" else -1
    done = {label: cell for label, cell in cells.items() if cell.rate is not None}
    if done:
        label = min(done, key=lambda name: sign * (done[name].rate or 0.0))
        same = len(done) > 1 and len({cell.run for cell in done.values()}) == 1  # one run serves all of them
        broken = any(cell.state in ("failed", "missing") for cell in cells.values())
        return Cell("done", done[label].rate, by="" if same else label, partial=broken, run=done[label].run)
    states = [cell.state for cell in cells.values()]
    state: State = "undefined" if states and all(s == "undefined" for s in states) else "failed"
    return Cell(state, error=next((cell.error for cell in cells.values() if cell.error), ""))


def as_csv(experiment: Experiment, cells: Mapping[tuple[str, ...], Cell]) -> str:
    """Return all points as CSV, rates in [0, 1]; an empty field: no figure."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*(axis.name for axis in experiment.axes), "state", "acc", "asr", "run", "error"])
    for point, cell in cells.items():
        rates = ["" if rate is None else f"{rate:.6f}" for rate in (cell.acc, cell.asr)]
        writer.writerow([*point, cell.state, *rates, cell.run, cell.error])
    return out.getvalue()


@dataclass(frozen=True)
class Table:
    """Cells by row and column: what one heat map shows."""

    title: str
    rows: list[str]
    columns: list[str]
    cells: dict[tuple[str, str], Cell]

    def lines(self) -> list[list[str]]:
        """Return the table as texts, the row's label first."""
        return [[row, *(cell_text(self.cells[row, column]) for column in self.columns)] for row in self.rows]


def cell_text(cell: Cell) -> str:
    """Return what a cell says: its rate in percent, or why it has none."""
    if cell.rate is None:
        return {"undefined": DASH, "failed": "failed", "missing": "not run"}.get(cell.state, "")
    return f"{100 * cell.rate:.1f}{'*' if cell.partial else ''}"


def tables(experiment: Experiment, cells: Mapping[tuple[str, ...], Cell]) -> tuple[Table, list[Table]]:
    """Return the table of the worst (rows by columns), and one per row with the axis of the worst for rows."""
    drawn = experiment.map
    assert drawn is not None
    at = _positions(experiment, drawn)
    labels = {axis.name: list(axis.values) for axis in experiment.axes}
    rows, columns, over = labels[drawn.rows], labels[drawn.columns], labels[drawn.worst]

    def cell(row: str, column: str, label: str) -> Cell:
        return cells[at(row, column, label)]

    single = {
        (row, column): worst({label: cell(row, column, label) for label in over}, drawn.value)
        for row in rows
        for column in columns
    }
    panels = [
        Table(row, over, columns, {(label, column): cell(row, column, label) for label in over for column in columns})
        for row in rows
    ]
    extreme = "lowest" if drawn.value == "acc" else "highest"
    title = f"{extreme} {RATES[drawn.value]}, over all values of {drawn.worst}"
    return Table(title, rows, columns, single), panels


def _positions(experiment: Experiment, drawn: Map) -> Callable[[str, str, str], tuple[str, ...]]:
    order = [axis.name for axis in experiment.axes]

    def position(row: str, column: str, label: str) -> tuple[str, ...]:
        names = {drawn.rows: row, drawn.columns: column, drawn.worst: label}
        return tuple(names[name] for name in order)

    return position
