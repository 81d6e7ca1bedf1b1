"""What a figure shows as numbers: CSV, Markdown, and the table of a terminal."""

import csv
import io
from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from certify.bounds import Floats
from certify.crfl.curves import certified_accuracy, certified_rate
from hawthorn.reproduce.by_rounds import ByRounds
from hawthorn.reproduce.certified import WAYS, Certified
from hawthorn.reproduce.closeness import Distances
from hawthorn.reproduce.figure import Figure
from hawthorn.reproduce.study import Study

STEPS = 100  # parts that the radius axis has in the CSV and the picture
RARE = 0.002  # share of points whose larger radii the axis of a sound certificate leaves out
DASH = "–"

Curves = list[Certified] | list[Distances] | list[ByRounds]


def figure_of(study: Study) -> Figure:
    """Return the figure of a study that has one."""
    assert study.figure is not None
    return study.figure


def radii_of(study: Study, found: Sequence[Certified], way: str) -> Floats:
    """Return the radii that a way's curves are read at: the paper's axis, or up to where the last curve ends."""
    figure, end = figure_of(study), 0.0
    if way == "paper" and figure.max_radius > 0:
        end = figure.max_radius
    else:
        radii = [each.ways[way].radii for each in found if way in each.ways and each.ways[way].certificates]
        ends = (float(np.quantile(r[np.isfinite(r)], 1 - RARE)) for r in radii if np.isfinite(r).any())
        end = max(ends, default=0.0) * 1.02
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


def rounds_csv(study: Study, found: Sequence[ByRounds]) -> str:
    """Return one row per curve and number of rounds."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["figure", "variant", "curve", "label", "seed", "rounds", "printed", "amplified", "note"])
    for each in found:
        first = [study.name, study.first.variant, each.line.name, each.line.label, each.seed]
        for number, printed, amplified in each.radii:
            writer.writerow([*first, number, f"{printed:.9g}", f"{amplified:.9g}", ""])
        if not each.radii:
            writer.writerow([*first, "", "", "", each.problem])
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
    "rounds": ("curve", "seed", "rounds", "printed", "amplified", "note"),
}


def summary(study: Study, found: Curves) -> list[list[str]]:
    """Return the rows of the table: per curve and way, or per pair of arms."""
    rows: list[list[str]] = []
    for each in found:
        if isinstance(each, Distances):
            rows.append(_distance_row(each))
        elif isinstance(each, ByRounds):
            rows += _rounds_rows(each)
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


def _rounds_rows(each: ByRounds) -> list[list[str]]:
    first = [each.line.label, str(each.seed)]
    if not each.radii:
        return [[*first, *[DASH] * 3, each.problem]]
    last = len(each.radii) - 1
    chosen = [each.radii[place] for place in sorted({0, last // 4, last // 2, last})]
    return [[*first, str(number), f"{printed:.6g}", f"{amplified:.6g}", ""] for number, printed, amplified in chosen]


def figure_table(study: Study, found: Curves) -> Table:
    """Return the table for a terminal."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=_caption(study, found), caption_justify="left")
    for name in HEADS[figure_of(study).kind]:
        table.add_column(name, justify="left" if name in ("curve", "certificate", "note") else "right", overflow="fold")
    for row in summary(study, found):
        table.add_row(*row)
    return table


def as_markdown(study: Study, found: Curves) -> str:
    """Return the table as Markdown, with what was run above it."""
    head = HEADS[figure_of(study).kind]
    rows = [head, ["---" if name in ("curve", "certificate", "note") else "---:" for name in head]]
    rows += [[cell.replace("|", "\\|") for cell in row] for row in summary(study, found)]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    variant = f" ({study.first.variant})" if study.first.variant else ""
    return "\n\n".join([f"# {study.first.title}{variant}", study.first.about, table, _caption(study, found)]) + "\n"


def _caption(study: Study, found: Curves) -> str:
    figure = figure_of(study)
    if figure.kind == "closeness":
        return "l2 distance of the released models of both runs."
    if figure.kind == "rounds":
        return (
            f"Radii of a vote of {figure.pa:g} against {figure.pb:g}. printed: Corollary 1; amplified: what holds for "
            "the same law over trainings, flipped labels and the inputs' length charged."
        )
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
