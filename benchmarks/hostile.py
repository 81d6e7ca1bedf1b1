"""What hostile replies do to a round, rule by rule: the whole strategy, from Flower messages to the new model.

    python benchmarks/hostile.py [--rules krum,median] [--json OUT]

Fourteen clients answer, three of them with one kind of hostile reply (for `zero claims` all of them). A cell says what
became of it: `dropped`, with the reason in the record, and how far the new model is from the honest clients' mean in
units of the largest distance of an honest update to it; `used` where nothing is wrong with the reply but its size; or
`skipped`, the model stays. `nan` or `crash` is a failure.
"""

import argparse
import json
import logging
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.grid import AnsweringGrid
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from strategies.rule import WeightRule
from tasks import spec
from tasks.params import Layout
from tasks.rng import generator
from tasks.wire import to_record

NUM_CLIENTS, HOSTILE = 14, (2, 5, 8)
LAYOUT = Layout(("conv.weight", "fc.weight", "fc.bias"), ((5, 4), (10, 48), (0,)), 500)
ARGUMENTS = {  # what the rules are tried with where num_byzantine alone is not enough
    "monna": "trusted=0", "weak_dp": "max_norm=30.0, std=0.0", "rlr": "threshold=6", "flame": "noise=0.0",
}  # fmt: skip
MOST_BYZANTINE = {"bulyan": 2}  # n >= 4f + 3

FAILED = ("nan", "crash")

Edit = Callable[[dict[str, Any], dict[str, Any]], None]  # changes arrays and metrics of a reply in place


def _fill(value: float) -> Edit:
    return lambda arrays, metrics: arrays.update({k: np.full_like(v, value) for k, v in arrays.items()})


def _one_nan(arrays: dict[str, Any], metrics: dict[str, Any]) -> None:
    arrays["fc.weight"] = arrays["fc.weight"].copy()
    arrays["fc.weight"].flat[7] = np.nan


def _claim(value: float) -> Edit:
    return lambda arrays, metrics: metrics.update({"num-examples": value})


KINDS: dict[str, Edit] = {
    "one NaN": _one_nan,
    "all NaN": _fill(math.nan),
    "infinite": _fill(math.inf),
    "1e30": _fill(1e30),
    "100x boost": lambda arrays, metrics: arrays.update({k: 100 * v for k, v in arrays.items()}),
    "shape": lambda arrays, metrics: arrays.update({"conv.weight": np.zeros((4, 5), np.float32)}),
    "float64": lambda arrays, metrics: arrays.update({k: v.astype(np.float64) for k, v in arrays.items()}),
    "strings": lambda arrays, metrics: arrays.update({"conv.weight": np.full((5, 4), "model")}),
    "missing key": lambda arrays, metrics: arrays.pop("conv.weight"),
    "extra key": lambda arrays, metrics: arrays.update({"extra": np.zeros(1, np.float32)}),
    "no arrays": lambda arrays, metrics: arrays.clear(),
    "extra metric": lambda arrays, metrics: metrics.update({"backdoor": [1.0, math.nan]}),
    "claims 1e12": _claim(1e12),
    "zero claims": _claim(0),
    "claims -5": _claim(-5),
    "claims NaN": _claim(math.nan),
    "error": lambda arrays, metrics: None,
}


@dataclass(frozen=True)
class Cell:
    """What became of one kind of hostile reply under one rule."""

    outcome: str  # dropped, used, skipped, nan or crash
    moved: float | None = None  # distance to the honest mean by the honest radius
    reason: str = ""

    def __str__(self) -> str:
        return self.outcome if self.moved is None else f"{self.outcome}, {self.moved:.2f} R"


class Replies(AnsweringGrid):
    """A grid of fourteen clients, of which some reply as `kind` says."""

    def __init__(self, kind: str, updates: Tensor) -> None:
        super().__init__(NUM_CLIENTS)
        self.kind, self.updates = kind, updates

    def train(self, message: Message, client: int) -> Message:
        hostile = client in HOSTILE or self.kind == "zero claims"
        if hostile and self.kind == "error":
            return Message(Error(1, "out of memory"), reply_to=message)
        record = to_record(self.updates[client], LAYOUT)
        arrays: dict[str, Any] = {key: record[key].numpy() for key in record}
        metrics: dict[str, Any] = {"num-examples": 10}
        if hostile and self.kind:
            KINDS[self.kind](arrays, metrics)
        content = {
            "arrays": ArrayRecord({key: Array(value) for key, value in arrays.items()}),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)


