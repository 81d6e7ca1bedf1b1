"""Measuring processes from outside, on Linux: CPU time and memory of a process with everything it started.

CPU time is the user and system time of all living processes of the tree, to the nanosecond, plus that of their
dead children as the kernel has it. Memory is the sum of the proportional set sizes (PSS): a page that several
processes share counts once in all (and less when processes outside the tree share it too: measure on a quiet machine).
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "HAWTHORN_BENCHMARK"  # the variable by which a measured process's tree is known
TICKS = os.sysconf("SC_CLK_TCK")
QUIET = {
    "OMP_NUM_THREADS": "1",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


class MeasureError(RuntimeError):
    """A measured process failed; the text has the end of its output."""


@dataclass(frozen=True)
class Round:
    """One round: wall and CPU seconds, those of its parts where told, and the CPU seconds of other people's work."""

    seconds: float
    cpu: float
    parts: dict[str, float] = field(default_factory=dict)
    others: float = 0.0


class Measured:
    """A fresh process that reports the end of each round and waits; use as a context, which leaves nothing behind."""

    def __init__(self, command: list[str], folder: Path, timeout: float = 1800.0) -> None:
        self.mark = uuid.uuid4().hex
        self.log = folder / "output.log"
        self.peak = 0  # bytes, while `watch` is on
        self.seen: dict[int, str] = {}  # process id -> time of start, of every process of the tree ever seen
        ours, theirs = socket.socketpair()
        ours.settimeout(timeout)
        environment = {**os.environ, **QUIET, MARK: self.mark}
        arguments = [text.replace("{descriptor}", str(theirs.fileno())) for text in command]
        self.began = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                arguments,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        theirs.close()
        self._socket, self._line = ours, ours.makefile("rw")
        self._watching = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> "Measured":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._watching.clear()
        if self._watcher is not None:
            self._watcher.join()
        self.members()
        self._line.close()
        self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60 if error is None else 5)
        for pid, start in {**self.seen, **self.members()}.items():
            if start_time(pid) == start:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def first_round(self) -> Round:
        """Wait for the end of round 1; its seconds and CPU seconds count from the start of the process."""
        message = self._receive()
        return Round(message["ended"] - self.began, self.cpu(), message["parts"])

    def next_round(self) -> Round:
        """Let one round run and measure it."""
        busy, cpu = machine_busy(), self.cpu()
        begin = time.monotonic()
        self._send()
        message = self._receive()
        used = self.cpu() - cpu
        others = max(0.0, machine_busy() - busy - used)
        return Round(message["ended"] - begin, used, message["parts"], others)

    def finish(self) -> None:
        """Let the process end by itself after its last round; `MeasureError` if it fails."""
        self._send()
        try:
            code = self.process.wait(120)
        except subprocess.TimeoutExpired:
            raise MeasureError(f"the measured process did not end\n{self._tail()}") from None
        if code != 0:
            raise MeasureError(f"the measured process ended with code {code}\n{self._tail()}")

    def watch(self, interval: float = 0.05) -> None:
        """Sample the tree's memory until the end, into `peak`; costs CPU time, so not while timing."""

        def sample() -> None:
            while self._watching.is_set():
                self.peak = max(self.peak, self.memory())
                time.sleep(interval)

        self._watching.set()
        self._watcher = threading.Thread(target=sample, daemon=True)
        self._watcher.start()

    def cpu(self) -> float:
        """Return the CPU seconds that the tree has used so far."""
        return sum(cpu_seconds(pid) for pid in self.members())

    def memory(self) -> int:
        """Return the tree's memory in bytes (PSS)."""
        return sum(proportional_size(pid) for pid in self.members())

    def members(self) -> dict[int, str]:
        """Return the living processes of the tree: those that carry the mark, and all their descendants.

        A program that renames itself may overwrite its mark, so descent counts as well.
        """
        stats = {pid: stat for pid in process_ids() if (stat := read_stat(pid)) is not None}
        wanted = f"{MARK}={self.mark}".encode()
        inside = {pid for pid in stats if pid in self.seen or has_mark(pid, wanted)}
        while more := {pid for pid, stat in stats.items() if int(stat[1]) in inside} - inside:
            inside |= more
        living = {pid: stats[pid][19] for pid in inside if self.seen.get(pid, stats[pid][19]) == stats[pid][19]}
        self.seen.update(living)
        return living

    def _send(self) -> None:
        self._line.write("go\n")
        self._line.flush()

    def _receive(self) -> dict[str, Any]:
        try:
            text = self._line.readline()
        except TimeoutError:
            raise MeasureError(f"no round ended in {self._socket.gettimeout()} s\n{self._tail()}") from None
        if not text:
            raise MeasureError(f"the measured process ended early\n{self._tail()}")
        return json.loads(text)

    def _tail(self, lines: int = 30) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])


def python(*arguments: str) -> list[str]:
    """Return the command that runs this Python with `arguments`."""
    return [sys.executable, *arguments]


def process_ids() -> list[int]:
    """Return the ids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read_stat(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name (0: state, 1: parent, 19: time of start); None if gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return text[text.rindex(")") + 2 :].split()


def start_time(pid: int) -> str | None:
    """Return when a process started, which with its id names it for good; None if it is gone or only a zombie."""
    stat = read_stat(pid)
    return None if stat is None or stat[0] == "Z" else stat[19]


def has_mark(pid: int, wanted: bytes) -> bool:
    """Whether a process's environment has the entry `wanted`."""
    try:
        return wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process with all its threads, and of its children that ended and were waited for."""
    stat = read_stat(pid)
    if stat is None:
        return 0.0
    dead_children = (int(stat[13]) + int(stat[14])) / TICKS
    try:
        return time.clock_gettime((~pid << 3) | 2) + dead_children  # the kernel's clock of another process's CPU time
    except OSError:
        return (int(stat[11]) + int(stat[12])) / TICKS + dead_children


def proportional_size(pid: int) -> int:
    """Return a process's proportional set size in bytes; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def machine_busy() -> float:
    """Return the CPU seconds that all processes of the machine have used since it started."""
    fields = [int(text) for text in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
    user, nice, system, _idle, _wait, irq, softirq = fields[:7]
    return (user + nice + system + irq + softirq) / TICKS
