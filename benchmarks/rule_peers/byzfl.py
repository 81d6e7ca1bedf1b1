"""ByzFL (https://github.com/LPD-EPFL/byzfl), its aggregators and pre-aggregators on torch tensors.

They are imported from their own modules: ByzFL's front also imports its training code, and with it packages that
rules do not need.
"""

import functools
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from benchmarks.rule_peers import Call, Case

MOST_SETS = 1e5  # MDA and SMEA try all sets of n - f clients; these many take about a minute
SHARE_OF_MEMORY = 0.6

RULES: dict[str, Callable[[Any, int], list[Any]]] = {
    "mean": lambda b, f: [b.Average()],
    "median": lambda b, f: [b.Median()],
    "trimmed_mean": lambda b, f: [b.TrMean(f)],
    "krum": lambda b, f: [b.Krum(f)],
    "multi_krum": lambda b, f: [b.MultiKrum(f)],
    "geometric_median": lambda b, f: [b.GeometricMedian()],
    "geometric_median, 50 steps": lambda b, f: [b.GeometricMedian(T=50)],
    "centered_clipping": lambda b, f: [b.CenteredClipping(L=5)],
    "meamed": lambda b, f: [b.Meamed(f)],
    "caf": lambda b, f: [b.CAF(f)],
    "monna": lambda b, f: [b.MoNNA(f)],
    "mda": lambda b, f: [b.MDA(f)],
    "smea": lambda b, f: [b.SMEA(f)],
    "nearest_neighbours | mean": lambda b, f: [b.NNM(f), b.Average()],
    "nearest_neighbours | median": lambda b, f: [b.NNM(f), b.Median()],
    "nearest_neighbours | geometric_median": lambda b, f: [b.NNM(f), b.GeometricMedian()],
    "bucketing | mean": lambda b, f: [b.Bucketing(2), b.Average()],
    "bucketing | median": lambda b, f: [b.Bucketing(2), b.Median()],
    "arc | mean": lambda b, f: [b.ARC(f), b.Average()],
    "clip_norms | mean": lambda b, f: [b.Clipping(100.0), b.Average()],
}


def prepare(row: str, case: Case) -> Call | str:
    """Return ByzFL's rule or chain of the same name."""
    if row not in RULES:
        return ""
    if (library := find()) is None:
        return "byzfl is not installed"
    n, d = case.updates.shape
    if row in ("mda", "smea") and (sets := math.comb(n, case.f)) > MOST_SETS:
        return f"would try {sets:.0e} sets"
    if row.startswith("nearest_neighbours") and (needed := 4 * n * (n - case.f) * d) > SHARE_OF_MEMORY * free_memory():
        return f"needs {needed / 1e9:.0f} GB"

    def fresh() -> list[Any]:
        return RULES[row](library, case.f)  # anew, as centered clipping starts where it ended

    def run(steps: list[Any]) -> Tensor:
        vectors = case.updates
        for step in steps:
            vectors = step(vectors)
        return vectors

    return Call(run, fresh)


@functools.cache
def find() -> Any:
    """Return an object with all rules by their names; None if ByzFL is not installed."""
    if (package := importlib.util.find_spec("byzfl")) is None:
        return None
    front = sys.modules["byzfl"] = importlib.util.module_from_spec(package)  # not executed
    front.__path__ = list(package.submodule_search_locations or [])
    library = ModuleType("rules")
    for name in ("preaggregators", "aggregators"):
        vars(library).update(vars(importlib.import_module(f"byzfl.aggregators.{name}")))
    return library


def free_memory() -> float:
    """Return the bytes of memory that a new process can have."""
    with open("/proc/meminfo") as lines:
        fields = dict(line.split(":") for line in lines)
    return float(fields["MemAvailable"].split()[0]) * 1024
