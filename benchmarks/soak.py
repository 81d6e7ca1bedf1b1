"""A long run with clients that die and come back: does everything stay recorded, and does memory stay flat?

    python benchmarks/soak.py [--rounds 200] [--every 5] [--clients 8] [--json OUT]

A federation of real processes (engine `cluster`) trains under a gate that the certification service decides; every few
rounds the next client's SuperNode is killed, unless half of them are away, and whatever SuperNode has ended is started
anew with its key until the SuperLink takes it, as `restart: unless-stopped` does. Memory is the resident set of the
ServerApp, of the SuperLink and of the service, in MB, after every tenth round. Flat means: the mean of the last
quarter is at most 10 % (and 20 MB) above that of the second quarter. Exits with 1 if a round is missing, memory grew,
or a client that was killed had no part in any round after.
"""

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from benchmarks.deployment.service import PATIENT, Certify
from hawthorn.engines import QUIET, cluster
from hawthorn.engines._endings import MARK
from hawthorn.engines.cluster import Cluster
from server.record import RoundRecord, read_run
from tasks.config import RunConfig

GROWTH, SLACK = 1.10, 20.0  # what counts as flat


@dataclass
class Kill:
    """A client killed after a round, and when its update was used again: round, and seconds after the kill."""

    round: int
    client: int
    back: int | None = None
    seconds: float = 0.0


@dataclass
class Soak:
    """What was measured: role -> resident MB after some rounds; who was killed when, and who came back."""

    memory: dict[str, list[float]] = field(default_factory=dict)
    kills: list[Kill] = field(default_factory=list)

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


class Soaked(Cluster):
    """A cluster that starts every SuperNode anew that ended, with the same key; `it` is the one that runs."""

    it: "Soaked"

    def __init__(self, *arguments) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*arguments)
        self.not_before = dict.fromkeys(range(self.config.num_clients), 0.0)
        Soaked.it = self

    def watch(self) -> None:
        """A key is refused while the SuperLink waits for the heartbeat of the node that died: tried every 3 s."""
        for client, moment in self.not_before.items():
            if self.workplace.exit_code(f"supernode-{client}") is not None and time.monotonic() > moment:
                self._start_supernode(client)
                self.alive.add(client)
                self.not_before[client] = time.monotonic() + 3.0
        super().watch()

    def kill(self, client: int) -> None:
        """Kill a client's SuperNode."""
        process = self.workplace.processes[f"supernode-{client}"]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()

    def mark(self) -> str:
        """Return what this run's processes are known by."""
        return self.workplace.environment[MARK]


class Killer:
    """Called after every round: notes who is back, kills whose turn it is, looks at memory."""

    def __init__(self, rounds: int, clients: int, every: int, service: int) -> None:
        self.rounds, self.clients, self.every, self.service = rounds, clients, every, service
        self.seen, self.away, self.turn, self.due = Soak(), dict[int, tuple[Kill, float]](), 0, every

    def __call__(self, record: RoundRecord) -> None:
        for client in [c for c in self.away if c in record.clients]:
            kill, begin = self.away.pop(client)
            kill.back, kill.seconds = record.round, round(time.monotonic() - begin, 1)
        if self.due <= record.round < 0.85 * self.rounds and len(self.away) < self.clients // 2:
            while self.turn in self.away:
                self.turn = (self.turn + 1) % self.clients
            self.seen.kills.append(kill := Kill(record.round, self.turn))
            self.away[self.turn] = kill, time.monotonic()
            Soaked.it.kill(self.turn)
            self.turn, self.due = (self.turn + 1) % self.clients, record.round + self.every
        if record.round % 10 == 0:
            self.look(record)

    def look(self, record: RoundRecord) -> None:
        """Note memory, print a line."""
        self.seen.note("certify", self.service)
        for program in ("flower-superlink", "flwr-serverapp"):
            self.seen.note(program, named(program, Soaked.it.mark()))
        last = {role: sizes[-1] for role, sizes in self.seen.memory.items()}
        print(f"round {record.round}: {len(record.clients)} replies, {record.seconds:.1f} s, {last} MB", flush=True)


def soak(rounds: int, clients: int, every: int, folder: Path) -> tuple[Soak, bool, str]:
    """Run; return what was measured, whether every round is there, and what went wrong."""
    with Certify(folder) as service:
        assert service.process is not None
        config = RunConfig(
            name="soak", runs_dir=str(folder), num_clients=clients, num_rounds=rounds, rule="geometric_median()",
            training="sgd(lr=0.1, epochs=1, batch_size=32)", round_timeout=10.0, workers=1, gate=PATIENT,
            gate_service=f"127.0.0.1:{service.port}", gate_validation=40, gate_certification=10, gate_attack_steps=2,
            gate_probes=False, gate_eps="0.02", gate_timeout=30.0,
        )  # fmt: skip
        killer = Killer(rounds, clients, every, service.process.pid)
        cluster.run(config, killer, lambda text: None, Soaked)
    record = read_run(config.run_folder)
    whole = record.status == "finished" and [r.round for r in record.rounds] == list(range(1, rounds + 1))
    gone = [f"client {kill.client}, killed after round {kill.round}" for kill in killer.seen.kills if kill.back is None]
    return killer.seen, whole, "; ".join(f"{who}, did not come back" for who in gone)


def main() -> None:
    """Print memory and what was lost; exit with 1 if something was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--clients", type=int, default=8)
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
    print(f"{given.rounds} rounds in {seconds:.0f} s, {len(seen.kills)} kills; every round recorded: {whole}")
    took = [kill.seconds for kill in seen.kills if kill.back is not None]
    if took:
        print(f"back after {min(took):.0f} to {max(took):.0f} s, {median(took):.0f} s in the middle")
    print(wrong or "every client that was killed came back")
    if given.json:
        found = {
            "memory": seen.memory,
            "kills": [asdict(kill) for kill in seen.kills],
            "growth": growth,
            "whole": whole,
            "wrong": wrong,
        }
        given.json.write_text(json.dumps(found, indent=2))
    sys.exit(not (whole and flat(growth) and not wrong))


if __name__ == "__main__":
    main()
