"""The files of a reproduction: table.csv, table.md, table.png and table.html, in the folder of its runs."""

import base64
import csv
import io
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
from matplotlib import rc_context
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from hawthorn.compare import DASH
from hawthorn.report._curves import draw_metrics
from hawthorn.report._style import STYLE, png, run_labels
from hawthorn.report._tables import Grid, settings_that_differ
from hawthorn.report._thresholds import draw_thresholds
from hawthorn.report.page import Picture
from hawthorn.reproduce.picture import draw_beside
from hawthorn.reproduce.study import Row, Study, finished_runs
from server.rejection import measure_confidences

FAR = 10.0  # percentage points from the paper that want an explanation
HEAD = ("row", "ACC", "paper", "diff.", "ASR", "paper", "diff.", "ASR, last half", "seconds", "note")


def result_table(study: Study, rows: Sequence[Row]) -> Table:
    """Return the table for a terminal; differences beyond 10 points stand out."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=_caption(study, rows), caption_justify="left")
    for name in HEAD:
        table.add_column(name, justify="left" if name in ("row", "note") else "right", overflow="fold")
    for row in rows:
        cells = [Text(cell) for cell in _cells(row)]
        for at, difference in ((3, row.acc_difference), (6, row.asr_difference)):
            if difference is not None and abs(difference) > FAR:
                cells[at].stylize("bold red")
        table.add_row(*cells)
    return table


def write_results(study: Study, rows: Sequence[Row]) -> dict[str, Path]:
    """Write all files of a reproduction; return kind -> path."""
    folder = study.folder
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):  # type: ignore[arg-type]
        picture = png(draw_beside(rows, title=_title(study)))
        page = _page(study, rows, picture)
    contents = {
        "table.csv": as_csv(study, rows).encode(),
        "table.md": as_markdown(study, rows).encode(),
        "table.png": picture,
        "table.html": page.encode(),
    }
    if (curves := _over_thresholds(study, rows)) is not None:
        contents["tau.png"] = curves
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    return {name.removeprefix("table."): folder / name for name in contents}


def _over_thresholds(study: Study, rows: Sequence[Row]) -> bytes | None:
    """Draw the runs that rows read at a threshold over all thresholds; None where no row does, or none is finished."""
    if all(arm.tau is None for arm in study.first.arms):
        return None
    runs = finished_runs(study, rows)
    found = [(name, run.config.tau, measure_confidences(run.folder)) for name, run in zip(run_labels(runs), runs)]
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = draw_thresholds(found)
        return None if figure is None else png(figure)


def as_csv(study: Study, rows: Sequence[Row]) -> str:
    """Return the rows as CSV, in percent with four digits; an empty field: no figure."""
    out = io.StringIO()
    names = ["row", "label", "rule", "acc", "paper_acc", "acc_difference", "asr", "paper_asr", "asr_difference"]
    names += [
        "asr_late_min",
        "asr_late_max",
        "acc_min",
        "acc_max",
        "asr_min",
        "asr_max",
        "rounds",
        "seeds",
        "seconds",
        "note",
    ]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "variant", *names])
    for row in rows:
        figures = [row.acc, row.paper_acc, row.acc_difference, row.asr, row.paper_asr, row.asr_difference]
        spans = [*(row.asr_late or ("", "")), *(row.acc_range or ("", "")), *(row.asr_range or ("", ""))]
        values = [*figures, *spans, row.rounds, row.seeds, row.seconds]
        cells = [f"{v:.4f}" if isinstance(v, float) else "" if v is None else v for v in values]
        writer.writerow([study.name, study.first.variant, row.label, row.shown, row.rule, *cells, row.note])
    return out.getvalue()


def as_markdown(study: Study, rows: Sequence[Row]) -> str:
    """Return the table as Markdown, with what was run above it."""
    head = "| " + " | ".join(HEAD) + " |"
    line = "| " + " | ".join("---" if name in ("row", "note") else "---:" for name in HEAD) + " |"
    body = ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(row)) + " |" for row in rows]
    parts = [f"# {_title(study)}", study.first.about, "\n".join([head, line, *body]), _caption(study, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _cells(row: Row) -> list[str]:
    return [
        row.shown,
        _rate(row.acc, row.acc_range),
        _rate(row.paper_acc),
        _signed(row.acc_difference),
        _rate(row.asr, row.asr_range),
        _rate(row.paper_asr),
        _signed(row.asr_difference),
        DASH if row.asr_late is None else f"{row.asr_late[0]:.1f} to {row.asr_late[1]:.1f}",
        DASH if row.seconds is None else f"{row.seconds:.0f}",
        row.note,
    ]


def _rate(value: float | None, span: tuple[float, float] | None = None) -> str:
    if value is None:
        return DASH
    return f"{value:.2f}" if span is None else f"{value:.2f} ({span[0]:.1f} to {span[1]:.1f})"


def _signed(value: float | None) -> str:
    return DASH if value is None else f"{value:+.2f}"


def _title(study: Study) -> str:
    return study.first.title + (f" ({study.first.variant})" if study.first.variant else "")


def _caption(study: Study, rows: Sequence[Row]) -> str:
    seeds = ", ".join(map(str, study.seeds))
    text = f"All in %{_ends(study, rows)}"
    text += f", seed {seeds}." if len(study.seeds) == 1 else f", mean and range over seeds {seeds}."
    text += " ASR, last half: over the evaluated rounds of the second half. Seconds: all rounds of a run."
    far = [row.shown for row in rows if any(abs(d or 0) > FAR for d in (row.acc_difference, row.asr_difference))]
    return f"{text} More than {FAR:.0f} points from the paper: {', '.join(far)}." if far else text


def _ends(study: Study, rows: Sequence[Row]) -> str:
    """Say after which round the figures are, row by row where rows end after different ones."""
    labels = {row.label for row in rows} or set(study.rows)
    ends: dict[int, list[str]] = {}
    for arm in study.first.arms:
        if arm.config is not None and arm.label in labels:
            ends.setdefault(arm.config.num_rounds, []).append(arm.shown)
    if len(ends) > 1:
        each = "; ".join(f"{number} ({', '.join(names)})" for number, names in ends.items())
        return f", after each row's last round: {each}"
    return f", after round {next(iter(ends))}" if ends else ""


def _page(study: Study, rows: Sequence[Row], picture: bytes) -> str:
    here, report = Path(__file__).parent, Path(__file__).parent.parent / "report"
    loader = jinja2.FileSystemLoader([here, report])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    runs = finished_runs(study, rows)
    curves = png(draw_metrics(runs)) if runs else None
    rules = [[row.shown, row.rule, f"{row.rounds}", f"{row.seeds}"] for row in rows]
    return environment.get_template("table.html.j2").render(
        title=_title(study),
        about=study.first.about,
        table=Grid(list(HEAD), [_cells(row) for row in rows], frozenset(range(1, 9)), _caption(study, rows)),
        rules=Grid(["row", "rule", "rounds", "seeds"], rules, frozenset({2, 3})),
        beside=_shown(picture, "Ours and the paper's, in percent."),
        curves=_shown(curves, "ACC and ASR after each evaluated round, the first seed.") if curves else None,
        differing=settings_that_differ(runs) if len(runs) > 1 else None,
    )


def _shown(data: bytes, caption: str) -> Picture:
    return Picture(base64.b64encode(data).decode(), caption, caption)
