"""The files of a grid: every point as CSV and, where it has a map, the worst as CSV, the pictures and a page."""

import base64
import csv
import io
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2
from matplotlib import rc_context

from hawthorn.arms.perform import Outcome
from hawthorn.experiment import Experiment
from hawthorn.grid import Map
from hawthorn.heatmap import RATES, Cell, Table, as_csv, read_cells, tables
from hawthorn.report._heatmap import draw_panels, draw_worst
from hawthorn.report._style import STYLE, png
from hawthorn.report._tables import Grid
from hawthorn.report.page import Picture


def write_map(experiment: Experiment, outcomes: Mapping[str, Outcome]) -> dict[str, Path]:
    """Write grid.csv and, where the experiment has a `[map]`, worst.csv, worst.png, panels.png and report.html."""
    folder, cells = experiment.folder, read_cells(experiment, outcomes)
    contents = {"grid.csv": as_csv(experiment, cells).encode()}
    if experiment.map is not None:
        table, panels = tables(experiment, cells)
        with rc_context({**STYLE, "axes.grid": False}):  # type: ignore[arg-type]
            contents["worst.png"] = png(draw_worst(table, experiment.map))
            contents["panels.png"] = png(draw_panels(panels, experiment.map))
        contents["worst.csv"] = _worst_csv(table, experiment.map).encode()
        contents["report.html"] = _page(experiment, table, cells.values(), contents).encode()
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    return {name: folder / name for name in contents}


def _worst_csv(table: Table, drawn: Map) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([drawn.rows, drawn.columns, "state", f"worst_{drawn.value}", drawn.worst, "partial"])
    for (row, column), cell in table.cells.items():
        rate = "" if cell.rate is None else f"{cell.rate:.6f}"
        writer.writerow([row, column, cell.state, rate, cell.by, int(cell.partial)])
    return out.getvalue()


def _page(experiment: Experiment, table: Table, cells: Iterable[Cell], pictures: Mapping[str, bytes]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawn = experiment.map
    assert drawn is not None
    errors = dict.fromkeys((cell.state, cell.error) for cell in cells if cell.error)
    settings = [(config.settings()) for config in experiment.runs]
    shared = [key for key in settings[0] if key != "name" and len({repr(each[key]) for each in settings}) == 1]
    note = "*: some runs failed, it may be worse. –: the rule refuses these numbers of clients."
    return environment.get_template("map.html.j2").render(
        title=experiment.title,
        about=experiment.about,
        table=Grid([drawn.rows, *table.columns], table.lines(), frozenset(range(1, 1 + len(table.columns))), note),
        worst=_picture(pictures["worst.png"], table.title),
        panels=_picture(pictures["panels.png"], f"{RATES[drawn.value]} by {drawn.worst} and {drawn.columns}"),
        axes=Grid(
            ["axis", "label", "settings"],
            [[a.name, label, _say(settings)] for a in experiment.axes for label, settings in a.values.items()],
        ),
        errors=Grid(["state", "reason"], [[state, error] for state, error in errors]),
        settings=Grid(["setting", "value"], [[key, str(settings[0][key])] for key in shared]),
    )


def _say(settings: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in settings.items())


def _picture(data: bytes, caption: str) -> Picture:
    return Picture(base64.b64encode(data).decode(), caption, caption)
