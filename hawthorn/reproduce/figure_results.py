"""From finished runs to a figure: what every curve holds, as table, CSV, Markdown and picture.

The files are named by the study and lie in the folder of its runs, which figures with equal arms share.
"""

import csv
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from rich.box import SIMPLE_HEAD
from rich.table import Table

from certify.bounds import Floats
from certify.crfl.curves import certified_accuracy, certified_rate
from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.experiment import Arm
from hawthorn.report._style import STYLE, png
from hawthorn.reproduce.certified import WAYS, Certified, certify_line
from hawthorn.reproduce.closeness import closeness
from hawthorn.reproduce.figure import Figure, Line
from hawthorn.reproduce.figure_picture import draw_certified, draw_closeness
from hawthorn.reproduce.study import Study
from tasks.errors import RecordError

STEPS = 100  # parts that the radius axis has in the CSV and the picture
DASH = "–"


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of two arms' models by round, or why there are none."""

    line: Line
    seed: int
    rounds: tuple[tuple[int, float], ...] = ()
    problem: str = ""


Curves = list[Certified] | list[Distances]


def figure_of(study: Study) -> Figure:
    """Return the figure of a study that has one."""
    assert study.figure is not None
    return study.figure


def measure(
    study: Study, outcomes: Mapping[str, Outcome] | None = None, tell: Callable[[str], None] = lambda text: None
) -> Curves:
    """Return every curve of every seed, in the figure's order; what is not finished says why."""
    figure, outcomes = figure_of(study), outcomes or {}
    if figure.kind == "closeness":
        return [_distances(line, seed, arms, outcomes) for line, seed, arms in _each(study, figure)]
    found = []
    for line, seed, arms in _each(study, figure):
        tell(f"certifying {line.label}, seed {seed}")
        found.append(_certified(line, seed, arms, outcomes, figure.points))
    return found


def _each(study: Study, figure: Figure) -> Iterator[tuple[Line, int, dict[str, Arm]]]:
    for line in figure.lines:
        for seed, experiment in zip(study.seeds, study.experiments):
            yield line, seed, {arm.label: arm for arm in experiment.arms}


def _certified(
    line: Line, seed: int, arms: Mapping[str, Arm], outcomes: Mapping[str, Outcome], points: int
) -> Certified:
    folder = _folder(arms[line.arm], outcomes)
    if isinstance(folder, str):
        return Certified(line, seed, problem=folder)
    try:
        return certify_line(line, folder, seed, points)
    except RecordError as error:
        return Certified(line, seed, problem=str(error))


def _distances(line: Line, seed: int, arms: Mapping[str, Arm], outcomes: Mapping[str, Outcome]) -> Distances:
    folders = [_folder(arms[label], outcomes) for label in (line.arm, line.clean)]
    for label, folder in zip((line.arm, line.clean), folders):
        if isinstance(folder, str):
            return Distances(line, seed, problem=f"{label}: {folder}")
    try:
        return Distances(line, seed, tuple(closeness(*(Path(folder) for folder in folders))))
    except RecordError as error:
        return Distances(line, seed, problem=str(error))


def _folder(arm: Arm, outcomes: Mapping[str, Outcome]) -> Path | str:
    """Return the folder of an arm's finished run, or why there is none."""
    if arm.config is None:
        return arm.problem
    outcome = outcomes.get(arm.config.name)
    if outcome is not None and not outcome.has_record:
        return f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status
    return arm.config.run_folder if earlier_run(arm.config)[0] == "finished" else "not run"


def radii_of(study: Study, found: Sequence[Certified], way: str) -> Floats:
    """Return the radii that a way's curves are read at: the paper's axis, or up to the largest finite radius."""
    figure, end = figure_of(study), 0.0
    if way == "paper" and figure.max_radius > 0:
        end = figure.max_radius
    else:
        radii = [each.ways[way].radii for each in found if way in each.ways and each.ways[way].certificates]
        end = max((float(r[np.isfinite(r)].max(initial=0.0)) for r in radii), default=0.0) * 1.02
    return np.linspace(0.0, end or 1.0, STEPS + 1)


def certified_csv(study: Study, found: Sequence[Certified]) -> str:
    """Return one row per curve, way and radius: certified rate and accuracy with 95 % bands for the population."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["figure", "variant", "curve", "label", "seed", "certificate", "radius"]
    shares = ["rate", "rate_lower", "rate_upper", "accuracy", "accuracy_lower", "accuracy_upper"]
    writer.writerow([*head, *(f"certified_{name}" for name in shares), "accuracy", "rounds", "points", "note"])
    for each in found:
        first = [study.name, study.first.variant, each.line.name, each.line.label, each.seed]
        for way in WAYS:
            result = each.ways.get(way)
            if result is None or not result.certificates:
                note = each.problem or (result.problem if result else "")
                writer.writerow([*first, way, *[""] * 7, _number(each.accuracy), each.rounds, len(each.labels), note])
                continue
            radii = radii_of(study, found, way)
            rate = certified_rate(result.certificates, radii)
            accuracy = certified_accuracy(result.certificates, each.labels, radii)
            note = f"broken: {', '.join(result.broken)}" if result.broken else ""
            columns = (radii, rate.share, rate.lower, rate.upper, accuracy.share, accuracy.lower, accuracy.upper)
            for values in zip(*columns):
                cells = [f"{value:.6g}" for value in values]
                writer.writerow([*first, way, *cells, _number(each.accuracy), each.rounds, len(each.labels), note])
    return out.getvalue()


def closeness_csv(study: Study, found: Sequence[Distances]) -> str:
    """Return one row per pair of arms and round."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["figure", "variant", "curve", "label", "seed", "round", "distance", "note"])
    for each in found:
        first = [study.name, study.first.variant, each.line.name, each.line.label, each.seed]
        for number, distance in each.rounds:
            writer.writerow([*first, number, f"{distance:.9g}", ""])
        if not each.rounds:
            writer.writerow([*first, "", "", each.problem])
    return out.getvalue()


