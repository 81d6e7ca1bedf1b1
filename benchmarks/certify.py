"""What do certificates cost? Bounds on inputs beside IBM ART and auto_LiRPA, votes beside loops over noisy models.

    python benchmarks/certify.py [--quick] [--only inputs,votes] [--peers PYTHON] [--model FILE] [--points 8]
                                 [--repeats 3] [--many 100] [--data-dir FOLDER] [--json OUT]

Inputs: the MNIST network of "Certified Federated Adversarial Training", adversarially trained (minutes of one core;
--model keeps it). All ways bound the same points in one process, on one thread, in turns; figures are medians over
repeats, per point. Memory is the growth of a forked process's peak over two points at the largest radius. ART takes
one sample at a time; auto_LiRPA gets four. Peers are looked for in the interpreter of --peers, as ART wants
numpy<2.4; what cannot be used is left out with the reason. "off" is the largest difference to Hawthorn's own bounds of
the same relaxation, by max(1, |bound|).

Votes: see `benchmarks/certification/smoothing.py`; loops run for a few models, their time is scaled to all draws.

--quick tries everything once on little: a network without training unless --model has one. Its figures are no
measurement. CPU seconds are of one thread; wall seconds depend on what else the machine does.
"""

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import torch
from torch import Tensor, nn

from benchmarks.certification import zonotope
from benchmarks.certification.zonotope import Way
from benchmarks.certify_report import OURS, Rows, judged, show
from certify.network import Network
from certify.zonotope import check
from tasks.datasets.mnist import mnist
from tasks.errors import HawthornError
from tasks.model import build
from tasks.models.cfat_mnist import cfat_mnist
from tasks.rng import generator
from tasks.source import DataSource

PACKAGES = {"IBM ART": "adversarial-robustness-toolbox", "auto_LiRPA": "auto_LiRPA"}
BATCH = 4  # of auto_LiRPA
SMALL = {"points": 2, "repeats": 1, "many": 0, "eps": (0.1,), "votes": (200, 100, 1, 1)}
FULL = {"eps": zonotope.EPS, "votes": (5000, 1000, 3, 3)}  # votes: points, draws, models of the loops, repeats


@dataclass(frozen=True)
class Contestant:
    """A way to bound inputs; `slopes` says whose bounds it should find. `way` is a reason where it cannot be used."""

    name: str
    slopes: str
    way: Way | str


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, print tables and targets; returns the exit code."""
    options = read_options(arguments)
    torch.set_num_threads(1)
    try:
        if options.worker is not None:
            options.worker.write_text(json.dumps(inputs(options)))
            return 0
        found: dict[str, Any] = {"quick": options.quick, "inputs": {}, "votes": []}
        if "inputs" in options.only:
            found["inputs"] = elsewhere(options, arguments)
        if "votes" in options.only:
            found["votes"] = votes(options)
    except HawthornError as error:
        print(error, file=sys.stderr)
        return 2
    found["targets"] = judged(found)
    show(found)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    summary, details = (__doc__ or "").split("\n\n", 1)
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=form)
    parser.add_argument("--quick", action="store_true", help="everything once on little; no measurement")
    parser.add_argument("--only", default="inputs,votes", help="parts, joined with commas")
    parser.add_argument("--peers", default=sys.executable, help="Python that has the peers (default: this one)")
    parser.add_argument("--model", type=Path, help="file to keep the trained network in, or to read it from")
    parser.add_argument("--points", type=int, default=8, help="test points that every way bounds")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--many", type=int, default=100, help="test points of the larger subset, Hawthorn alone; 0: none"
    )
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # where the measuring process writes
    options = parser.parse_args(arguments)
    options.only = [name for name in options.only.split(",") if name]
    if not options.only or not set(options.only) <= {"inputs", "votes"}:
        parser.error(f"--only names inputs, votes or both, got {', '.join(options.only) or 'nothing'}")
    settings = SMALL if options.quick else FULL
    for name, value in settings.items():
        setattr(options, name, value)
    if options.points < 1 or options.repeats < 1 or options.many < 0:
        parser.error("points and repeats must be at least 1, many at least 0")
    return options


def elsewhere(options: argparse.Namespace, arguments: Sequence[str] | None) -> dict[str, Any]:
    """Measure the bounds on inputs in a process of its own, with the peers' interpreter."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "inputs.json"
        command = [options.peers, str(Path(__file__).resolve()), *given, "--worker", str(out)]
        ended = subprocess.run(command, env={**os.environ, **threads}, check=False)
        if ended.returncode or not out.exists():
            raise SystemExit(ended.returncode or 1)  # it has said why
        return json.loads(out.read_text())


def inputs(options: argparse.Namespace) -> dict[str, Any]:
    """Return what bounds on inputs cost, way by way, and on a larger subset."""
    data = mnist(DataSource.default(options.data_dir))
    if options.quick and (options.model is None or not options.model.exists()):
        module, trained = build(cfat_mnist, zonotope.SHAPE, data.num_classes, generator(7, "zonotope benchmark")), False
    else:
        module, trained = zonotope.network_of(data, options.model), True
    module = module.eval()
    points, labels = data.batch("test", slice(0, options.points))
    contestants = ways(module)
    rows = compete(contestants, points, labels, options.eps, options.repeats)
    many = [asdict(row) for row in zonotope.larger(module, data, options.many)] if options.many else []
    left_out = {each.name: each.way for each in contestants if isinstance(each.way, str)}
    return {"trained": trained, "rows": rows, "left_out": left_out, "many": many, "versions": versions()}


