"""What l_inf certificates of digits cost: ours, and the zonotopes of IBM ART, in one process, on one thread, in turns.

    python benchmarks/certification/zonotope.py [--points 12] [--repeats 5] [--many 200] [--model FILE] [--json OUT]

The network is that of "Certified Federated Adversarial Training" for MNIST (819,506 parameters), adversarially trained
for two epochs (PGD of 5 steps, eps up to 0.25, about two minutes of one core); --model keeps it for the next run. Every
repeat runs every way once on the same points; the figures are medians over repeats, in CPU and wall milliseconds per
point. ART takes one sample at a time and starts from the network as it wants it, with one error term per pixel; making
these terms is not counted. "deviation" is the largest difference to ART's bounds (or to our own
forward zonotope where ART is not installed: pip install adversarial-robustness-toolbox "numpy<2.4").
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from certify.network import Network
from certify.pgd import pgd
from certify.zonotope import check
from tasks.dataset import Dataset
from tasks.datasets.mnist import mnist
from tasks.errors import HawthornError
from tasks.model import build
from tasks.models.cfat_mnist import cfat_mnist
from tasks.rng import generator
from tasks.source import DataSource

EPS = (0.02, 0.1, 0.15, 0.25)
SHAPE = (1, 28, 28)
Way = Callable[[Tensor, Tensor, float], Tensor]  # points, labels, eps -> upper bounds [points, classes]


@dataclass(frozen=True)
class Row:
    """The cost per point of one way at one eps: medians over the repeats, in milliseconds."""

    way: str
    eps: float
    points: int
    cpu: float
    wall: float
    deviation: float  # from the bounds of the reference
    faster_than_art: float | None  # in CPU time
    generators: float  # mean over points


@dataclass(frozen=True)
class Many:
    """A larger subset, ours alone: milliseconds per point, growth of peak memory in MB, and the verdicts."""

    method: str
    eps: float
    points: int
    cpu: float
    wall: float
    memory: float
    certified_accuracy: float
    mean_loss: float


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=12, help="test points that every way bounds")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--many", type=int, default=200, help="test points of the larger subset; 0 leaves it out")
    parser.add_argument("--model", type=Path, help="file to keep the trained network in, or to read it from")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        data = mnist(DataSource.default(options.data_dir))
    except HawthornError as error:
        print(error, file=sys.stderr)
        return 1
    module = network_of(data, options.model)
    found = rows(module, data, options.points, options.repeats)
    show(found)
    many = larger(module, data, options.many) if options.many else []
    show(many)
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(row) for row in (*found, *many)], indent=1) + "\n")
    return 0


def network_of(data: Dataset, file: Path | None) -> nn.Module:
    """Return the network, from `file` where that exists, else trained (and written there)."""
    module = build(cfat_mnist, SHAPE, data.num_classes, generator(7, "zonotope benchmark"))
    if file is not None and file.exists():
        module.load_state_dict(load_file(file))
    else:
        train(module, data)
        if file is not None:
            save_file(module.state_dict(), file)
    return module.eval()


def train(module: nn.Module, data: Dataset, epochs: int = 2, eps: float = 0.25) -> None:
    """Train adversarially, eps growing over the first 400 steps."""
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-3)
    draws = generator(7, "zonotope benchmark", "training")
    step = 0
    for _ in range(epochs):
        order = torch.randperm(data.train_labels.numel(), generator=draws)
        for inputs, labels in data.batches("train", order, 128):
            step += 1
            radius = eps * min(1.0, step / 400)
            attack = pgd(
                module, inputs, labels, eps=radius, generator=draws, steps=5, step_size=0.35 * radius, early_stop=False
            )
            optimiser.zero_grad()
            functional.cross_entropy(module(attack.inputs), labels).backward()
            optimiser.step()


def rows(module: nn.Module, data: Dataset, points: int, repeats: int) -> list[Row]:
    """Measure every way at every eps, in turns."""
    network = Network.from_module(module, SHAPE)
    ways: dict[str, Way] = {
        "ours, backward": lambda x, y, eps: check(network, x, y, eps=eps).margins_upper,
        "ours, forward": lambda x, y, eps: check(network, x, y, eps=eps, direction="forward").margins_upper,
    }
    if (art := art_way(module)) is not None:
        ways["IBM ART"] = art
    inputs, labels = data.batch("test", slice(0, points))
    spent: dict[tuple[str, float], list[tuple[float, float]]] = {}
    bounds: dict[tuple[str, float], Tensor] = {}
    for way in ways.values():  # nothing is measured on a first call
        way(inputs[:1], labels[:1], EPS[0])
    for _ in range(repeats):
        for eps in EPS:
            for name, way in ways.items():
                cpu, wall = time.process_time(), time.perf_counter()
                bounds[name, eps] = way(inputs, labels, eps)
                cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
                spent.setdefault((name, eps), []).append((1e3 * cpu / points, 1e3 * wall / points))
    reference = "IBM ART" if "IBM ART" in ways else "ours, forward"
    median = {key: [statistics.median(column) for column in zip(*values, strict=True)] for key, values in spent.items()}
    found = []
    for (name, eps), (cpu, wall) in median.items():
        other = functional.one_hot(labels, data.num_classes) == 0
        deviation = (bounds[name, eps] - bounds[reference, eps])[other].abs().max().item()
        faster = median[reference, eps][0] / cpu if reference == "IBM ART" else None
        generators = 784 + check(network, inputs, labels, eps=eps).unstable.double().mean().item()
        found.append(Row(name, eps, points, cpu, wall, deviation, faster, generators))
    return found


def art_way(module: nn.Module) -> Way | None:
    """Return the bounds of IBM ART's PytorchDeepZ, None where it is not installed."""
    try:
        from art.estimators.certification.deep_z import PytorchDeepZ  # type: ignore[import-not-found]
    except ImportError:
        return None

    class Plain(nn.Module):
        """Copies of the layers (ART leaves hooks on them), the flattening in `forward`, as ART wants it."""

        def __init__(self) -> None:
            super().__init__()
            kept = [part for part in copy.deepcopy(module) if not isinstance(part, nn.Flatten)]  # type: ignore[attr-defined]
            for number, part in enumerate(kept):
                self.add_module(f"part{number}", part)

        def forward(self, values: Tensor) -> Tensor:
            for part in self.children():
                values = part(values.flatten(1) if isinstance(part, nn.Linear) else values)
            return values

    with contextlib.redirect_stdout(io.StringIO()):
        zonotope = PytorchDeepZ(
            model=Plain(), loss=nn.CrossEntropyLoss(), input_shape=SHAPE, nb_classes=10, clip_values=(0, 1),
            device_type="cpu",
        )  # fmt: skip

    def bound(inputs: Tensor, labels: Tensor, eps: float) -> Tensor:
        terms = np.eye(784) * eps
        margins = []
        for sample, label in zip(inputs.numpy(), labels.tolist(), strict=True):
            center, errors = zonotope.pre_process(cent=np.copy(sample), eps=terms)
            with torch.no_grad():
                output, errors = zonotope.model.forward(eps=errors, cent=np.expand_dims(center, axis=0))
            output, errors = output.numpy().astype(np.float64), errors.numpy().astype(np.float64)
            spread = np.abs(errors - errors[:, label : label + 1]).sum(0)
            margins.append(output - output[label] + spread)
        return torch.from_numpy(np.stack(margins))

    return bound


def larger(module: nn.Module, data: Dataset, points: int) -> list[Many]:
    """Measure ours on a larger subset."""
    network = Network.from_module(module, SHAPE)
    inputs, labels = data.batch("test", slice(0, points))
    found = []
    for method in ("zonotope", "crown", "best", "interval"):
        for eps in (0.1, 0.25):
            before = reset_peak()
            cpu, wall = time.process_time(), time.perf_counter()
            result = check(network, inputs, labels, eps=eps, method=method)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            memory = (_status("VmHWM") - before) / 1e6
            per_point = (1e3 * cpu / points, 1e3 * wall / points)
            verdicts = (result.certified_accuracy, result.mean_loss)
            found.append(Many(method, eps, points, *per_point, memory, *verdicts))
    return found


def reset_peak() -> int:
    """Set the process's peak memory to what it holds now, in bytes, and return that (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def show(found: Sequence[Row | Many]) -> None:
    """Print rows as a table."""
    if not found:
        return
    table = [list(asdict(found[0])), *([_cell(value) for value in asdict(row).values()] for row in found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    print()


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    raise SystemExit(main())
