"""The tables of `benchmarks/rounds.py`: absolute numbers, ratios, which targets are met, and what limits."""

import os
from collections.abc import Mapping
from statistics import mean
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from benchmarks.meter import Round
from benchmarks.workloads import Workload

MIB = 2**20


class Measurements(Protocol):
    """What is shown of one way; times are medians in seconds."""

    way: str
    steady: list[Round]
    peak: int

    @property
    def seconds(self) -> float: ...
    @property
    def cpu(self) -> float: ...
    @property
    def first_seconds(self) -> float: ...
    def part(self, name: str) -> float | None: ...


def show(
    console: Console, work: Workload, outcomes: Mapping[str, Measurements], distances: Mapping[str, float]
) -> dict[str, Any]:
    """Print a workload's table, targets and limits; return the targets and limits for JSON."""
    console.print(table(work, outcomes, distances))
    targets = judge(work, outcomes)
    for text, value, met in targets:
        console.print(f"  {'met   ' if met else 'MISSED'}  {text}: {value}", style="green" if met else "bold red")
    limits = find_limits(work, outcomes)
    for line in limits:
        console.print(f"  limit   {line}", soft_wrap=True)
    return {"targets": [{"target": t, "value": v, "met": m} for t, v, m in targets], "limits": limits}


def table(work: Workload, outcomes: Mapping[str, Measurements], distances: Mapping[str, float]) -> Table:
    """Return the table of one workload, everything also by the plain loop's numbers."""
    rounds = max(len(o.steady) for o in outcomes.values())
    title = (
        f"{work.name}: {work.model} on {work.dataset}, {work.clients} clients x {work.samples} samples, "
        f"medians of {rounds} rounds"
    )
    columns = ("way", "s/round", "x plain", "CPU s/round", "x plain", "first round s", "peak MiB", "model differs by")
    sheet = Table(*columns, title=title)
    for column in sheet.columns[1:]:
        column.justify = "right"
    plain = outcomes.get("plain")
    for way, o in outcomes.items():
        wall, cpu = (f"{o.seconds / plain.seconds:.2f}", f"{o.cpu / plain.cpu:.2f}") if plain else ("-", "-")
        distance = f"{distances[way]:.0e}" if way in distances else "-"
        numbers = (f"{o.seconds:.4f}", wall, f"{o.cpu:.4f}", cpu, f"{o.first_seconds:.2f}", f"{o.peak / MIB:.0f}")
        sheet.add_row(way, *numbers, distance)
    return sheet


def judge(work: Workload, outcomes: Mapping[str, Measurements]) -> list[tuple[str, str, bool]]:
    """Return (target, what came, met) for every target whose ways were measured."""
    plain, ray = outcomes.get("plain"), outcomes.get("flower-ray")
    one, two = outcomes.get("hawthorn-1"), outcomes.get("hawthorn-2")
    found: list[tuple[str, str, bool]] = []

    def at_most(text: str, value: float, limit: float) -> None:
        found.append((f"{text} at most {limit:.2f}x", f"{value:.2f}x", value <= limit))

    def at_least(text: str, value: float, limit: float) -> None:
        found.append((f"{text} at least {limit:.1f}x", f"{value:.2f}x", value >= limit))

    if one and plain:
        at_most("CPU time of 1 worker by the plain loop's", one.cpu / plain.cpu, 1.1)
    if two and plain:
        at_most("CPU time of 2 workers by the plain loop's", two.cpu / plain.cpu, 1.1)
        at_least("rounds with 2 workers faster than the plain loop", plain.seconds / two.seconds, 1.7)
    if two and ray:
        at_least("rounds faster than Flower on Ray", ray.seconds / two.seconds, 5.0 if work.name == "tiny" else 1.0)
        at_least("end of the first round sooner than Flower on Ray", ray.first_seconds / two.first_seconds, 4.0)
        at_most("peak memory by that of Flower on Ray", two.peak / ray.peak, 1 / 3)
    return found


def find_limits(work: Workload, outcomes: Mapping[str, Measurements]) -> list[str]:
    """Say what keeps two workers from halving the round: the machine, the engine's work per client, or its rounds."""
    plain, hand = outcomes.get("plain"), outcomes.get("by-hand")
    one, two = outcomes.get("hawthorn-1"), outcomes.get("hawthorn-2")
    lines = []
    if plain and hand:
        lines.append(
            f"the machine: two bare processes sharing memory are {plain.seconds / hand.seconds:.2f}x as fast as one "
            f"for {hand.cpu / plain.cpu:.2f}x its CPU time"
        )
    if plain and one:
        extra = 1e6 * (one.cpu - plain.cpu) / work.clients
        lines.append(
            f"per client: 1 worker uses {extra:+.0f} us of CPU time on top of the plain loop's {us(plain, work)}"
        )
    if one and two:
        extra = 1e6 * (two.cpu - one.cpu) / work.clients
        lines.append(f"per client: 2 workers use {extra:+.0f} us on top of 1 worker's {us(one, work)} (pipes, caches)")
    if two and (train := two.part("train")) is not None and (aggregate := two.part("aggregate")) is not None:
        rest = two.seconds - train - aggregate
        shares = (("clients", train), ("checks and rule", aggregate), ("run record", rest))
        parts = ", ".join(f"{name} {1e3 * value:.1f} ms ({value / two.seconds:.0%})" for name, value in shares)
        lines.append(f"a round of 2 workers: {parts}; the parent does the last two alone")
    if others := [r.others / r.seconds for o in outcomes.values() for r in o.steady if r.seconds > 0.05]:
        lines.append(f"other people's work took {mean(others):.2f} of {os.cpu_count()} cores while this was measured")
    return lines


def us(outcome: Measurements, work: Workload) -> str:
    """Return CPU microseconds per client and round, as text."""
    return f"{1e6 * outcome.cpu / work.clients:.0f}"
