"""How does the certification service behave under load? Latency, throughput, faults, and that answers stay the same.

    python benchmarks/certification/service_load.py [--clients 1,4,16] [--requests 20] [--megabytes 200]
                                                    [--messages 2000] [--json OUT]

The service is a process of its own, on the loopback interface and a fresh store; clients are threads of this one. Every
answer is compared with the local library's: one bit of difference ends the run. "new" questions are worked out,
"known" ones come from the store. A cancelled client's work counts as ended when the service runs nothing any more.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout works without being installed

import grpc
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from certify.network import Network
from certify.service import certify_pb2 as pb
from certify.service import certify_pb2_grpc as rpc
from certify.service.client import CertifyClient, ServiceError
from certify.service.wire import SERVICE
from certify.smoothing.sampled import count_votes
from certify.zonotope import check

ROOT = Path(__file__).resolve().parents[2]
DRAWS = 500
LONG = 1_000_000  # draws; never finished


@dataclass(frozen=True)
class Line:
    """One line of the table; times are of single answers."""

    scenario: str
    number: int
    seconds: float
    median_ms: float
    p95_ms: float
    note: str = ""


def network() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [
            nn.Conv2d(1, 8, 3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(72, 32),
            nn.ReLU(),
            nn.Linear(32, 10),
        ]
        return Network.from_module(nn.Sequential(*layers), (1, 8, 8))


NETWORK = network()
INPUTS = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(50) % 10


@contextmanager
def service(**settings: Any) -> Iterator[tuple[str, Callable[[str], float], "subprocess.Popen[str]"]]:
    """Run a service as a process; gives its address, a reader of its metrics, and the process."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"port": 0, "metrics_port": 0, "store": folder, "log_level": "ERROR"} | settings
        code = f"import sys; from certify.service.serve import serve; sys.exit(not serve(**{given!r}))"
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE
        )
        try:
            assert process.stdout is not None
            ready = process.stdout.readline()
            found = re.search(r"ready on grpc://(\S+) metrics=(\S+)", ready)
            if found is None:
                raise SystemExit(f"the service did not start: {ready!r}")
            yield found[1], lambda name: metric(found[2], name), process
        finally:
            process.terminate()
            process.wait(30)