def ways(module: nn.Module) -> list[Contestant]:
    """Return Hawthorn's ways, those of the relaxations first, and the peers'."""
    network = Network.from_module(module, zonotope.SHAPE)
    return [
        Contestant(OURS["equal"], "equal", lambda x, y, eps: check(network, x, y, eps=eps).margins_upper),
        Contestant(
            OURS["adaptive"], "adaptive", lambda x, y, eps: check(network, x, y, eps=eps, method="crown").margins_upper
        ),
        Contestant(
            "Hawthorn, forward", "equal",
            lambda x, y, eps: check(network, x, y, eps=eps, direction="forward").margins_upper,
        ),
        Contestant("IBM ART, zonotope", "equal", usable(lambda: art(module))),
        Contestant("auto_LiRPA, same slope", "equal", usable(lambda: auto_lirpa(module, "same-slope"))),
        Contestant("auto_LiRPA, CROWN", "adaptive", usable(lambda: auto_lirpa(module, "adaptive"))),
    ]  # fmt: skip


def usable(make: Callable[[], Way]) -> Way | str:
    """Return a peer's way after trying it on one point, or why there is none."""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            way = make()
            way(torch.zeros(1, *zonotope.SHAPE), torch.zeros(1, dtype=torch.int64), 0.01)
            return way
    except Exception as error:  # a peer that does not fit the libraries here fails in ways of its own
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def art(module: nn.Module) -> Way:
    """Return the bounds of IBM ART."""
    way = zonotope.art_way(module)
    if way is None:
        raise ModuleNotFoundError('pip install adversarial-robustness-toolbox "numpy<2.4"')
    return way


def auto_lirpa(module: nn.Module, slope: str) -> Way:
    """Return the bounds of auto_LiRPA's backward mode with equal or adaptive slopes."""
    from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # type: ignore[import-not-found]

    named = {"relu": slope, "activation_bound_option": slope}  # the option's name in old and in new versions
    bounded = BoundedModule(copy.deepcopy(module), torch.zeros(1, *zonotope.SHAPE), bound_opts=named)

    def bound(points: Tensor, labels: Tensor, eps: float) -> Tensor:
        found = []
        for some, own in zip(points.split(BATCH), labels.split(BATCH), strict=True):
            box = {"x_L": (some - eps).clamp(0, 1), "x_U": (some + eps).clamp(0, 1)}
            ball = PerturbationLpNorm(norm=float("inf"), eps=eps, **box)
            rows = torch.eye(10)[None] - torch.eye(10)[own][:, None]
            with torch.no_grad():
                _, upper = bounded.compute_bounds(
                    x=(BoundedTensor(some, ball),), C=rows, method="backward", bound_lower=False
                )
            found.append(upper.double())
        return torch.cat(found)

    return bound


def compete(
    contestants: Sequence[Contestant], points: Tensor, labels: Tensor, radii: Sequence[float], repeats: int
) -> Rows:
    """Let all usable ways take turns; returns a row per radius and way."""
    there = [(each, each.way) for each in contestants if not isinstance(each.way, str)]
    memory = {each.name: memory_of(way, points[:2], labels[:2], max(radii)) for each, way in there}
    for _, way in there:
        way(points[:1], labels[:1], radii[0])  # nothing is measured on a first call
    spent: dict[tuple[float, str], list[tuple[float, float]]] = {}
    bounds: dict[tuple[float, str], Tensor] = {}
    for _ in range(repeats):
        for eps in radii:
            for each, way in there:
                cpu, wall = time.process_time(), time.perf_counter()
                bounds[eps, each.name] = way(points, labels, eps)
                taken = time.process_time() - cpu, time.perf_counter() - wall
                spent.setdefault((eps, each.name), []).append(taken)
    other = nn.functional.one_hot(labels, 10) == 0
    rows = []
    for eps in radii:
        for each, _ in there:
            cpu, wall = (statistics.median(column) / len(points) for column in zip(*spent[eps, each.name], strict=True))
            ours, own = bounds[eps, OURS[each.slopes]], bounds[eps, each.name]
            ours_cpu = statistics.median(c for c, _ in spent[eps, OURS[each.slopes]]) / len(points)
            off = ((own - ours).abs() / ours.abs().clamp(min=1))[other].max().item()
            certified = int(((own < 0) | ~other).all(1).sum())
            rows.append({
                "way": each.name, "slopes": each.slopes, "eps": eps, "cpu": cpu, "wall": wall, "x_ours": cpu / ours_cpu,
                "memory": memory[each.name], "off": off, "certified": certified, "points": len(points),
            })  # fmt: skip
    return rows


def memory_of(way: Way, points: Tensor, labels: Tensor, eps: float) -> int | None:
    """Return by how many bytes a call raises the peak of a forked process; None where that cannot be told (Linux can).

    A fork of its own, so that memory that an earlier call has given back to the allocator only is not used again.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            before = zonotope.reset_peak()
            way(points, labels, eps)
            os.write(writing, str(zonotope._status("VmHWM") - before).encode())
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with open(reading, encoding="utf-8") as told:
        text = told.read()
    os.waitpid(child, 0)
    return int(text) if text else None


def versions() -> dict[str, str]:
    """Return the versions of what was measured."""
    found = {"torch": str(torch.__version__)}
    for name in ("numpy", *PACKAGES.values()):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def votes(options: argparse.Namespace) -> Rows:
    """Return what votes cost."""
    from benchmarks.certification import smoothing  # wants rich, which the peers' interpreter need not have

    points, draws, models, repeats = options.votes
    found = smoothing.rows(
        num_points=points, num_draws=draws, loop_models=models, repeats=repeats, data_dir=options.data_dir
    )
    return [asdict(row) | {"points": points, "draws": draws} for row in found]


if __name__ == "__main__":
    sys.exit(main())
