"""One shape's measurements in a process of its own, told line by line in JSON; `benchmarks/rules.py` starts it."""

import argparse
import json
import sys
from typing import Any, TextIO

import torch

from benchmarks.rule_peers import Case, byzfl, flower, hawthorn, limits
from benchmarks.rule_peers.measure import Measured, compete

PEERS = {"hawthorn": hawthorn, "byzfl": byzfl, "flower": flower}


def main() -> None:
    """Measure the rows asked for; the limits are measured beside every row, in turns with it."""
    parser = argparse.ArgumentParser()
    for name in ("clients", "params", "repeats", "descriptor"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--patience", type=float, required=True)
    parser.add_argument("--rows", required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = Case.make(options.clients, options.params)
    with open(options.descriptor, "w", encoding="utf-8") as lines:
        for row in options.rows.split(";"):
            tell(lines, row, case, options.repeats, options.patience)


def tell(lines: TextIO, row: str, case: Case, repeats: int, patience: float) -> None:
    """Measure one row and write it as a line."""
    calls = {name: peer.prepare(row, case) for name, peer in PEERS.items()}
    calls |= {name: limits.prepare(name, case) for name in limits.ROWS}
    outcomes = compete(calls, repeats, patience)
    ours = outcomes["hawthorn"].result
    told = {name: facts(outcome, ours, case) for name, outcome in outcomes.items()}
    lines.write(json.dumps({"row": row, "hawthorn": hawthorn.text(row, case), "outcomes": told}) + "\n")
    lines.flush()


def facts(outcome: Measured, ours: torch.Tensor | None, case: Case) -> dict[str, Any]:
    """Return what is told of one contestant; memory as a multiple of the stack, the stack included."""
    stack = case.updates.numel() * case.updates.element_size()
    memory = None if outcome.extra is None else 1 + outcome.extra / stack
    apart = None
    if outcome.result is not None and ours is not None and outcome.result is not ours:
        apart = float((outcome.result.double() - ours.double()).norm() / ours.double().norm())
    return {"seconds": outcome.seconds, "median": outcome.median, "memory": memory, "apart": apart,
            "reason": outcome.reason}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
