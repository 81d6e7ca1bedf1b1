"""What 1000 votes of 5000 points cost for a softmax regression on MNIST: five ways, one thread, in one run.

    python benchmarks/certification/smoothing.py [--points 5000] [--draws 1000] [--models 3] [--repeats 3] [--json OUT]

The loops do per noisy model what the published CRFL code does (Xie et al., ICML 2021): reload the model, add noise to
every parameter, pass the points through it in batches. "Reference style" also has its passes over the clean test
points, over triggered ones made image by image, and over the points again to note predictions; the lean loop has one
pass. They run for a few models, and their time is scaled to all draws. Everything else runs in full.

CPU seconds are of one thread; wall seconds depend on what else the machine does. Memory is the growth of the
process's peak while a way runs.
"""

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from certify.linear import LinearModel
from certify.network import Network
from certify.smoothing.exact import exact_bounds, exact_votes
from certify.smoothing.logits import sample_linear_votes
from certify.smoothing.sampled import count_votes
from tasks.datasets.mnist import mnist
from tasks.errors import HawthornError
from tasks.model import build
from tasks.models.logistic_regression import logistic_regression
from tasks.rng import generator
from tasks.source import DataSource

SIGMA = 0.01
BATCH_SIZE = 100
TRIGGER = ((23, 25), (24, 24), (25, 23), (25, 25))


@dataclass(frozen=True)
class Row:
    """The cost of one way: seconds for all draws (the best of the repeats), memory, and how it compares."""

    way: str
    cpu: float
    wall: float
    memory: int  # bytes
    models_run: int | None  # where the time is scaled from fewer models; None: run in full
    faster_than_reference: float  # in CPU seconds
    faster_than_lean: float
    disagreement: float  # share of the votes on another class than the exact law gives, averaged over points


@dataclass(frozen=True, eq=False)
class Workload:
    """A trained softmax regression and test points."""

    module: nn.Module
    network: Network
    points: Tensor  # [points, 1, 28, 28]
    labels: Tensor
    num_draws: int


def rows(
    *, num_points: int = 5000, num_draws: int = 1000, loop_models: int = 3, repeats: int = 3,
    data_dir: Path | None = None,
) -> list[Row]:  # fmt: skip
    """Return the cost of every way, measured in turns on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        work = workload(num_points, num_draws, data_dir)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.pt"
            torch.save(work.module.state_dict(), file)
            ways: dict[str, tuple[Callable[[], np.ndarray], int | None]] = {
                "loop, reference style": (lambda: loop(work, file, loop_models, passes=3), loop_models),
                "loop, one pass": (lambda: loop(work, file, loop_models, passes=1), loop_models),
                "batched noisy weights": (lambda: sampled(work), None),
                "logits sampled": (lambda: in_logit_space(work), None),
                "exact, quadrature": (lambda: exact(work), None),
                "margins, no votes": (lambda: margins(work), None),
            }
            return measured(ways, work, repeats)
    finally:
        torch.set_num_threads(threads)


def workload(num_points: int, num_draws: int, data_dir: Path | None) -> Workload:
    """Return CRFL's model after one epoch on MNIST, and the first test points."""
    data = mnist(DataSource.default(data_dir))
    module = build(logistic_regression, (1, 28, 28), 10, generator(1, "model"))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    order = torch.randperm(60_000, generator=generator(1, "order"))
    for inputs, labels in data.batches("train", order, BATCH_SIZE):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(inputs), labels).backward()
        optimizer.step()
    points, labels = data.batch("test", slice(0, num_points))
    return Workload(module.eval(), Network.from_module(module, (1, 28, 28)), points, labels, num_draws)


def loop(work: Workload, file: Path, num_models: int, passes: int) -> np.ndarray:
    """Return shares of votes [points, classes], one model after the other; 3 passes are the published code's."""
    model = copy.deepcopy(work.module)
    dataset = TensorDataset(work.points, work.labels)
    counts = np.zeros((len(work.points), 10), dtype=np.int64)
    with torch.no_grad():
        for number in range(num_models):
            model.load_state_dict(torch.load(file, weights_only=True))
            source = generator(1, "loop", number)
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=source), alpha=SIGMA)
            if passes == 3:
                for inputs, labels in DataLoader(dataset, batch_size=BATCH_SIZE):
                    nn.functional.cross_entropy(model(inputs), labels, reduction="sum").item()
                for inputs, _ in DataLoader(dataset, batch_size=BATCH_SIZE):
                    model(triggered(inputs)).argmax(1).eq(0).sum().item()
            first = 0
            for inputs, _ in DataLoader(dataset, batch_size=BATCH_SIZE):
                votes = model(inputs).argmax(1).numpy()
                counts[np.arange(first, first + len(votes)), votes] += 1
                first += len(votes)
    return counts / num_models


