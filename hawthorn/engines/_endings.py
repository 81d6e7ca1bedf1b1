"""Ending processes for certain: groups by signal and then by force, and whatever else carries a mark."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

MARK = "HAWTHORN_WORKPLACE"  # the variable by which a run's processes are known
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


def end_groups(processes: Sequence[subprocess.Popen[Any]], grace: float, first: int = signal.SIGTERM) -> None:
    """Signal the process groups, wait up to `grace` seconds for their leaders, then kill what is left of them."""
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, first)
    deadline = time.monotonic() + grace
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that ended but was not waited for does not (as far as /proc tells)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def interrupt(pid: int, grace: float) -> None:
    """Send SIGINT to a process and give it `grace` seconds to end."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGINT)
    deadline = time.monotonic() + grace
    while is_running(pid) and time.monotonic() < deadline:
        time.sleep(0.02)


def end_marked(mark: str, grace: float = 5.0) -> list[int]:
    """Kill every process whose environment carries `mark` (Linux), such as daemons with sessions of their own."""
    ended: list[int] = []
    deadline = time.monotonic() + grace
    while (found := marked(mark)) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        ended += found
        time.sleep(0.02)
    return sorted(set(ended))


def marked(mark: str) -> list[int]:
    """Return the ids of the living processes whose environment carries `mark`; empty where there is no /proc."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


@contextlib.contextmanager
def ignored_signals() -> Iterator[None]:
    """Let an impatient second Ctrl-C not interrupt the end."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, *ENDING_SIGNALS)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def leave(number: int, _frame: FrameType | None) -> None:
    """Leave the program on a signal, through every ``finally``."""
    raise SystemExit(128 + number)
