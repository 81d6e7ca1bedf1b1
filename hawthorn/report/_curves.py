"""Accuracy, attack success, rejection, norms, attackers' weight and time, round by round."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogFormatter

from hawthorn.compare import mean_share, percent, round_share
from hawthorn.report._style import (
    ATTACK,
    BENIGN,
    COLOURS,
    GREY,
    IDLE,
    LONG,
    WIDE,
    legend_above,
    look,
    new_figure,
    panels,
    round_axis,
    run_labels,
    shorten_middle,
)
from server.record import RoundRecord, RunRecord

MANY = 60  # points above which not every one has a marker
METRICS = {"acc": "ACC (accuracy on clean test data), %", "asr": "ASR (attack success rate), %"}


def series(run: RunRecord, key: str) -> tuple[list[int], list[float]]:
    """Return (rounds, values) of a metric where it was measured; round 0 is the model before training."""
    points = [(0, (run.initial or {}).get(key)), *((record.round, getattr(record, key)) for record in run.rounds)]
    measured = [(number, value) for number, value in points if value is not None]
    return [number for number, _ in measured], [value for _, value in measured]


def draw_metrics(runs: Sequence[RunRecord]) -> Figure:
    """The main figure: ACC and ASR per round, all runs in the same axes, and the rounds with attackers below."""
    shown = [key for key in METRICS if any(series(run, key)[0] for run in runs)]
    attacked = [index for index, run in enumerate(runs) if any(record.attacking for record in run.rounds)]
    strip = 0.16 * len(attacked) + 0.05
    figure = new_figure(WIDE, 4.4 + strip + 0.2 * math.ceil(len(runs) / 3))
    if not shown:
        figure.text(0.5, 0.5, "No model of these runs was evaluated.", ha="center", va="center", fontsize=12)
        return figure
    grid = figure.subplots(
        2 if attacked else 1, len(shown), squeeze=False, height_ratios=[3.6, strip] if attacked else [1]
    )
    last = max((record.round for run in runs for record in run.rounds), default=0)
    for axes, key in zip(grid[0], shown):
        _metric_panel(axes, runs, key, last)
    for axes, upper in zip(grid[1] if attacked else [], grid[0]):
        _attack_strip(axes, [runs[i].rounds for i in attacked], [COLOURS[i % len(COLOURS)] for i in attacked])
        round_axis(axes, last)
        upper.set_xlabel("")
        upper.tick_params(labelbottom=False)
    handles = [Line2D([], [], **look(index)) for index in range(len(runs))]  # type: ignore[arg-type]
    legend_above(figure, handles, run_labels(runs))
    return figure


def _metric_panel(axes: Axes, runs: Sequence[RunRecord], key: str, last: int) -> None:
    for index, run in enumerate(runs):
        rounds, values = series(run, key)
        style: dict[str, Any] = look(index)
        step = (
            max(1, len(rounds) // 20) if len(rounds) > MANY else 1
        )  # markers shifted from run to run tell lines apart
        every = (index * step // len(runs), step)
        axes.plot(rounds, [100 * v for v in values], markersize=4, markevery=every, **style)
    axes.set_title(METRICS[key])
    axes.set_ylabel("ACC, %" if key == "acc" else "ASR, %")
    axes.set_ylim(-3, 103)
    round_axis(axes, last)


def _attack_strip(axes: Axes, rounds: list[list[RoundRecord]], colours: list[str]) -> None:
    """Draw one bar line per run: coloured in the rounds in which somebody attacked."""
    for row, (records, colour) in enumerate(zip(rounds, colours)):
        spans = [(record.round - 0.5, 1.0) for record in records if record.attacking]
        axes.broken_barh(spans, (row - 0.36, 0.72), color=colour, linewidth=0)
    axes.set_ylim(len(rounds) - 0.4, -0.6)
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False)
    axes.set_ylabel("attack", rotation=0, ha="right", va="center")


def draw_rejection(runs: Sequence[RunRecord]) -> Figure | None:
    """ACC and ASR with and without rejection, and the confidence AUC, of the runs that have a threshold tau."""
    chosen = [(index, run) for index, run in enumerate(runs) if run.config.tau > 0 and series(run, "acc_all")[0]]
    if not chosen:
        return None
    keys = [key for key in ("acc", "asr", "auc") if any(series(run, key)[0] for _, run in chosen)]
    last = max((record.round for _, run in chosen for record in run.rounds), default=0)
    figure = new_figure(WIDE, 3.8 + 0.2 * math.ceil(len(chosen) / 3))
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        for index, run in chosen:
            colour = COLOURS[index % len(COLOURS)]
            scale = 1 if key == "auc" else 100
            for name, dash in ((key, "-"),) if key == "auc" else ((key, "-"), (f"{key}_all", ":")):
                rounds, values = series(run, name)
                marker = "" if len(rounds) > MANY else "o"
                axes.plot(rounds, [scale * v for v in values], dash, color=colour, marker=marker, markersize=2.5)
        axes.set_title("confidence AUC (0.5: no use)" if key == "auc" else f"{key.upper()}, %")
        axes.set_ylabel("AUC" if key == "auc" else f"{key.upper()}, %")
        axes.set_ylim((-0.03, 1.03) if key == "auc" else (-3, 103))
        round_axis(axes, last)
    names = [f"{label} (tau {run.config.tau:g})" for label, run in zip(run_labels(runs), runs)]
    handles = [Line2D([], [], color=COLOURS[index % len(COLOURS)]) for index, _ in chosen]
    extra = [Line2D([], [], color=GREY, linestyle="-"), Line2D([], [], color=GREY, linestyle=":")]
    legend_above(figure, [*handles, *extra], [*(names[i] for i, _ in chosen), "with rejection", "without rejection"])
    return figure


class PlainNumbers(LogFormatter):
    """Labels a log axis with 0.6 rather than 6e-01, where `LogFormatter` would label it."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def draw_norms(runs: Sequence[RunRecord]) -> Figure | None:
    """l2 norms of the updates, log scale: median and range of benign and of malicious clients, and the aggregate's."""
    if not any(norm > 0 for run in runs for record in run.rounds for norm in record.norms):
        return None
    figure, grid = panels(runs, 2.9)
    groups: dict[str, tuple[str, Callable[[RoundRecord, int], bool]]] = {
        "benign clients": (BENIGN, lambda record, client: client not in record.malicious),
        "malicious, not attacking": (IDLE, lambda r, client: client in r.malicious and client not in r.attacking),
        "attacking clients": (ATTACK, lambda record, client: client in record.attacking),
    }
    drawn: dict[str, Line2D] = {}
    for index, axes in grid:
        rounds = runs[index].rounds
        for name, (colour, belongs) in groups.items():
            if line := _band(axes, rounds, belongs, colour):
                drawn[name] = line
        norms = [r.aggregate_norm if not r.skipped and r.aggregate_norm > 0 else np.nan for r in rounds]
        marker = "" if len(rounds) > MANY else "."
        (drawn["aggregate"],) = axes.plot([r.round for r in rounds], norms, "--", color="black", lw=1.1, marker=marker)
        axes.set_yscale("log")
        for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
            set_formatter(PlainNumbers(minor_thresholds=(1.2, 0.5)))  # minor ones show if few powers of ten do
        axes.tick_params(axis="y", which="minor", labelsize=8)
        axes.set_ylabel("l2 norm of the update")
    legend_above(figure, list(drawn.values()), list(drawn))
    return figure


