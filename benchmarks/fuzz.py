"""Bad input in bulk: replies of clients, settings, and what the certification service is sent.

    python benchmarks/fuzz.py [--cases 20000] [--seed 1] [--only replies,settings,models,messages] [--json OUT]

What must hold for every case:

    replies    no exception; every reply is used or dropped with a reason; the new model is finite; and the honest
               clients outvote: the model stays within their own spread of it, coordinate by coordinate (rule median)
    settings   `RunConfig.read`, experiment files and components answer, or refuse with `HawthornError`
    models     bytes that spoil a safetensors file: read, or refused with `HawthornError`; what is read is finite
    messages   protobuf messages spoiled bit by bit or made of odd numbers: read, or refused as the request's fault

Exits with 1 on the first kind that has a case which breaks its promise, and prints that case.
"""

import argparse
import json
import logging
import math
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import torch

from benchmarks.fuzzing import replies, service, settings
from benchmarks.fuzzing.case import Outcome, Place

# What is fuzzed: function and share of the cases.
KINDS: dict[str, tuple[Callable[[random.Random], Outcome], float]] = {
    "replies": (replies.fuzz_reply, 0.3),
    "settings": (settings.fuzz_setting, 0.3),
    "models": (service.fuzz_model, 0.2),
    "messages": (service.fuzz_message, 0.2),
}


def fuzz(kind: str, cases: int, seed: int, folder: Path) -> tuple[Counter[Outcome], str]:
    """Try cases of a kind; return what became of them and, if one broke its promise, which and how."""
    Place.folder = folder
    function, counts = KINDS[kind][0], Counter[Outcome]()
    for number in range(cases):
        try:
            counts[function(random.Random(f"{seed}/{kind}/{number}"))] += 1
        except Exception as error:
            return counts, f"{kind} case {number} of seed {seed}: {type(error).__name__}: {error}"[:600]
    return counts, ""


def main() -> None:
    """Print a line for each kind; exit with 1 where a case broke its promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    whole = sum(KINDS[kind][1] for kind in given.only.split(","))
    with tempfile.TemporaryDirectory(prefix="hawthorn-fuzz-") as folder:
        for kind in given.only.split(","):
            begin, cases = time.perf_counter(), math.ceil(given.cases * KINDS[kind][1] / whole)
            counts, wrong = fuzz(kind, cases, given.seed, Path(folder))
            seconds = time.perf_counter() - begin
            results[kind] = {
                "cases": sum(counts.values()),
                "seconds": round(seconds, 1),
                "counts": counts,
                "broken": wrong,
            }
            said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
            said += f" BROKEN: {wrong}" if wrong else ""
            print(f"{kind}: {sum(counts.values())} cases in {seconds:.0f} s: {said}", flush=True)
    print(f"{sum(result['cases'] for result in results.values())} cases")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))
    sys.exit(any(result["broken"] for result in results.values()))


if __name__ == "__main__":
    main()
