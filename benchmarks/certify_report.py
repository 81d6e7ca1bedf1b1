"""What the benchmark of certificates is held against, and its tables."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Found = dict[str, Any]
Rows = list[dict[str, Any]]
OURS = {"equal": "Hawthorn, zonotope", "adaptive": "Hawthorn, crown"}  # by the slopes of the relaxation


@dataclass(frozen=True)
class Target:
    """A figure of the benchmark, None where it was not measured, and the least or the most that it should be."""

    name: str
    least: float | None
    most: float | None
    find: Callable[[Found], float | None]

    def judge(self, found: Found) -> dict[str, Any]:
        """Return the target with its figure and whether it is met; None where it was not measured."""
        value = self.find(found)
        wanted = f">= {self.least:g}" if self.least is not None else f"<= {self.most:g}"
        met = None if value is None else value >= self.least if self.least is not None else value <= (self.most or 0.0)
        return {"target": self.name, "wanted": wanted, "value": value, "met": met}


def least_ratio(way: str) -> Callable[[Found], float | None]:
    """Return what finds the least ratio of a way's CPU time to ours over all radii."""
    return lambda found: min((row["x_ours"] for row in _inputs(found) if row["way"] == way), default=None)


def memory_ratio(found: Found) -> float | None:
    """Return Hawthorn's memory by IBM ART's."""
    memory = {row["way"]: row["memory"] for row in _inputs(found)}
    ours, peer = memory.get(OURS["equal"]), memory.get("IBM ART, zonotope")
    return ours / peer if ours is not None and peer else None


def most_off(found: Found) -> float | None:
    """Return the largest difference of a peer's bounds to ours."""
    return max((row["off"] for row in _inputs(found) if not row["way"].startswith("Hawthorn")), default=None)


def of_votes(ratio: str) -> Callable[[Found], float | None]:
    """Return what finds a ratio of the batched votes."""
    return lambda found: next((row[ratio] for row in found["votes"] if row["way"] == "batched noisy weights"), None)


def _inputs(found: Found) -> Rows:
    return found["inputs"].get("rows", [])


TARGETS = (
    Target("zonotope: IBM ART's CPU time by ours, at every eps", 3.0, None, least_ratio("IBM ART, zonotope")),
    Target("same slope: auto_LiRPA's CPU time by ours, at every eps", 2.0, None, least_ratio("auto_LiRPA, same slope")),
    Target("CROWN: auto_LiRPA's CPU time by ours, at every eps", 2.0, None, least_ratio("auto_LiRPA, CROWN")),
    Target("zonotope: our memory by IBM ART's", None, 1.0, memory_ratio),
    Target("bounds of the peers off ours, by max(1, |bound|)", None, 1e-4, most_off),
    Target(
        "votes: CPU time of a loop in the published code's style by ours",
        100.0,
        None,
        of_votes("faster_than_reference"),
    ),
    Target("votes: CPU time of a loop with one pass by ours", 10.0, None, of_votes("faster_than_lean")),
)


def judged(found: Found) -> Rows:
    """Return every target with what was found."""
    return [target.judge(found) for target in TARGETS]


def show(found: Found) -> None:
    """Print the tables."""
    from rich.console import Console  # not at the top: the peers' interpreter need not have it
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)

    def sheet(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(columns):
            table.add_column(name, justify="right" if number else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    measured = found["inputs"]
    if measured:
        about = "" if measured["trained"] else ", NOT trained"
        columns = ("way", "eps", "CPU ms", "wall ms", "x ours", "memory MB", "off", "certified")
        title = f"Bounds on inputs, per point: CFAT's MNIST network{about}, one thread"
        sheet(title, columns, [_input_cells(row) for row in measured["rows"]])
        for name, reason in measured["left_out"].items():
            console.print(f"left out: {name}: {reason}", markup=False, soft_wrap=True)
        if measured["many"]:
            columns = ("method", "eps", "points", "CPU ms", "wall ms", "memory MB", "certified, %", "mean loss")
            sheet("Hawthorn alone, more points, per point", columns, [_many_cells(row) for row in measured["many"]])
        console.print("versions: " + ", ".join(f"{name} {number}" for name, number in measured["versions"].items()))
    if found["votes"]:
        first = found["votes"][0]
        title = f"{first['draws']} votes of {first['points']} points, softmax regression on MNIST, one thread"
        columns = ("way", "CPU s", "wall s", "memory MB", "faster than reference", "than one pass", "off the exact law")
        sheet(title, columns, [_vote_cells(row) for row in found["votes"]])
    verdict = {True: "[green]met", False: "[red]missed", None: "not measured"}
    rows = [(t["target"], t["wanted"], _number(t["value"]), verdict[t["met"]]) for t in found["targets"]]
    sheet("Targets" + (" (--quick: no measurement)" if found["quick"] else ""), ("", "wanted", "found", ""), rows)


def _input_cells(row: dict[str, Any]) -> list[str]:
    numbers = (f"{row['eps']:g}", f"{1e3 * row['cpu']:.1f}", f"{1e3 * row['wall']:.1f}", f"{row['x_ours']:.2f}")
    memory = "-" if row["memory"] is None else f"{row['memory'] / 1e6:.0f}"
    return [row["way"], *numbers, memory, f"{row['off']:.1e}", f"{row['certified']} of {row['points']}"]


def _many_cells(row: dict[str, Any]) -> list[str]:
    numbers = (f"{row['eps']:g}", str(row["points"]), f"{row['cpu']:.1f}", f"{row['wall']:.1f}", f"{row['memory']:.0f}")
    return [row["method"], *numbers, f"{100 * row['certified_accuracy']:.1f}", f"{row['mean_loss']:.4g}"]


def _vote_cells(row: dict[str, Any]) -> list[str]:
    way = row["way"] if row["models_run"] is None else f"{row['way']} ({row['models_run']} models, scaled)"
    seconds = (f"{row['cpu']:.3f}", f"{row['wall']:.3f}", f"{row['memory'] / 1e6:.0f}")
    ratios = (f"{row['faster_than_reference']:,.1f}", f"{row['faster_than_lean']:,.1f}")
    return [way, *seconds, *ratios, f"{row['disagreement']:.4f}"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