def updates() -> Tensor:
    """Return the honest updates of all clients (``[clients, params]``)."""
    draw = generator(1, "hostile")
    return torch.randn(LAYOUT.num_params, generator=draw) + torch.randn(NUM_CLIENTS, LAYOUT.num_params, generator=draw)


def rule_text(name: str) -> str:
    """Return a rule with the arguments it is tried with."""
    given = [ARGUMENTS[name]] if name in ARGUMENTS else []
    if "num_byzantine" in spec.hyper_parameters(spec.find("rule", name)):
        given.append(f"num_byzantine={MOST_BYZANTINE.get(name, len(HOSTILE))}")
    return f"{name}({', '.join(given)})"


def counts_claims(name: str) -> bool:
    """Whether the samples that clients claim can scale a rule's weights."""
    function = spec.find("rule", name)
    return isinstance(function, WeightRule) and function.takes_claims


def try_kind(name: str, kind: str) -> Cell:
    """Play one round under a rule with three hostile replies of a kind."""
    rule, honest = spec.resolve("rule", rule_text(name)), updates()
    claimed = "claim" in kind and counts_claims(name)
    strategy = RobustStrategy(
        pipeline=Pipeline(rule),
        step=ServerStep(spec.resolve("optimizer", "step()")),
        layout=LAYOUT,
        population=Population(NUM_CLIENTS),
        sample=lambda here, number: sorted(here),
        root=lambda start, number: honest.mean(0),
        client_weights="claimed" if claimed else "uniform",
    )
    grid = cast(Grid, Replies(kind, honest))
    try:
        start = to_record(torch.zeros(LAYOUT.num_params), LAYOUT)
        messages = list(strategy.configure_train(1, start, ConfigRecord(), grid))
        strategy.aggregate_train(1, grid.send_and_receive(messages, timeout=5))
    except Exception as error:  # a crash is what this looks for
        return Cell("crash", reason=f"{type(error).__name__}: {error}")
    outcome = strategy.outcome
    if outcome.skipped:
        return Cell("skipped", reason=outcome.skipped)
    if not bool(strategy.model.isfinite().all()):
        return Cell("nan")
    good = honest[[client for client in range(NUM_CLIENTS) if client not in HOSTILE]]
    centre = good.mean(0)
    moved = float((strategy.model - centre).norm() / (good - centre).norm(dim=1).max())
    reasons = sorted(set(outcome.dropped.values()))
    return Cell("dropped" if outcome.dropped else "used", moved, "; ".join(reasons))


def table(cells: dict[str, dict[str, Cell]]) -> Table:
    """Return kinds as rows and rules as columns."""
    shown = Table("reply", *cells, title=f"{len(HOSTILE)} hostile replies of {NUM_CLIENTS}; R: radius of the honest")
    for kind in KINDS:
        shown.add_row(kind, *(str(row[kind]) for row in cells.values()))
    return shown


def main() -> None:
    """Print the table; exit with 1 if a cell is a failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", default=",".join(spec.names("rule")))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    cells = {name: {kind: try_kind(name, kind) for kind in KINDS} for name in given.rules.split(",")}
    names, console = list(cells), Console(width=170)
    for first in range(0, len(names), 7):
        console.print(table({name: cells[name] for name in names[first : first + 7]}))
    if given.json:
        given.json.write_text(
            json.dumps({r: {k: vars(c) for k, c in row.items()} for r, row in cells.items()}, indent=2)
        )
    failed = [f"{r}, {k}: {c.reason}" for r, row in cells.items() for k, c in row.items() if c.outcome in FAILED]
    print("\n".join(failed) or "no crash and no NaN; every reply was used, or dropped with a reason")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
