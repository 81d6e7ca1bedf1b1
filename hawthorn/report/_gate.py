"""The gate's timeline: what every candidate measured, whether it was taken, why not; and the quorum's arithmetic."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from certify.quorum import Quorum, median_tolerates
from hawthorn.compare import DASH
from hawthorn.report._curves import PlainNumbers
from hawthorn.report._style import (
    ATTACK,
    COLOURS,
    GREY,
    MARKERS,
    WIDE,
    legend_above,
    new_figure,
    round_axis,
    run_labels,
    shorten_middle,
)
from hawthorn.report._tables import MAX_LINES, Grid, kind_of
from server.record import RoundRecord, RunRecord

MANY = 60  # rounds above which the table leaves accepted ones out
DECIDED = ("accepted", "rejected")
REASONS = 3  # shown of one decision
LOST = "#1A1A1A"
ACCURACIES = {
    "normal_accuracy": "normal",
    "pgd_accuracy": "PGD",
    "margin_pgd_accuracy": "margin-loss PGD",
    "temperature_pgd_accuracy": "temperature PGD",
}
Points = list[tuple[int, bool, float]]  # round, accepted, value


def gated(runs: Sequence[RunRecord]) -> list[RunRecord]:
    """Return the runs whose gate decided at least once."""
    return [run for run in runs if any(record.gate for record in run.rounds)]


def draw_gate(run: RunRecord, label: str) -> Figure | None:
    """Draw one run's candidates: accuracies above, mean certifiable loss (log) below; None where none was measured."""
    records = [record for record in run.rounds if record.gate]
    accuracies = {name: _points(run, key) for key, name in ACCURACIES.items()}
    radii = _radii(records)
    accuracies |= {f"certified at {eps:g}": _points(run, "certified_accuracy", eps) for eps in radii}
    losses = {f"loss at {eps:g}": _points(run, "mean_loss", eps) for eps in radii}
    accuracies = {name: points for name, points in accuracies.items() if points}
    if not accuracies:
        return None
    figure = new_figure(WIDE, 6.2)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2]).tolist()
    handles: dict[str, Artist] = {}
    for place, (name, points) in enumerate(accuracies.items()):
        shown = [(number, taken, 100 * value) for number, taken, value in points]
        handles[name] = _line(upper, shown, place)
    for place, points in enumerate(losses.values(), start=len(accuracies) - len(losses)):
        _line(lower, [(n, taken, max(value, 1e-9)) for n, taken, value in points], place)  # a log axis has no 0
    upper.set_title(shorten_middle(label, 100), pad=12)
    upper.set_ylabel("accuracy of the candidate, %")
    upper.set_ylim(-3, 103)
    lower.set_ylabel("mean certifiable loss")
    if any(value > 0 for points in losses.values() for _, _, value in points):
        lower.set_yscale("log")
        for set_formatter in (lower.yaxis.set_major_formatter, lower.yaxis.set_minor_formatter):
            set_formatter(PlainNumbers(minor_thresholds=(1.2, 0.5)))
        lower.tick_params(axis="y", which="minor", labelsize=8)
    _spans((upper, lower), records)
    last = max(record.round for record in run.rounds)
    round_axis(upper, last)
    round_axis(lower, last)
    upper.set_xlabel("")
    legend_above(figure, [*handles.values(), *_MARKS.values()], [*handles, *_MARKS])
    return figure


_MARKS: dict[str, Artist] = {
    "rejected": Line2D([], [], color=GREY, marker="X", markersize=6, markerfacecolor="white", linestyle=""),
    "round rejected": Patch(color=ATTACK, alpha=0.13),
    "no decision, round skipped": Patch(color=LOST, alpha=0.22),
    "somebody attacked": Line2D([], [], color=ATTACK, marker="v", markersize=6, linestyle=""),
}


