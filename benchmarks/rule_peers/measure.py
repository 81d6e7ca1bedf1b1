"""Measuring calls in this process: CPU time of all its threads, in turns, and memory beyond what was there."""

import ctypes
import gc
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from torch import Tensor

from benchmarks.rule_peers import Call


@dataclass
class Measured:
    """Seconds of every call that counts, bytes beyond the input, and the result; or the reason why there are none."""

    seconds: list[float] = field(default_factory=list)
    extra: int | None = None
    result: Tensor | None = None
    reason: str = ""

    @property
    def median(self) -> float | None:
        return median(self.seconds) if self.seconds else None


def compete(calls: Mapping[str, Call | str], repeats: int, patience: float, memory: bool = True) -> dict[str, Measured]:
    """Run the calls in turns, `repeats` rounds of them; who took a third of `patience` (s) at first is not run again.

    The first call of each, which may compile, is not counted unless it stays the only one.
    """
    outcomes = {name: Measured(reason=call) if isinstance(call, str) else Measured() for name, call in calls.items()}
    running = {name: call for name, call in calls.items() if isinstance(call, Call)}
    for name, call in list(running.items()):
        outcome = outcomes[name]
        try:
            first, outcome.result = timed(call)
            if first > patience / 3:
                outcome.seconds.append(first)
                del running[name]
            elif memory:
                outcome.extra = extra_memory(call)
        except Exception as error:  # a peer may raise anything; its cell says what
            outcome.reason = f"{type(error).__name__}: {error}".split("\n")[0]
            del running[name]
    spent = dict.fromkeys(running, 0.0)
    for _ in range(repeats):
        for name, call in running.items():
            if spent[name] <= patience:
                seconds, _ = timed(call)
                outcomes[name].seconds.append(seconds)
                spent[name] += seconds
    return outcomes


def timed(call: Call) -> tuple[float, Tensor | None]:
    """Return the CPU seconds of one call, and its result."""
    given = call.fresh()
    start = time.process_time()
    result = call.run(given)
    return time.process_time() - start, result


def extra_memory(call: Call) -> int | None:
    """Return by how many bytes the process grew at most during one call; None where the system does not tell."""
    given = call.fresh()
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before must not hide what is taken now
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except (OSError, AttributeError):
        return None
    before = resident()
    call.run(given)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return max(0, int(line.split()[1]) * 1024 - before)
    return None


def resident() -> int:
    """Return the bytes that this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