HEADS = {
    "certified": (
        "curve",
        "seed",
        "certificate",
        "accuracy",
        "abstained",
        "acc. at 0",
        "acc. at 1/4",
        "acc. at 1/2",
        "acc. at 3/4",
        "largest radius",
        "note",
    ),
    "closeness": ("curve", "seed", "rounds", "largest distance", "in round", "last distance", "note"),
}


def summary(study: Study, found: Curves) -> list[list[str]]:
    """Return the rows of the table: per curve and way, or per pair of arms."""
    rows: list[list[str]] = []
    for each in found:
        if isinstance(each, Distances):
            rows.append(_distance_row(each))
        elif each.problem:
            rows.append([each.line.label, str(each.seed), *[DASH] * 8, each.problem])
        else:
            rows += [_certified_row(study, [c for c in found if isinstance(c, Certified)], each, way) for way in WAYS]
    return rows


def _certified_row(study: Study, found: Sequence[Certified], each: Certified, way: str) -> list[str]:
    result, first = each.ways[way], [each.line.label, str(each.seed), way, f"{100 * each.accuracy:.2f}"]
    if not result.certificates:
        return [*first, *[DASH] * 6, result.problem]
    end = radii_of(study, found, "paper")[-1]
    shares = certified_accuracy(result.certificates, each.labels, [0.0, end / 4, end / 2, 3 * end / 4]).share
    note = f"broken: {', '.join(result.broken)}" if result.broken else "holds"
    cells = [f"{100 * share:.2f}" for share in (result.abstained, *shares)]
    return [*first, *cells, f"{result.radii.max():.6g}", note]


def _distance_row(each: Distances) -> list[str]:
    first = [each.line.label, str(each.seed)]
    if not each.rounds:
        return [*first, *[DASH] * 4, each.problem]
    number, largest = max(each.rounds, key=lambda pair: pair[1])
    return [*first, str(len(each.rounds)), f"{largest:.5f}", str(number), f"{each.rounds[-1][1]:.5f}", ""]


def figure_table(study: Study, found: Curves) -> Table:
    """Return the table for a terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=_caption(study, found), caption_justify="left")
    for name in HEADS[figure_of(study).kind]:
        table.add_column(name, justify="left" if name in ("curve", "certificate", "note") else "right", overflow="fold")
    for row in summary(study, found):
        table.add_row(*row)
    return table


def write_figure(study: Study, found: Curves) -> dict[str, Path]:
    """Write NAME.csv, NAME.md and NAME.png into the folder of the runs; return kind -> path."""
    folder, stem = study.folder, Path(study.name).stem
    folder.mkdir(parents=True, exist_ok=True)
    certified = [each for each in found if isinstance(each, Certified)]
    distances = [each for each in found if isinstance(each, Distances)]
    with rc_context(STYLE):  # type: ignore[arg-type]
        if figure_of(study).kind == "closeness":
            picture = draw_closeness(distances, study.first.title)
        else:
            radii = {way: radii_of(study, certified, way) for way in WAYS}
            picture = draw_certified(certified, radii, study.first.title, figure_of(study).legend)
        image = png(picture)
    text = closeness_csv(study, distances) if distances else certified_csv(study, certified)
    contents = {f"{stem}.csv": text.encode(), f"{stem}.md": as_markdown(study, found).encode(), f"{stem}.png": image}
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    return {name.rpartition(".")[2]: folder / name for name in contents}


def as_markdown(study: Study, found: Curves) -> str:
    """Return the table as Markdown, with what was run above it."""
    head = HEADS[figure_of(study).kind]
    rows = [head, ["---" if name in ("curve", "certificate", "note") else "---:" for name in head]]
    rows += [[cell.replace("|", "\\|") for cell in row] for row in summary(study, found)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    variant = f" ({study.first.variant})" if study.first.variant else ""
    return "\n\n".join([f"# {study.first.title}{variant}", study.first.about, table, _caption(study, found)]) + "\n"


def _caption(study: Study, found: Curves) -> str:
    if figure_of(study).kind == "closeness":
        return "l2 distance of the released models of both runs."
    certified = [each for each in found if isinstance(each, Certified)]
    end = radii_of(study, certified, "paper")[-1]
    points = max((len(each.labels) for each in certified), default=0)
    return (
        f"In % of {points} test points; acc.: certified accuracy at 0, 1/4, 1/2 and 3/4 of the radius {end:.4g}, the "
        "l2 change of each poisoned sample. paper: Corollary 1 as printed; votes, margin: what holds for the released "
        "model."
    )


def _number(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.6g}"