def _line(axes: Axes, points: Points, place: int) -> Line2D:
    """Draw a metric: a line through the accepted candidates, which are the model, and crosses at the rejected ones."""
    colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
    taken = [(number, value) for number, accepted, value in points if accepted]
    size = 4 if len(points) <= MANY else 0
    (line,) = axes.plot(*_columns(taken), color=colour, marker=marker, markersize=size, lw=1.3)
    refused = [(number, value) for number, accepted, value in points if not accepted]
    axes.plot(*_columns(refused), color=colour, marker="X", markersize=7, markerfacecolor="white", linestyle="")
    return line


def _columns(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _spans(panels: Sequence[Axes], records: Sequence[RoundRecord]) -> None:
    """Shade rounds that the gate refused, in another colour those that it could not decide on; mark attacks."""
    for record in records:
        gate = record.gate or {}
        if gate.get("accepted") is False:
            colour, alpha = (LOST, 0.22) if gate.get("metrics") is None else (ATTACK, 0.13)
            for axes in panels:
                axes.axvspan(record.round - 0.5, record.round + 0.5, color=colour, alpha=alpha, lw=0)
    attacks = [record.round for record in records if record.attacking]
    top = panels[0].get_xaxis_transform()
    panels[0].plot(attacks, np.full(len(attacks), 1.0), "v", color=ATTACK, markersize=6, transform=top, clip_on=False)


def _radii(records: Sequence[RoundRecord]) -> list[float]:
    found = {bound["eps"] for r in records if (m := (r.gate or {}).get("metrics")) for bound in m["bounds"]}
    return sorted(found)


def _points(run: RunRecord, key: str, eps: float | None = None) -> Points:
    """Return (round, accepted, value) where a metric was measured and is finite; round 0 is a model that was given."""
    start = (run.initial or {}).get("gate")
    found: Points = []
    for number, gate in [(0, start), *((record.round, record.gate) for record in run.rounds)]:
        value = _value(gate, key, eps)
        if gate and value is not None and np.isfinite(value):
            found.append((number, bool(gate["accepted"]), value))
    return found


def _value(gate: dict[str, Any] | None, key: str, eps: float | None = None) -> float | None:
    metrics = (gate or {}).get("metrics")
    if not metrics:
        return None
    if eps is not None:
        metrics = next((bound for bound in metrics["bounds"] if bound["eps"] == eps), {})
    value = metrics.get(key)
    return None if value is None else float(value)  # "nan" and "inf" are text in the record


def decisions(run: RunRecord) -> Grid:
    """One line per round of a run with a gate: verdict, numbers, reasons; in long runs accepted ones are left out."""
    records = [record for record in run.rounds if record.gate]
    radii = _radii(records)
    probes = [key for key in list(ACCURACIES)[2:] if any(_value(r.gate, key) is not None for r in records)]
    at = ", ".join(f"{eps:g}" for eps in radii)
    head = ["round", "verdict", "normal, %", "PGD, %", *(["PGD on margin, temperature, %"] if probes else [])]
    head += [f"certified at {at}, %", f"mean loss at {at}", "seconds", "reasons; notes"]
    rows, said = [], set[str]()
    for record in records:
        gate = record.gate or {}
        texts = [*_cut(gate["reasons"]), *(note for note in gate["notes"] if _first(note, said))]
        if gate["accepted"] and len(records) > MANY:
            continue
        cells = [_percent(_value(gate, key)) for key in ("normal_accuracy", "pgd_accuracy")]
        cells += [", ".join(_percent(_value(gate, key)) for key in probes)] if probes else []
        cells.append(", ".join(_percent(_value(gate, "certified_accuracy", eps)) for eps in radii))
        cells.append(", ".join(_number(_value(gate, "mean_loss", eps)) for eps in radii))
        rows.append([str(record.round), _verdict(gate), *cells, f"{gate['seconds']:.1f}", "; ".join(texts)])
    hidden = len(records) - len(rows)
    notes = [f"{hidden} accepted rounds are left out."] if hidden else []
    notes += ["A note stands in the first round that it is of."] if said else []
    notes += [f"{len(rows) - MAX_LINES} more lines are not shown."] if len(rows) > MAX_LINES else []
    return Grid(head, rows[:MAX_LINES], frozenset(range(2, len(head) - 1)), " ".join(notes))


def tally(runs: Sequence[RunRecord]) -> Grid:
    """One line per run with a gate: what it accepted and rejected, in rounds with and without attackers."""
    head = ["run", "gate", "accepted", "rejected", "undecided", "on trial", "honest rounds rejected"]
    head += ["attacked rounds accepted", "seconds a decision"]
    rows = []
    for run, label in zip(runs, run_labels(runs)):
        found = [record for record in run.rounds if record.gate]
        if not found:
            continue
        kinds = [_verdict(record.gate or {}).split(",")[0] for record in found]
        honest = [kind for record, kind in zip(found, kinds) if not record.attacking and kind in DECIDED]
        attacked = [kind for record, kind in zip(found, kinds) if record.attacking and kind in DECIDED]
        asked = [record.seconds_gate for record, kind in zip(found, kinds) if kind in DECIDED]
        rows.append(
            [
                label,
                run.config.gate,
                *(str(kinds.count(name)) for name in DECIDED),
                str(kinds.count("no decision")),
                str(kinds.count("on trial")),
                f"{honest.count('rejected')} of {len(honest)}",
                f"{attacked.count('accepted')} of {len(attacked)}" if attacked else "none",
                f"{np.mean(asked):.1f}" if asked else DASH,
            ]
        )
    return Grid(head, rows, frozenset(range(2, 9)))


def quorums(runs: Sequence[RunRecord]) -> Grid:
    """How likely the settings make it that attackers outnumber what a median withstands, and how often they did."""
    head = ["run", "clients", "malicious", "sampled a round", "a median withstands", "a round is dominated, %"]
    head += ["at least one round of the run, %", "dominated rounds, expected", "in fact", "of them attacked"]
    rows = []
    for run, label in zip(runs, run_labels(runs)):
        config, bad = run.config, len(run.config.malicious_ids)
        if not bad:
            continue
        most = median_tolerates(config.num_sampled)
        found = Quorum(num_clients=config.num_clients, malicious=bad, per_round=config.num_sampled, tolerated=most)
        dominated = [record for record in run.rounds if len(record.malicious) > most]
        forced = config.component("attack_schedule")().forced
        chances = [f"{100 * float(found.dominated):.4g}", f"{100 * found.dominated_within(config.num_rounds):.4g}"]
        chances.append(f"{found.expected(config.num_rounds):.4g}")
        rows.append(
            [
                label,
                *map(str, (config.num_clients, bad, config.num_sampled, most)),
                *(["forced", "forced", "forced"] if forced else chances),
                f"{len(dominated)} of {len(run.rounds)}",
                str(sum(len(record.attacking) > most for record in dominated)),
            ]
        )
    return Grid(head, rows, frozenset(range(1, 10)))


def _verdict(gate: dict[str, Any]) -> str:
    if gate.get("accepted"):
        return "accepted"
    back = "" if gate.get("back_to") is None else f", back to {gate['back_to']}"
    if gate.get("accepted") is None:
        return f"on trial{back}"
    return ("no decision" if gate.get("metrics") is None else "rejected") + back


def _cut(reasons: list[str]) -> list[str]:
    """Return the first reasons, and how many there are besides."""
    hidden = len(reasons) - REASONS
    return [*reasons[:REASONS], *([f"{hidden} more reasons in rounds.jsonl"] if hidden > 0 else [])]


def _first(note: str, said: set[str]) -> bool:
    """Whether a note of this kind, numbers aside, was not given before."""
    new = kind_of(note) not in said
    said.add(kind_of(note))
    return new


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{100 * value:.1f}"


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"
