"""What does a round's gate cost? The MNIST network of CFAT, in this process and through the service, part by part.

    python benchmarks/gate.py --model FILE [--validation 1000] [--certification 1000] [--eps 0.1,0.15,0.25]
                              [--workers 1,2] [--attack-steps 20] [--repeats 3] [--data-dir FOLDER] [--json OUT]

FILE holds the model's tensors (a run's model.safetensors, or what `benchmarks/certify.py --model` keeps); without it
the network is as it is drawn, which leaves more ReLUs open and costs other seconds. Wall seconds depend on what else
the machine does; CPU seconds of all threads, and those divided by the workers, do not. All ways must find the same
metrics but for last bits, or the benchmark fails. The service runs in a process of its own, its store is new for
every measurement, so model and sets are sent and nothing is answered from before.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from certify.gate import GateMetrics, GateState
from certify.network import Network
from certify.service.client import CertifyClient
from certify.service.measure import GateSettings, measure
from tasks.config import parse_radii
from tasks.datasets.mnist import mnist
from tasks.errors import HawthornError
from tasks.model import build
from tasks.models.cfat_mnist import cfat_mnist
from tasks.rng import generator
from tasks.source import DataSource

ROOT = Path(__file__).resolve().parents[1]
Points = tuple[Tensor, Tensor]
TOLERANCE = 1e-9  # of any metric between two ways; where numbers lie in memory moves the last bits of a sum


def main(words: list[str] | None = None) -> int:
    """Measure and print; returns 1 where two ways disagree."""
    given = read(words)
    torch.set_num_threads(1)
    data = mnist(DataSource.default(given.data_dir))
    network = read_network(given.model, data.input_shape)
    order = torch.randperm(len(data.train_labels), generator=generator(1, "gate benchmark"))
    needed = given.validation + given.certification
    inputs, labels = data.batch("train", order[:needed])
    cut = given.validation
    held, around = (inputs[:cut], labels[:cut]), (inputs[cut:], labels[cut:])
    settings = GateSettings(eps=parse_radii(given.eps), attack_eps=given.attack_eps, attack_steps=given.attack_steps)
    ways: dict[str, Callable[[], tuple[GateMetrics, float, dict[str, float]]]] = {}
    for workers in map(int, given.workers.split(",")):
        ways[f"in process, {workers} threads"] = lambda w=workers: local(network, held, around, settings, w)
    ways["through the service"] = lambda: remote(network, held, around, settings)
    found: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(given.repeats):
        for name, way in ways.items():
            begin = time.perf_counter()
            metrics, cpu, parts = way()
            found[name].append((time.perf_counter() - begin, cpu, parts, metrics))
    show(found, given)
    every = [entry[3] for entries in found.values() for entry in entries]
    first = [value for _, value in every[0].everything()]
    apart = max(abs(a - b) for one in every for (_, a), b in zip(one.everything(), first, strict=True))
    print(f"largest difference between two ways: {apart:.1e}")
    return int(apart > TOLERANCE)


def read(words: list[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--validation", type=int, default=1000)
    parser.add_argument("--certification", type=int, default=1000)
    parser.add_argument("--eps", default="0.1,0.15,0.25")
    parser.add_argument("--attack-eps", type=float, default=0.25)
    parser.add_argument("--attack-steps", type=int, default=20)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data-dir")
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def read_network(path: Path | None, input_shape: tuple[int, ...]) -> Network:
    """Return the network with the tensors of a file; raises `HawthornError` where they do not fit."""
    module = build(cfat_mnist, input_shape, 10, generator(1, "gate benchmark")).eval()
    if path is not None:
        try:
            module.load_state_dict(load_file(path))
        except (RuntimeError, SafetensorError) as error:
            raise HawthornError(f"{path} does not hold the tensors of cfat_mnist: {error}") from None
    return Network.from_module(module, input_shape)


def local(
    network: Network, validation: Points, certification: Points, settings: GateSettings, workers: int
) -> tuple[GateMetrics, float, dict[str, float]]:
    """Return metrics, CPU seconds and CPU seconds per part."""
    marks: list[tuple[str, float]] = []
    begin = time.process_time()
    metrics = measure(
        network, validation, certification, settings, workers=workers,
        on_progress=lambda done, total, phase: marks.append((phase, time.process_time())),
    )  # fmt: skip
    parts = {phase: after - before for (phase, before), (_, after) in itertools.pairwise(marks)}
    return metrics, time.process_time() - begin, parts


def remote(
    network: Network, validation: Points, certification: Points, settings: GateSettings
) -> tuple[GateMetrics, float, dict[str, float]]:
    """Return metrics, the CPU seconds of the service while it answered, and of this process."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"from certify.service.serve import serve; serve(port=0, store={folder!r}, device='cpu')"
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables
        )
        try:
            assert process.stdout is not None
            ready = re.search(r"ready on grpc://127\.0\.0\.1:(\d+)", process.stdout.readline())
            if ready is None:
                raise HawthornError("the service did not come up")
            before, own, begin = cpu_of(process.pid), time.process_time(), time.perf_counter()
            with CertifyClient(f"127.0.0.1:{ready[1]}") as client:
                decision = client.gate(network, validation, certification, settings, state=GateState())
            wall, spent = time.perf_counter() - begin, cpu_of(process.pid) - before
            own = time.process_time() - own
        finally:
            process.kill()
            process.communicate()
    return decision.metrics, spent + own, {"wall of the request": wall, "this process": own}


def cpu_of(pid: int) -> float:
    """Return the CPU seconds, user and system, that a living process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def show(found: dict[str, list[Any]], given: argparse.Namespace) -> None:
    """Print medians over the repeats, and the metrics."""
    print(
        f"{given.validation} validation points, {given.attack_steps} steps, 3 attacks; "
        f"{given.certification} certification points at {given.eps};"
        f" {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    )
    rows = []
    for name, entries in found.items():
        wall, cpu = (statistics.median(entry[column] for entry in entries) for column in (0, 1))
        parts = {key: statistics.median(entry[2][key] for entry in entries) for key in entries[0][2]}
        rows.append({"way": name, "wall": wall, "cpu": cpu, "least wall": min(e[0] for e in entries), "parts": parts})
        detail = ", ".join(f"{key} {value:.2f}" for key, value in parts.items())
        print(f"{name}: wall {wall:.1f} s (least {rows[-1]['least wall']:.1f}), CPU {cpu:.1f} s ({detail})")
    metrics = next(iter(found.values()))[0][3]
    print(metrics)
    if given.json:
        given.json.write_text(
            json.dumps({"settings": {k: str(v) for k, v in vars(given).items()}, "rows": rows}, indent=2)
        )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except HawthornError as error:
        sys.exit(f"error: {error}")
