"""Attacks against defences, round by round: a row of panels per defence, a curve per attack; for papers without tables.

The kind "attacks" of `[figure]`. An arm's label is ``DEFENCE: ATTACK``; arms with the same defence share their panels.
Left is accuracy on clean test data (main task), right the attack success rate (target task); ticks below tell the
rounds with an attack. The CSV has, per round, what the pictures show and the norms of the updates.
"""

import csv
import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.compare import round_share
from hawthorn.experiment import Arm
from hawthorn.report._curves import series
from hawthorn.report._style import COLOURS, DASHES, GREY, STYLE, WIDE, new_figure, png, round_axis
from hawthorn.reproduce.claims import Verdict, decide, measured
from hawthorn.reproduce.study import Study
from server.record import RoundRecord, RunRecord, read_run

DASH = "–"
HEAD = ("defence", "attack", "main, last", "main, late mean", "target, late mean", "target, max", "edge, late", "note")
COLUMNS = ("main", "target", "edge_true", "raw", "attackers", "attacker_norm", "benign_norm", "aggregate_norm",
           "model_norm", "attackers_weight", "skipped")  # fmt: skip


@dataclass(frozen=True, eq=False)
class Curve:
    """One arm: its place in the picture, its finished run of every seed, and why one is missing."""

    arm: str
    panel: str
    label: str
    runs: tuple[RunRecord, ...]
    problem: str = ""


def read_curves(study: Study, outcomes: Mapping[str, Outcome]) -> list[Curve]:
    """Return one curve per arm that is asked for, in the order of the file."""
    found = []
    for label in study.rows:
        arms = study.arms(label)
        panel, _, name = arms[0].shown.rpartition(": ")
        runs, problems = list[RunRecord](), list[str]()
        for arm in arms:
            record = _finished(arm, outcomes)
            if isinstance(record, RunRecord):
                runs.append(record)
            else:
                problems.append(record)
        found.append(Curve(label, panel or "all", name, tuple(runs), "; ".join(dict.fromkeys(problems))))
    return found


def _finished(arm: Arm, outcomes: Mapping[str, Outcome]) -> RunRecord | str:
    if arm.config is None:
        return arm.problem
    outcome = outcomes.get(arm.config.name)
    if outcome is not None and not outcome.has_record:
        return f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status
    return read_run(arm.config.run_folder) if earlier_run(arm.config)[0] == "finished" else "not run"


def draw_curves(curves: Sequence[Curve], title: str = "") -> Picture:
    """Draw two panels per defence, main and target accuracy in percent; several seeds as their mean."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    names = list(dict.fromkeys(curve.label for curve in curves))
    picture = new_figure(WIDE, 0.9 + 1.9 * len(panels))
    grid = picture.subplots(len(panels), 2, squeeze=False, sharex=True)
    last = max((record.round for curve in curves for run in curve.runs for record in run.rounds), default=0)
    for panel, (left, right) in zip(panels, grid):
        for axes, key, what in ((left, "acc", "main task"), (right, "asr", "target task")):
            for curve in curves:
                if curve.panel == panel:
                    _draw_one(axes, curve, key, names.index(curve.label))
            axes.set_title(f"{panel}: {what}, %")
            axes.set_ylim(-4, 103)
            round_axis(axes, last)
            axes.set_xlabel("round" if panel == panels[-1] else "")
    handles = [Line2D([], [], **_look(place)) for place in range(len(names))]
    picture.legend(handles, names, loc="outside lower left", ncols=min(len(names), 4))
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _draw_one(axes: Axes, curve: Curve, key: str, place: int) -> None:
    points = [dict(zip(*series(run, key))) for run in curve.runs]
    rounds = sorted(set(points[0]).intersection(*points[1:])) if points else []
    if rounds:
        axes.plot(rounds, [100 * math.fsum(p[r] for p in points) / len(points) for r in rounds], **_look(place))
        attacked = [record.round for record in curve.runs[0].rounds if record.attacking]
        axes.plot(attacked, [-2.0] * len(attacked), "|", color=GREY, markersize=3, zorder=1)
    elif curve.problem:
        text = f"{curve.label}: {curve.problem}"
        axes.text(0.5, 0.2 + 0.2 * place, text[:80], transform=axes.transAxes, ha="center", color=GREY)


def _look(place: int) -> dict[str, Any]:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)]}


def rows(curves: Sequence[Curve]) -> list[list[str]]:
    """Return the table's rows, in percent; means over the second half of the rounds and over seeds."""
    found = []
    for curve in curves:
        cells = [_mean(curve, m) for m in ("main-last", "main", "target", "target-max", "edge")]
        skipped = sum(bool(record.skipped) for run in curve.runs for record in run.rounds)
        note = curve.problem or (f"{skipped} rounds skipped" if skipped else "")
        found.append([curve.panel, curve.label, *cells, note])
    return found