def triggered(inputs: Tensor) -> Tensor:
    """Return a batch with CRFL's trigger, made as the published code makes it: each image copied and changed."""
    batch = copy.deepcopy(inputs)
    for index in range(len(batch)):
        image = copy.deepcopy(batch[index])
        for row, column in TRIGGER:
            image[0][row][column] = min(float(image[0][row][column]) + 0.05, 1.0)
        batch[index] = image
    return batch


def sampled(work: Workload) -> np.ndarray:
    """Return shares of votes from batched noisy weights."""
    votes = count_votes(work.network, work.points, sigma=SIGMA, num_draws=work.num_draws, seed=1)
    return votes.counts / work.num_draws


def in_logit_space(work: Workload) -> np.ndarray:
    """Return shares of votes from sampled logits."""
    votes = sample_linear_votes(work.network, work.points, sigma=SIGMA, num_draws=work.num_draws, seed=1)
    return votes.counts / work.num_draws


def exact(work: Workload) -> np.ndarray:
    """Return exact shares, and make their bounds as a certificate would."""
    votes = exact_votes(LinearModel.from_network(work.network), work.points, SIGMA)
    exact_bounds(votes)
    return votes.probabilities


def margins(work: Workload) -> np.ndarray:
    """Return certain votes for the label that the margin certifies."""
    labels, _ = LinearModel.from_network(work.network).shifts_lower(work.points)
    return np.eye(10)[labels]


def measured(ways: dict[str, tuple[Callable[[], np.ndarray], int | None]], work: Workload, repeats: int) -> list[Row]:
    """Run the ways in turns; return the best times of each and its memory."""
    truth = exact(work)
    best: dict[str, tuple[float, float]] = {}
    memory: dict[str, int] = {}
    shares: dict[str, np.ndarray] = {}
    for _ in range(repeats):
        for name, (run, models) in ways.items():
            before = reset_peak()
            wall, cpu = time.perf_counter(), time.process_time()
            shares[name] = run()
            spent = time.process_time() - cpu, time.perf_counter() - wall
            memory[name] = max(memory.get(name, 0), peak() - before)
            factor = 1.0 if models is None else work.num_draws / models
            was = best.get(name, (np.inf, np.inf))
            best[name] = min(was[0], spent[0] * factor), min(was[1], spent[1] * factor)
    slow, lean = (best[name][0] for name in ("loop, reference style", "loop, one pass"))
    return [
        Row(
            way=name, cpu=cpu, wall=wall, memory=memory[name], models_run=ways[name][1],
            faster_than_reference=slow / cpu, faster_than_lean=lean / cpu,
            disagreement=float(np.abs(shares[name] - truth).sum(1).mean() / 2),
        )
        for name, (cpu, wall) in best.items()
    ]  # fmt: skip


def reset_peak() -> int:
    """Start the kernel's count of peak memory anew (Linux); return the memory in use, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Return the peak memory in bytes since `reset_peak`."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def show(found: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title="Votes of noisy softmax regressions: seconds for all draws, one thread")
    for name in ("way", "CPU s", "wall s", "memory MB", "x reference", "x one pass", "off the exact law"):
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in found:
        scaled = "" if row.models_run is None else f" ({row.models_run} models, scaled)"
        ratios = [f"{value:,.1f}" for value in (row.faster_than_reference, row.faster_than_lean)]
        seconds = [f"{row.cpu:.3f}", f"{row.wall:.3f}", f"{row.memory / 1e6:.0f}"]
        table.add_row(row.way + scaled, *seconds, *ratios, f"{row.disagreement:.4f}")
    Console().print(table)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("points", 5000), ("draws", 1000), ("models", 3), ("repeats", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    try:
        found = rows(
            num_points=options.points, num_draws=options.draws, loop_models=options.models, repeats=options.repeats,
            data_dir=options.data_dir,
        )  # fmt: skip
    except HawthornError as error:
        Console(stderr=True).print(f"[red]{error}")
        return 2
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in found], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
