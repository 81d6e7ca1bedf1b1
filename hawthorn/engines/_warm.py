"""Warm fork server: Flower programs start as forks of a process that has imported torch and flwr already.

Flower starts a fresh ``flwr-clientapp`` for every message, which then imports torch and flwr for seconds. Here the
program that Flower finds first on PATH is a stand-in (`_launcher.py`) that asks a fork server to run the
task in a new process: same arguments, environment, folder, streams, signals and exit code, and nothing shared
between two messages or two clients but memory pages that nobody has written to.

One *common* server imports the modules and listens for *roots* (``flower-superlink``, ``flower-supernode``). For each
root it forks a server of its own, in a session of its own, which runs the root, listens for what the root
starts (``flower-superexec``, ``flwr-clientapp``, ...) and ends that whole session as soon as the root, the root's
launcher or the common server ends. The common server ends with its standard input, so a federation never
outlives the engine, whatever happened to it.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:  # at run time only after this file's folder left sys.path
    from hawthorn.engines._fork_server import Request

# Program -> module:function, what the console script of that name calls (see `_waits.py`).
PROGRAMS = {
    "flower-superlink": "flwr.superlink.cli:flower_superlink",
    "flower-supernode": "hawthorn.engines._waits:flower_supernode",
    "flower-superexec": "flwr.supercore.cli:flower_superexec",
    "flwr-clientapp": "flwr.supernode.cli:flwr_clientapp",
    "flwr-serverapp": "hawthorn.engines._waits:flwr_serverapp",
    "flwr-simulation": "flwr.simulation.app:flwr_simulation",
}


def main() -> None:
    """Serve, told by a JSON file: address, modules, settings, and programs if not `PROGRAMS`."""
    sys.path.pop(0)  # this file's folder
    from hawthorn.engines._fork_server import ForkServer

    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    programs = plan.get("programs") or PROGRAMS
    if programs is PROGRAMS:
        entry("hawthorn.engines._waits:shorten_constants")()
    preload(plan["modules"], plan["settings"])
    lifeline = os.dup(0)
    with open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
    task = ForkServer(plan["address"], lifeline, programs).serve()
    if task is not None:
        become(task)
        finish(call(entry(programs[task.program])))


def become(request: "Request") -> None:
    """Turn this forked process into the one the launcher stands for: streams, folder, environment, arguments."""
    sys.stdout.flush()
    sys.stderr.flush()
    for target, number in enumerate(request.streams):
        os.dup2(number, target)
        os.close(number)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # logs are read while they grow
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    sys.argv = [request.program, *request.arguments]
    with contextlib.suppress(OSError):  # how `ps` and `top` call it; all forks look alike otherwise
        Path("/proc/self/comm").write_text(request.program[:15])
    refresh_randomness()


def refresh_randomness() -> None:
    """Give the global generators the state of a fresh process; two forks would draw the same noise otherwise.

    Hawthorn draws from explicit generators only; this is for third-party code, such as Flower's privacy mods.
    """
    random.seed()
    if "numpy" in sys.modules:
        legacy = importlib.import_module("numpy.random")
        legacy.set_state(legacy.RandomState().get_state())
    if "torch" in sys.modules:
        importlib.import_module("torch").seed()


def preload(modules: Iterable[str], settings: dict[str, object]) -> None:
    """Import modules and call their ``preload(settings)`` where they have one.

    A failure is only printed: the task meets it again, in the process and log where it belongs.
    """
    for name in modules:
        try:
            module = importlib.import_module(name)
            if callable(prepare := getattr(module, "preload", None)):
                prepare(settings)
        except Exception:
            print(f"warm server: cannot preload {name}", file=sys.stderr)
            traceback.print_exc()
    gc.collect()
    gc.freeze()  # later collections leave the shared pages alone


def entry(reference: str) -> Callable[[], object]:
    """Return the function that ``module:function`` names."""
    module, _, function = reference.partition(":")
    return getattr(importlib.import_module(module), function)


def call(function: Callable[[], object]) -> int:
    """Return the exit code that a console script calling `function` would end with."""
    try:
        result = function()
    except SystemExit as error:
        result = error.code
    except BaseException:
        traceback.print_exc()
        return 1
    if result is None or isinstance(result, int):
        return int(result or 0) & 0xFF
    print(result, file=sys.stderr)
    return 1


def finish(code: int) -> NoReturn:
    """End like the interpreter does (threads, exit functions, streams) but do not take torch apart: 0.3 s of work."""
    getattr(threading, "_shutdown", lambda: None)()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