def metric(url: str, name: str) -> float:
    """Return the value of one metric without labels."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[1])
    return 0.0


def resident_mb(process: "subprocess.Popen[str]") -> float:
    """Return the largest resident memory of a process so far, in MB."""
    text = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", text)[1]) / 1000  # type: ignore[index]


def asked_by(address: str, clients: int, requests: int, ask: Callable[[CertifyClient, int], None]) -> Line:
    """Let `clients` ask `requests` times each, one connection a client; times are of single answers."""

    def run(client_number: int) -> list[float]:
        times = []
        with CertifyClient(address, attempts=20, timeout=300.0) as client:
            for number in range(requests):
                start = time.perf_counter()
                ask(client, client_number * requests + number)
                times.append(time.perf_counter() - start)
        return times

    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        times = np.array([one for some in pool.map(run, range(clients)) for one in some])
    wall = time.perf_counter() - start
    low, high = np.percentile(times, (50, 95)) * 1000
    return Line("", clients, wall, low, high, f"{len(times) / wall:.1f} answers/s")


def same_votes(client: CertifyClient, seed: int, wanted: dict[int, Any]) -> None:
    votes = client.count_votes(NETWORK, INPUTS, sigma=0.1, num_draws=DRAWS, seed=seed)
    if seed not in wanted:
        wanted[seed] = count_votes(NETWORK, INPUTS, sigma=0.1, num_draws=DRAWS, seed=seed).counts
    if not np.array_equal(votes.counts, wanted[seed]):
        raise SystemExit(f"votes of seed {seed} differ from the local library's")


def same_bounds(client: CertifyClient, eps: float, wanted: torch.Tensor) -> None:
    if not torch.equal(client.check(NETWORK, INPUTS, LABELS, eps=eps).margins_upper, wanted):
        raise SystemExit(f"bounds at {eps} differ from the local library's")


def questions(address: str, clients: list[int], requests: int) -> Iterator[Line]:
    """Yield lines of smoothing and zonotope questions, new and known."""
    wanted: dict[int, Any] = {}
    first = 0
    for number in clients:
        seeds = range(first, first + number * requests)
        for seed in seeds:  # outside the clock
            wanted[seed] = count_votes(NETWORK, INPUTS, sigma=0.1, num_draws=DRAWS, seed=seed).counts
        for kind in ("new", "known"):
            line = asked_by(address, number, requests, lambda c, i, s=seeds: same_votes(c, s[i], wanted))
            yield replace(line, scenario=f"votes of {DRAWS} draws, {kind}")
        radii = [0.02 + seed * 1e-6 for seed in seeds]
        local = [check(NETWORK, INPUTS, LABELS, eps=eps).margins_upper for eps in radii]
        for kind in ("new", "known"):
            line = asked_by(address, number, requests, lambda c, i, r=radii, w=local: same_bounds(c, r[i], w[i]))
            yield replace(line, scenario=f"bounds of {len(INPUTS)} points, {kind}")
        first = seeds.stop


def upload(address: str, megabytes: int) -> Line:
    """Return a line of one large upload through the client."""
    large = Network.from_parts(
        [{"kind": "linear", "weight": "w"}], {"w": torch.ones(10, megabytes * 25_000)}, (megabytes * 25_000,)
    )
    times = []
    with CertifyClient(address, timeout=300.0) as client:
        for _ in range(2):
            start = time.perf_counter()
            client.upload_model(large)
            times.append(time.perf_counter() - start)
    note = f"{megabytes / times[0]:.0f} MB/s with all checks; again: {times[1] * 1000:.0f} ms"
    return Line(f"upload of {megabytes} MB", 1, times[0], times[0] * 1000, times[0] * 1000, note)


def cancelled(address: str, read: Callable[[str], float], repeats: int = 10) -> Line:
    """Return a line of the time from a client's disappearance to the end of its work."""
    times = []
    with CertifyClient(address) as client:
        ids = client.upload_model(NETWORK), client.upload_set(INPUTS, LABELS * 0)
    for seed in range(repeats):
        channel = grpc.insecure_channel(address)
        request = pb.CertifySmoothingRequest(model=ids[0], set=ids[1], sigma=0.1, num_draws=LONG, seed=10**6 + seed)
        for event in rpc.CertifyServiceStub(channel).CertifySmoothing(request):
            if event.HasField("progress"):
                break
        start = time.perf_counter()
        channel.close()
        while read("hawthorn_certify_running") > 0:
            time.sleep(0.002)
        times.append(time.perf_counter() - start)
    low, high = np.percentile(times, (50, 95)) * 1000
    return Line("client killed, until its work ended", repeats, sum(times), low, high)


def overfull(address: str, read: Callable[[str], float], queue_size: int) -> Line:
    """Return a line of refusals while the queue is full, and that it empties when its clients go."""
    with CertifyClient(address) as client, grpc.insecure_channel(address) as channel:
        ids = client.upload_model(NETWORK), client.upload_set(INPUTS, LABELS * 0)
        stub = rpc.CertifyServiceStub(channel)

        def call(seed: int) -> Any:
            return stub.CertifySmoothing(
                pb.CertifySmoothingRequest(model=ids[0], set=ids[1], sigma=0.1, num_draws=LONG, seed=seed)
            )

        calls = [call(2 * 10**6 + seed) for seed in range(queue_size + 1)]
        while read("hawthorn_certify_queue_waiting") < queue_size:
            time.sleep(0.01)
        times, codes = [], Counter[str]()
        for seed in range(50):
            start = time.perf_counter()
            try:
                list(call(3 * 10**6 + seed))
            except grpc.RpcError as error:
                codes[error.code().name] += 1  # type: ignore[attr-defined]
            times.append(time.perf_counter() - start)
        for one in calls:
            one.cancel()
        while read("hawthorn_certify_running") + read("hawthorn_certify_queue_waiting") > 0:
            time.sleep(0.01)
    low, high = np.percentile(times, (50, 95)) * 1000
    return Line("refused by a full queue", 50, sum(times), low, high, ", ".join(f"{v} {k}" for k, v in codes.items()))


