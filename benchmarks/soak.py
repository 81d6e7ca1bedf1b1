"""A long run with clients that die and come back: does everything stay recorded, and does memory stay flat?

    python benchmarks/soak.py [--rounds 200] [--every 4] [--clients 4] [--json OUT]

A federation of real processes (engine `cluster`) trains under a gate that the certification service decides; every few
rounds the next client's SuperNode is killed and a new one started with the same key. Memory is the resident
set of the ServerApp, of the SuperLink and of the service, in MB, after every tenth round. Flat means: the mean of the
last quarter is at most 10 % (and 20 MB) above that of the second quarter. Exits with 1 if a round is missing,
memory grew, or a client that came back had no part in the rounds after.
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from hawthorn.engines import QUIET, cluster
from hawthorn.engines._endings import MARK
from hawthorn.engines._processes import free_ports
from hawthorn.engines.cluster import Cluster
from server.record import RoundRecord, read_run
from tasks.config import RunConfig

ROOT = Path(__file__).resolve().parents[1]
GROWTH, SLACK = 1.10, 20.0  # what counts as flat


@dataclass
class Soak:
    """What was measured: role -> resident MB after some rounds; who was killed when, and who came back."""

    memory: dict[str, list[float]] = field(default_factory=dict)
    killed: list[tuple[int, int]] = field(default_factory=list)  # (round, client)

    def note(self, role: str, pid: int | None) -> None:
        """Add a process's resident memory."""
        if pid is not None and (size := resident(pid)) > 0:
            self.memory.setdefault(role, []).append(round(size, 1))

    def growth(self) -> dict[str, tuple[float, float]]:
        """Return for each role the mean of its second and of its last quarter."""
        result = {}
        for role, sizes in self.memory.items():
            quarter = max(len(sizes) // 4, 1)
            result[role] = (fmean(sizes[quarter : 2 * quarter] or sizes), fmean(sizes[-quarter:]))
        return result


def flat(growth: Mapping[str, tuple[float, float]]) -> bool:
    """Whether no role's memory grew beyond what counts as flat."""
    return all(last <= second * GROWTH + SLACK for second, last in growth.values())


def resident(pid: int) -> float:
    """Return the resident set of a process in MB, 0 if it is gone."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def named(program: str, mark: str) -> int | None:
    """Return the process that runs a Flower program in the workplace whose mark is given."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().strip() == program[:15] and mark.encode() in (path.parent / "environ").read_bytes():
                return int(path.parent.name)
        except OSError:
            continue
    return None


def soak(rounds: int, clients: int, every: int, folder: Path) -> tuple[Soak, bool, str]:
    """Run; return what was measured, whether every round is there, and what went wrong."""
    seen, running = Soak(), dict[str, Any]()
    port = free_ports(1)[0]
    service = subprocess.Popen(
        [sys.executable, "-m", "certify", "serve", "--port", str(port), "--store", str(folder / "store"),
         "--device", "cpu"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert service.stdout is not None
    service.stdout.readline()

    class Soaked(Cluster):
        """A cluster whose SuperNodes are killed and started again, with the same key."""

        def __init__(self, *arguments) -> None:  # type: ignore[no-untyped-def]
            super().__init__(*arguments)
            running["it"] = self

        def again(self, client: int) -> None:
            """Kill a client's SuperNode; a thread starts it anew, until the SuperLink takes its key again."""
            process = self.workplace.processes[f"supernode-{client}"]
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            self.alive.discard(client)

            def start() -> None:
                deadline = time.monotonic() + 90
                while time.monotonic() < deadline:
                    self._start_supernode(client)
                    time.sleep(6.0)  # a key of a node that died is refused until its heartbeat is missed
                    if self.workplace.exit_code(f"supernode-{client}") is None:
                        self.alive.add(client)
                        return

            threading.Thread(target=start, daemon=True).start()

    def on_round(record: RoundRecord) -> None:
        it = running["it"]
        if record.round % every == 0 and record.round < rounds - 2 * every:
            client = (record.round // every) % clients
            seen.killed.append((record.round, client))
            it.again(client)
        if record.round % 10 == 0:
            seen.note("certify", service.pid)
            for program in ("flower-superlink", "flwr-serverapp"):
                seen.note(program, named(program, it.workplace.environment[MARK]))
            last = {role: sizes[-1] for role, sizes in seen.memory.items()}
            print(f"round {record.round}: {len(record.clients)} replies, {record.seconds:.1f} s, {last} MB", flush=True)

    config = RunConfig(
        name="soak", runs_dir=str(folder), num_clients=clients, num_rounds=rounds, rule="geometric_median()",
        training="sgd(lr=0.1, epochs=1, batch_size=32)", round_timeout=10.0, workers=1, gate="paper()",
        gate_service=f"127.0.0.1:{port}", gate_validation=40, gate_certification=10, gate_attack_steps=2,
        gate_probes=False, gate_eps="0.02", gate_timeout=30.0,
    )  # fmt: skip
    try:
        cluster.run(config, on_round, lambda text: None, Soaked)
    finally:
        service.terminate()
        service.wait(40)
    record = read_run(config.run_folder)
    whole = record.status == "finished" and [r.round for r in record.rounds] == list(range(1, rounds + 1))
    wrong = []
    for number, client in seen.killed:
        later = record.rounds[number : number + 40]
        if not any(client in r.clients for r in later) and number + 40 <= rounds:
            wrong.append(f"client {client}, killed after round {number}, did not come back within 40 rounds")
    return seen, whole, "; ".join(wrong)


def main() -> None:
    """Print memory and what was lost; exit with 1 if something was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="hawthorn-soak-") as folder:
        seen, whole, wrong = soak(given.rounds, given.clients, given.every, Path(folder))
    growth = seen.growth()
    for role, (second, last) in growth.items():
        print(f"{role}: {second:.0f} MB in the second quarter, {last:.0f} MB in the last")
    seconds = time.monotonic() - begin
    print(f"{given.rounds} rounds in {seconds:.0f} s, {len(seen.killed)} kills; every round recorded: {whole}")
    print(wrong or "every client that was killed came back")
    if given.json:
        found = {"memory": seen.memory, "killed": seen.killed, "growth": growth, "whole": whole, "wrong": wrong}
        given.json.write_text(json.dumps(found, indent=2))
    sys.exit(not (whole and flat(growth) and not wrong))


if __name__ == "__main__":
    main()
