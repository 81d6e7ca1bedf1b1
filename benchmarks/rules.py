"""How fast is a rule? Every rule of Hawthorn beside ByzFL, Flower's strategies and what the machine allows.

    python benchmarks/rules.py [--rules krum,median] [--shapes 10x1e6,50x1e6,100x1e5,200x1e5] [--repeats 5]
                               [--patience 60] [--json OUT]

Float32 on one thread; times are medians of CPU time. Each shape has a process of its own, and in it all contestants of
a row take turns with each other and with the limits: reading the stack once, and its Gram matrix by BLAS's sgemm and
ssyrk. On a machine that others use, trust the ratios. A fifth of the clients attacks, and that is what rules assume
(Bulyan: as many as n >= 4f + 3 allows). Hawthorn and ByzFL start from the stack, Flower's aggregate_train from
messages. A peer that is slow gets fewer repeats; one that is not installed, or would take minutes or the machine's
memory, says so in its cell. ByzFL's geometric median takes 3 steps, or 50 where the row says so; Hawthorn's converges.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.rule_peers import hawthorn

ROOT = Path(__file__).resolve().parents[1]
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
PEERS = ("byzfl", "flower")
LIMITS = ("read", "sgemm", "ssyrk")
SHAPES = "10x1e6,50x1e6,100x1e5,200x1e5"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the rules and shapes asked for and print a table for each shape; returns the exit code."""
    options = read_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 160)
    results = []
    for clients, params in options.shapes:
        title = f"{clients} clients x {params:,} parameters"
        rows = []
        for row in measure(clients, params, options.rules, options.repeats, options.patience):
            rows.append(row)
            console.print(f"{title}: {row['row']} {milliseconds(row['outcomes']['hawthorn'])}", style="dim")
        console.print(table(title, rows))
        results.append({"clients": clients, "params": params, "rows": rows})
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    known = hawthorn.rows()
    summary, details = (__doc__ or "").split("\n\n", 1)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    parser.add_argument("--rules", default="", help="rows, joined with commas; a rule's name takes all rows with it")
    parser.add_argument("--shapes", default=SHAPES, help="CLIENTSxPARAMETERS, joined with commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--patience", type=float, default=60.0, help="most seconds for all repeats of one cell")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    wanted = [name for name in options.rules.split(",") if name]
    parts = {row: {row, *(part.split(",")[0] for part in row.split(" | "))} for row in known}
    if unknown := [name for name in wanted if not any(name in names for names in parts.values())]:
        parser.error(f"unknown rule {', '.join(unknown)}; there are: {'; '.join(known)}")
    options.rules = [row for row in known if not wanted or parts[row] & set(wanted)]
    try:
        options.shapes = [tuple(int(float(number)) for number in text.split("x")) for text in options.shapes.split(",")]
    except ValueError:
        parser.error(f"cannot read --shapes {options.shapes}: write it like {SHAPES}")
    if any(len(shape) != 2 or min(shape) < 1 for shape in options.shapes) or options.repeats < 1:
        parser.error("a shape is CLIENTSxPARAMETERS, and repeats are at least 1")
    return options


def measure(clients: int, params: int, rows: list[str], repeats: int, patience: float) -> Iterator[dict[str, Any]]:
    """Yield what the process of one shape tells of each row."""
    reading, writing = os.pipe()
    settings = {"clients": clients, "params": params, "repeats": repeats, "patience": patience, "descriptor": writing}
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.rule_peers", *flags, f"--rows={';'.join(rows)}"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **ONE_THREAD}, pass_fds=(writing,))
    os.close(writing)
    try:
        with open(reading, encoding="utf-8") as lines:
            yield from map(json.loads, lines)
        if process.wait():
            raise SystemExit(f"the measuring process ended with code {process.returncode}")
    finally:
        process.kill()
        process.wait()


def table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Return the table of one shape."""
    limits = [limit_of(rows, name) for name in LIMITS]
    said = ", ".join(f"{name} {milliseconds({'median': value})}" for name, value in zip(LIMITS, limits))
    sheet = Table(title=f"{title}: single-thread CPU time, and memory in stacks\nlimits of the machine: {said}")
    sheet.add_column("rule")
    for heading in ("Hawthorn ms", "x read", "x ssyrk", "ByzFL x", "Flower x", "memory", "ByzFL", "Flower"):
        sheet.add_column(heading, justify="right", overflow="fold")
    for row in rows:
        outcomes = row["outcomes"]
        ours = outcomes["hawthorn"]
        cells = [milliseconds(ours), *(by(ours, outcomes[name]) for name in ("read", "ssyrk"))]
        cells += [by(outcomes[name], ours) for name in PEERS]
        cells += [stacks(outcomes[name]) for name in ("hawthorn", *PEERS)]
        sheet.add_row(escape(row["row"]), *map(escape, cells))
    return sheet


def limit_of(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    """Return the least of the medians that were measured beside the rows."""
    return min((row["outcomes"][name]["median"] for row in rows), default=None)


def milliseconds(outcome: dict[str, Any]) -> str:
    """Return a contestant's time, or why it has none."""
    return outcome.get("reason", "") if outcome["median"] is None else f"{outcome['median'] * 1e3:.3g}"


def by(outcome: dict[str, Any], other: dict[str, Any]) -> str:
    """Return how many times as long one contestant takes as another, measured in turns; or why not."""
    if outcome["median"] is None:
        return outcome["reason"] or "-"
    return f"{outcome['median'] / other['median']:.3g}" if other["median"] else "-"


def stacks(outcome: dict[str, Any]) -> str:
    """Return the memory of one contestant, its input included."""
    return "-" if outcome["memory"] is None else f"{outcome['memory']:.2f}"


if __name__ == "__main__":
    sys.exit(main())