def garbage(address: str, messages: int) -> Line:
    """Return a line of random bytes sent as requests, with a client beside it whose answers are compared."""
    random_, codes, times = random.Random(0), Counter[str](), []
    wanted: dict[int, Any] = {}
    methods = ["CertifySmoothing", "CheckZonotope", "Gate"]
    with ThreadPoolExecutor(1) as pool, grpc.insecure_channel(address) as channel:
        beside = pool.submit(asked_by, address, 1, 20, lambda c, i: same_votes(c, 4 * 10**6 + i, wanted))
        for _ in range(messages):
            start = time.perf_counter()
            try:
                list(channel.unary_stream(f"/{SERVICE}/{random_.choice(methods)}")(random_.randbytes(60), timeout=30))
            except grpc.RpcError as error:
                codes[error.code().name] += 1  # type: ignore[attr-defined]
            times.append(time.perf_counter() - start)
        beside.result()
    low, high = np.percentile(times, (50, 95)) * 1000
    note = ", ".join(f"{v} {k}" for k, v in codes.items()) + "; a client beside it got the same votes"
    return Line("random bytes as requests", messages, sum(times), low, high, note)


def restarted() -> Line:
    """Return a line of a service killed in the middle of its work, started again on its store, and its result."""
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 20_000, "seed": 1}
    with tempfile.TemporaryDirectory() as folder:
        with service(store=folder, save_seconds=0.1) as (address, _, process):

            def kill(tick: Any) -> None:
                if tick.done * 2 > tick.total:
                    process.kill()

            try:
                with CertifyClient(address, attempts=1) as client:
                    client.count_votes(NETWORK, INPUTS, **asked, on_progress=kill)
            except ServiceError:
                pass
        start = time.perf_counter()
        with service(store=folder) as (address, read, _), CertifyClient(address) as client:
            votes = client.count_votes(NETWORK, INPUTS, **asked)
            seconds, resumed = time.perf_counter() - start, read("hawthorn_certify_resumed_total")
    if not np.array_equal(votes.counts, count_votes(NETWORK, INPUTS, **asked).counts):
        raise SystemExit("votes after the restart differ from the local library's")
    note = f"{'went on from saved progress' if resumed else 'began anew'}, start of the process included"
    return Line("killed at half of the work, started again", 1, seconds, seconds * 1000, seconds * 1000, note)


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--requests", type=int, default=20)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--messages", type=int, default=2000)
    parser.add_argument("--queue-size", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    clients = [int(number) for number in given.clients.split(",")]
    with service(queue_size=given.queue_size, device=given.device) as (address, read, process):
        lines = list(questions(address, clients, given.requests))
        lines += [cancelled(address, read), overfull(address, read, given.queue_size)]
        lines += [garbage(address, given.messages), upload(address, given.megabytes)]
        memory = resident_mb(process)
    lines.append(restarted())
    show(lines, memory)
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(line) for line in lines], indent=1))


def show(lines: list[Line], memory: float) -> None:
    """Print the table."""
    table = Table("scenario", "clients or messages", "wall s", "median ms", "95 % ms", "")
    for line in lines:
        figures = f"{line.seconds:.2f}", f"{line.median_ms:.1f}", f"{line.p95_ms:.1f}"
        table.add_row(line.scenario, str(line.number), *figures, line.note)
    console = Console(width=160)
    console.print(table)
    console.print(f"every answer was the local library's; the service's memory was at most {memory:.0f} MB")


if __name__ == "__main__":
    main()
