"""How fast is a round? Hawthorn's in-process engine beside a plain PyTorch loop and Flower's simulation on Ray.

    python benchmarks/rounds.py [--workload tiny,cnn12k,cnn431k] [--clients 100] [--samples 600] [--rounds 5]
                                [--repeats 1] [--skip ray] [--json OUT]

Every way does the same work: same data, models, batches, starting point, all clients in every round, one torch thread
per training process (plain-2-threads apart), accuracy measured once, before round 1. That the final models agree is
checked. Real MNIST is used where HAWTHORN_DATA or the cache has it.

Each measurement has a fresh process. Memory is sampled in runs of their own, of two rounds. For time, the ways
without Ray take turns, round by round, each idle while another works; the Ray ways run alone afterwards, as an idle
Ray is never quite idle. Medians are over the rounds after the first, of all repeats.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import numpy as np
from rich.console import Console

from benchmarks.meter import Measured, Round, python
from benchmarks.rounds_report import show
from benchmarks.workloads import MODELS, Workload, workload

SIDE_BY_SIDE = ("plain", "plain-2-threads", "by-hand", "hawthorn-1", "hawthorn-2")
ALONE = ("flower-ray", "hawthorn-ray")
# Distance of two final models by the distance trained. Float32 sums in another order differ by 1e-7 after one step, and
# training a network makes that grow by the round; other batches or another rate differ by more than half.
TOLERANCE = 2e-2


@dataclass
class Outcome:
    """What was measured of one way."""

    way: str
    first: list[Round] = field(default_factory=list)  # counted from the start of the process; one per repeat
    steady: list[Round] = field(default_factory=list)
    peak: int = 0  # bytes
    model: np.ndarray = field(default_factory=lambda: np.empty(0))

    @property
    def seconds(self) -> float:
        """Median wall seconds of a steady round."""
        return median(r.seconds for r in self.steady)

    @property
    def cpu(self) -> float:
        """Median CPU seconds of a steady round."""
        return median(r.cpu for r in self.steady)

    @property
    def first_seconds(self) -> float:
        """Median seconds from the start of the process to the end of round 1."""
        return median(r.seconds for r in self.first)

    def part(self, name: str) -> float | None:
        """Median seconds of a part of the steady rounds; None if this way does not tell."""
        values = [r.parts[name] for r in self.steady if name in r.parts]
        return median(values) if values else None

    def facts(self) -> dict[str, Any]:
        """Return everything but the model, for JSON."""
        rounds = {key: [dataclasses.asdict(r) for r in getattr(self, key)] for key in ("first", "steady")}
        medians = {"seconds": self.seconds, "cpu": self.cpu, "first_seconds": self.first_seconds}
        return {"way": self.way, **medians, "peak_bytes": self.peak, **rounds}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the workloads asked for and print a table for each; returns the exit code."""
    options = read_options(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    results = []
    for name in options.workload:
        work = workload(name, options.clients, options.samples, options.rounds + 1)
        outcomes = measure(work, options.ways, options.repeats, lambda text: console.print(text, style="dim"))
        distances = compare_models(outcomes, work)
        facts = show(console, work, outcomes, distances)
        ways = [{**o.facts(), "model_distance": distances.get(o.way)} for o in outcomes.values()]
        results.append({"workload": dataclasses.asdict(work), **facts, "ways": ways})
        if options.json:
            options.json.write_text(json.dumps(results, indent=2) + "\n")
        refuse_other_work(distances)
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, details = (__doc__ or "").split("\n\n", 1)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    parser.add_argument("--workload", default=",".join(MODELS), help="workloads, joined with commas")
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--samples", type=int, default=600, help="per client; the data set is repeated if need be")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, after the first")
    parser.add_argument("--repeats", type=int, default=1, help="fresh starts of everything")
    parser.add_argument("--skip", default="", help="leave out ways with these words in their names, such as ray")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    options = parser.parse_args(arguments)
    options.workload = [name for name in options.workload.split(",") if name]
    if unknown := set(options.workload) - set(MODELS):
        parser.error(f"unknown workload {', '.join(sorted(unknown))}; there are: {', '.join(MODELS)}")
    if min(options.clients, options.samples, options.rounds, options.repeats) < 1:
        parser.error("clients, samples, rounds and repeats must be at least 1")
    words = [word for word in options.skip.split(",") if word]
    options.ways = [way for way in (*SIDE_BY_SIDE, *ALONE) if not any(word in way for word in words)]
    if not options.ways:
        parser.error(f"nothing is left to measure; ways are: {', '.join((*SIDE_BY_SIDE, *ALONE))}")
    return options