def _mean(curve: Curve, measure: str) -> str:
    values = [v for run in curve.runs if (v := measured(run, measure)) is not None]
    return f"{math.fsum(values) / len(values):.1f}" if values else DASH


def curves_table(curves: Sequence[Curve], verdicts: Sequence[Verdict]) -> list[Table]:
    """Return the tables for a terminal: arms, and the paper's statements with our answers."""
    arms = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in HEAD:
        arms.add_column(name, justify="left" if name in ("defence", "attack", "note") else "right", overflow="fold")
    for row in rows(curves):
        arms.add_row(*row)
    if not verdicts:
        return [arms]
    claims = Table("the paper says", "here", "figures, %", box=SIMPLE_HEAD, pad_edge=False)
    for verdict in verdicts:
        claims.add_row(verdict.claim.text, verdict.answer, verdict.figures)
    return [arms, claims]


def as_csv(study: Study, curves: Sequence[Curve]) -> str:
    """Return one row per arm, seed and round; accuracies in percent, norms as they are, empty: not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["figure", "variant", "arm", "defence", "attack", "seed", "round", *COLUMNS])
    for curve in curves:
        for run in curve.runs:
            first = [study.name, study.first.variant, curve.arm, curve.panel, curve.label, run.config.seed]
            for record in run.rounds:
                cells = ["" if v is None else f"{v:.6g}" if isinstance(v, float) else v for v in _cells(record)]
                writer.writerow([*first, record.round, *cells])
    return out.getvalue()


def _cells(record: RoundRecord) -> list[Any]:
    rates = [None if v is None else 100 * v for v in (record.acc, record.asr, record.edge_acc, record.raw_acc)]
    pairs = list(zip(record.clients, record.norms, strict=True))
    attacking = [norm for client, norm in pairs if client in record.attacking]
    benign = [norm for client, norm in pairs if client not in record.attacking]
    norms = [float(max(attacking)) if attacking else None, float(np.median(benign)) if benign else None]
    share = round_share(record)
    return [*rates, len(attacking), *norms, record.aggregate_norm, record.model_norm, share, record.skipped]


def as_markdown(study: Study, curves: Sequence[Curve], verdicts: Sequence[Verdict]) -> str:
    """Return what was run, the table of arms and the answered statements as Markdown."""
    title = study.first.title + (f" ({study.first.variant})" if study.first.variant else "")
    parts = [f"# {title}", study.first.about, _markdown(HEAD, rows(curves))]
    if verdicts:
        said = [[v.claim.text, v.answer, v.figures] for v in verdicts]
        parts += ["## What the paper says, and what is seen here", _markdown(("statement", "here", "figures, %"), said)]
    seeds = ", ".join(map(str, study.seeds))
    parts.append(f"All in %, seed {seeds}. Late: over the evaluated rounds of the second half.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *[[cell.replace("|", "\\|") for cell in row] for row in body]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def verdicts_of(study: Study, curves: Sequence[Curve]) -> list[Verdict]:
    """Return the answers to the figure's statements."""
    claims = study.figure.claims if study.figure is not None else ()
    return decide(claims, {curve.arm: curve.runs for curve in curves if curve.runs and not curve.problem})


def write_curves(study: Study, curves: Sequence[Curve], verdicts: Sequence[Verdict]) -> dict[str, Path]:
    """Write NAME.csv, NAME.md and NAME.png into the folder of the runs; return kind -> path."""
    folder, stem = study.folder, Path(study.name).stem
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):  # type: ignore[arg-type]
        image = png(draw_curves(curves, study.first.title))
    text, table = as_csv(study, curves).encode(), as_markdown(study, curves, verdicts).encode()
    written = {}
    for kind, content in (("csv", text), ("md", table), ("png", image)):
        partial = folder / f"{stem}.{kind}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / f"{stem}.{kind}")
        written[kind] = folder / f"{stem}.{kind}"
    return written