def _band(
    axes: Axes, rounds: list[RoundRecord], belongs: Callable[[RoundRecord, int], bool], colour: str
) -> Line2D | None:
    low, middle, high = [], [], []
    for record in rounds:
        pairs = zip(record.clients, record.norms, strict=True)
        norms = [norm for client, norm in pairs if norm > 0 and belongs(record, client)] or [np.nan]
        low.append(min(norms))
        middle.append(float(np.median(norms)))
        high.append(max(norms))
    if all(math.isnan(value) for value in middle):
        return None
    numbers = [record.round for record in rounds]
    axes.fill_between(numbers, low, high, color=colour, alpha=0.2, linewidth=0)
    marker = "" if len(rounds) > 3 * MANY else "o"
    return axes.plot(numbers, middle, color=colour, marker=marker, markersize=2.5, lw=1.2)[0]


def draw_shares(runs: Sequence[RunRecord]) -> Figure | None:
    """The attackers' part of the aggregate's weight, beside their part of the usable replies."""
    chosen = [run for run in runs if any(round_share(record) is not None for record in run.rounds)]
    if not chosen:
        return None
    figure, grid = panels(chosen, 2.4)
    labels = dict(zip(map(id, runs), run_labels(runs)))
    for index, axes in grid:
        run = chosen[index]
        shares = [100 * (round_share(record) or 0.0) for record in run.rounds]
        axes.stairs(shares, _edges(run.rounds), fill=True, color=ATTACK, alpha=0.75, lw=0)
        alike = [(record.round, 100 * _reply_share(record)) for record in run.rounds if record.attacking]
        axes.hlines(
            [y for _, y in alike], [x - 0.5 for x, _ in alike], [x + 0.5 for x, _ in alike], color="black", lw=1
        )
        axes.set_ylim(0, 103)
        axes.set_ylabel("attackers' weight, %")
        axes.set_title(f"{shorten_middle(labels[id(run)], LONG)}: mean {percent(mean_share(run))} % of the weight")
    handles = [Patch(color=ATTACK, alpha=0.75), Line2D([], [], color="black", lw=1.0)]
    legend_above(figure, handles, ["share of the weight", "share of the usable replies"])
    return figure


def _reply_share(record: RoundRecord) -> float:
    return len(set(record.clients) & set(record.attacking)) / len(record.clients) if record.clients else 0.0


def _edges(rounds: list[RoundRecord]) -> list[float]:
    return [rounds[0].round - 0.5, *(record.round + 0.5 for record in rounds)]


def draw_seconds(runs: Sequence[RunRecord]) -> Figure | None:
    """Seconds per round, stacked: training, aggregation, gate, evaluation, and what is none of these."""
    if not any(run.rounds for run in runs):
        return None
    figure, grid = panels(runs, 2.4)
    parts = {"train": "#56B4E9", "aggregate": "#D55E00", "gate": "#CC79A7", "evaluate": "#009E73"}
    parts["not split"] = "#BBBBBB"
    seen: set[str] = set()
    for index, axes in grid:
        rounds = runs[index].rounds
        axes.set_ylabel("seconds per round")
        if not rounds:
            continue
        base = np.zeros(len(rounds))
        for name, colour in parts.items():
            values = np.array([_seconds(record, name) for record in rounds])
            if values.any():
                axes.stairs(base + values, _edges(rounds), baseline=base, fill=True, color=colour, lw=0)
                seen.add(name)
            base = base + values
        axes.set_ylim(bottom=0)
    shown = [name for name in parts if name in seen] or ["train"]
    legend_above(figure, [Patch(color=parts[name]) for name in shown], shown)
    return figure


def _seconds(record: RoundRecord, name: str) -> float:
    if name == "not split":
        split = record.seconds_train + record.seconds_aggregate + record.seconds_gate + record.seconds_evaluate
        rest = record.seconds - split
        return rest if rest > 0.01 * record.seconds else 0.0
    return getattr(record, f"seconds_{name}")