def measure(work: Workload, ways: Sequence[str], repeats: int, say: Any) -> dict[str, Outcome]:
    """Measure every way: memory first, which also warms the machine's file cache, then time."""
    outcomes = {way: Outcome(way) for way in ways}
    for way in ways:
        say(f"{work.name}: memory of {way}")
        measure_memory(work, outcomes[way])
    for repeat in range(repeats):
        say(f"{work.name}: time, repeat {repeat + 1} of {repeats}")
        measure_time(work, [outcomes[way] for way in ways if way in SIDE_BY_SIDE])
        for way in ways:
            if way in ALONE:
                measure_time(work, [outcomes[way]])
    return outcomes


def measure_memory(work: Workload, outcome: Outcome) -> None:
    """Run two rounds while sampling memory; the second one shows what stays from the first."""
    short = dataclasses.replace(work, rounds=2)
    with started(short, outcome.way) as (process, _):
        process.watch()
        process.first_round()
        process.next_round()
        process.finish()
    outcome.peak = process.peak


def measure_time(work: Workload, outcomes: Sequence[Outcome]) -> None:
    """Start the ways one after the other, each up to the end of round 1; then they take turns."""
    with ExitStack() as stack:
        running = []
        for outcome in outcomes:
            process, folder = stack.enter_context(started(work, outcome.way))
            outcome.first.append(process.first_round())
            running.append((outcome, process, folder))
        for number in range(2, work.rounds + 1):
            order = running if number % 2 else running[::-1]
            for outcome, process, _ in order:
                outcome.steady.append(process.next_round())
        for outcome, process, folder in running:
            process.finish()
            outcome.model = np.load(folder / "model.npy")


@contextmanager
def started(work: Workload, way: str) -> Iterator[tuple[Measured, Path]]:
    """Start a way in a fresh process with a folder of its own, both gone in the end."""
    with tempfile.TemporaryDirectory(prefix="hawthorn-rounds-", ignore_cleanup_errors=True) as name:
        description = json.dumps(dataclasses.asdict(work))
        command = python("-m", "benchmarks.ways", way, "{descriptor}", name, description)
        with Measured(command, Path(name)) as process:
            yield process, Path(name)


def compare_models(outcomes: dict[str, Outcome], work: Workload) -> dict[str, float]:
    """Return each way's distance from the plain loop's final model, by the distance trained."""
    if "plain" not in outcomes:
        return {}
    with tempfile.TemporaryDirectory() as name:
        start = initial_model(work, Path(name))
    wanted = outcomes["plain"].model
    trained = float(np.linalg.norm(wanted - start))
    return {way: float(np.linalg.norm(o.model - wanted)) / trained for way, o in outcomes.items()}


def refuse_other_work(distances: dict[str, float]) -> None:
    """End the program, after its table, if a way's final model is not the plain loop's: its times mean nothing."""
    if wrong := {way: distance for way, distance in distances.items() if not distance <= TOLERANCE}:
        raise SystemExit(f"these ways did other work than the plain loop, by distance of the final models: {wrong}")


def initial_model(work: Workload, folder: Path) -> np.ndarray:
    """Return the model that every way starts from, as a vector."""
    from tasks.task import load

    return load(work.config(folder)).initial_vector().numpy()


if __name__ == "__main__":
    sys.exit(main())
