"""Pictures of robustness: bars of accuracies and losses per row, or accuracies against the number of known points."""

from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hawthorn.report._style import COLOURS, GREY, MARKERS, WIDE, logarithmic, new_figure
from hawthorn.reproduce.robustness import Measured

PAPER = "#b9b9b9"
ROOM = 0.8  # of the room of a group of bars
LEAST_LOSS = 1e-2  # on the logarithmic axis


def draw_rows(rows: Sequence[Measured], title: str) -> Figure:
    """Draw accuracies in percent and mean losses, a group of bars per metric, a colour per row; the paper's in grey."""
    picture = new_figure(WIDE, 4.2)
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    known = [row for row in rows if row.found is not None]
    radii = sorted({bound.eps for row in known if row.found for bound in row.found.bounds})
    names = ["normal", "PGD", "temperature\nPGD", *(f"certified\n{eps:g}" for eps in radii)]
    for place, row in enumerate(known):
        ours, paper = _accuracies(row, radii)
        _bars(left, place, len(known), 100 * ours, paper, row.shown)
        _bars(right, place, len(known), *_losses(row, radii), row.shown)
    for axes, labels in ((left, names), (right, [f"{eps:g}" for eps in radii])):
        axes.set_xticks(range(len(labels)), labels)
        axes.grid(visible=False, axis="x")
        if not known:
            axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=GREY)
    left.set_title("accuracy, %")
    left.set_ylim(0, 105)
    right.set_title("mean certifiable loss, by radius")
    if known:
        logarithmic(right)
    handles, labels = left.get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside lower left", ncols=min(len(labels), 4))
    picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _accuracies(row: Measured, radii: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return our shares and the paper's percentages, NaN where there is none."""
    assert row.found is not None
    bounds = {bound.eps: bound.certified_accuracy for bound in row.found.bounds}
    temperature = row.found.temperature_pgd_accuracy
    ours = [row.found.normal_accuracy, row.found.pgd_accuracy, np.nan if temperature is None else temperature]
    paper = [np.nan] * 3 if row.paper is None else [row.paper.normal, row.paper.adversarial, np.nan]
    known = [pair[0] for pair in row.paper.bounds] if row.paper else []
    ours += [bounds.get(eps, np.nan) for eps in radii]
    return np.array(ours), np.array(paper + _padded(known, len(radii)))


def _losses(row: Measured, radii: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    assert row.found is not None
    bounds = {bound.eps: max(bound.mean_loss, LEAST_LOSS) for bound in row.found.bounds}
    known = [pair[1] for pair in row.paper.bounds] if row.paper else []
    return np.array([bounds.get(eps, np.nan) for eps in radii]), np.array(_padded(known, len(radii)))


def _padded(values: list[float], length: int) -> list[float]:
    return [*values, *[np.nan] * length][:length]


def _bars(axes: Axes, place: int, count: int, ours: np.ndarray, paper: np.ndarray, label: str) -> None:
    """Draw one row's bars, the paper's figure as a grey mark over each."""
    width = ROOM / max(count, 1)
    at = np.arange(len(ours)) - ROOM / 2 + (place + 0.5) * width
    axes.bar(at, ours, 0.9 * width, color=COLOURS[place % len(COLOURS)], label=label)
    shown = ~np.isnan(paper)
    if shown.any():
        first = place == 0
        axes.scatter(
            at[shown], np.maximum(paper[shown], LEAST_LOSS if axes.get_yscale() == "log" else 0), marker="_", s=120,
            color="black", zorder=3, label="the paper's" if first else None,
        )  # fmt: skip


def draw_points(rows: Sequence[Measured], title: str) -> Figure:
    """Draw accuracies against the number of certification points, several seeds as their mean."""
    picture = new_figure(WIDE, 4.6)
    axes = picture.subplots()
    known = [row for row in rows if row.found is not None]
    counts = sorted({row.certification for row in known})
    lines: list[tuple[str, str, list[float]]] = [
        ("clean, test split", "-", [_mean(r.acc for r in known if r.certification == k) for k in counts]),
        (
            "PGD as the gate tries it",
            "-",
            [_mean(r.found.pgd_accuracy for r in known if r.found and r.certification == k) for k in counts],
        ),
    ]
    for eps in sorted({eps for row in known for eps in row.attacked}):
        values = [_mean(row.attacked.get(eps) for row in known if row.certification == k) for k in counts]
        lines.append((f"temperature PGD, {eps:g}", "--", values))
    for place, (label, style, values) in enumerate(lines):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        axes.plot(
            range(len(counts)), [100 * value for value in values], style, label=label, color=colour, marker=marker
        )
    if not counts:
        axes.text(0.5, 0.5, "not run", transform=axes.transAxes, ha="center", color=GREY)
    axes.set_xticks(range(len(counts)), [str(count) for count in counts])
    axes.set_xlabel("certification points of the server, all known to the attackers")
    axes.set_ylabel("accuracy, %")
    axes.set_ylim(0, 102)
    if counts:
        picture.legend(loc="outside lower left", ncols=4)
    picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _mean(values: Iterable[float | None]) -> float:
    """Return the mean of the values that are there, NaN of none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")
