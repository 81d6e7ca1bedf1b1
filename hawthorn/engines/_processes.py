"""Processes of an engine: a private workplace for one run, and the certainty that nothing outlives it.

A `Workplace` is a temporary folder (Flower's home folders, the app, sockets, the folder that comes first on
PATH), an environment and the processes started in it. Leaving it ends them all, by id: the stand-ins get a signal,
the warm fork server loses its lifeline (which ends every session it forked), and whatever else carries the
workplace's mark in its environment, such as Ray's daemons, is found and ended.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hawthorn.engines import QUIET, _launcher, _waits, _warm
from hawthorn.engines._endings import ENDING_SIGNALS, MARK, end_groups, end_marked, ignored_signals, interrupt, leave
from tasks.errors import EngineError

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
# One thread per process: clients share the cores.
VARIABLES = {
    **QUIET,
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",
}
LOGGED_APART = ("flwr-serverapp", "flwr-simulation")  # Flower throws their output away otherwise
GRACE = 3.0  # seconds between asking a process to end and making it


def free_ports(count: int) -> list[int]:
    """Return `count` different TCP ports that are free on 127.0.0.1 now."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]


def find_program(name: str) -> str:
    """Return the path of a Flower program of this Python environment; `EngineError` if it is not installed."""
    for folder in (sysconfig.get_path("scripts"), str(Path(sys.executable).parent), None):
        if found := shutil.which(name, path=folder):
            return found
    raise EngineError(f"cannot find the program {name}; install Flower: pip install 'flwr[simulation]'")


def environment(folder: Path) -> dict[str, str]:
    """Return the environment of a workplace's processes: quiet, offline, this installation's packages."""
    result = {**os.environ, **VARIABLES, MARK: secrets.token_hex(16)}
    result["PATH"] = os.pathsep.join([str(folder / "bin"), result.get("PATH", os.defpath)])
    result["RAY_TMPDIR"] = str(folder)
    for key in ("no_proxy", "NO_PROXY"):  # a proxy must not see loopback traffic
        result[key] = ",".join(filter(None, [result.get(key, ""), "127.0.0.1,localhost"]))
    installed = {Path(sysconfig.get_path(kind)).resolve() for kind in ("purelib", "platlib")}
    if PACKAGE_ROOT not in installed:
        result["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PACKAGE_ROOT), result.get("PYTHONPATH", "")]))
    return result


class Workplace:
    """The folder, environment and processes of one run; a context manager that ends and removes them all.

    While it is open, SIGTERM and SIGHUP raise `SystemExit` in the main thread, as Ctrl-C raises
    `KeyboardInterrupt`, so that every way out passes through the end.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Workplace":
        self.logs.mkdir(parents=True, exist_ok=True)
        # Sockets have a path limit of about 100 characters, which the default folder of some systems eats up.
        self.folder = Path(tempfile.mkdtemp(prefix="hawthorn-", dir="/tmp" if os.path.isdir("/tmp") else None))
        self.environment = environment(self.folder)
        self._write_launchers()
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, leave) for number in ENDING_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with ignored_signals():
            if kind is not None and (pid := self.serverapp_pid()) is not None:
                interrupt(pid, GRACE)  # it can still write into the record that the run was cut short
            self._end()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(
        self, role: str, command: Sequence[str], variables: Mapping[str, str] | None = None, *, shown: bool = False
    ) -> int:
        """Start a Flower program in a session of its own; return its process id.

        It logs to ``<role>.log`` or, if `shown`, to this program's own standard output.
        """
        with contextlib.nullcontext() if shown else self._log(role) as log:
            self.processes[role] = subprocess.Popen(
                [str(self.folder / "bin" / command[0]), *command[1:]],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.environment, **(variables or {})},
                start_new_session=True,
            )
        return self.processes[role].pid

    def start_warm(self, modules: Sequence[str], settings: Mapping[str, Any], timeout: float) -> None:
        """Start the warm fork server with modules imported. Not on Linux or with HAWTHORN_WARM=0: starts stay cold."""
        if sys.platform != "linux" or os.environ.get("HAWTHORN_WARM") == "0":
            return
        address = self.folder / "warm"
        plan = self.folder / "warm.json"
        plan.write_text(json.dumps({"address": str(address), "modules": list(modules), "settings": dict(settings)}))
        with self._log("warm") as log:
            server = self.processes["warm"] = subprocess.Popen(
                [sys.executable, _warm.__file__, str(plan)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment,
                start_new_session=True,
            )
        deadline = time.monotonic() + timeout
        while not address.exists():
            if server.poll() is not None or time.monotonic() > deadline:
                raise EngineError(f"the warm fork server did not start within {timeout:g} s\n{self.log_tail('warm')}")
            time.sleep(0.02)
        self.environment[_launcher.SOCKET_VARIABLE] = str(address)

    def write_app(self, pyproject: str) -> Path:
        """Write the folder of the app that is submitted, nothing but its ``pyproject.toml``; return it."""
        app = self.folder / "app"
        app.mkdir()
        (app / "pyproject.toml").write_text(pyproject, encoding="utf-8")
        return app

    def exit_code(self, role: str) -> int | None:
        """Return the exit code of a started process, None while it runs."""
        return self.processes[role].poll()

    def serverapp_pid(self) -> int | None:
        """Return the process id of the ServerApp (or its launcher), None before it started."""
        try:
            return int((self.folder / "serverapp.pid").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def log_tail(self, role: str, num_lines: int = 25) -> str:
        """Return the last lines of a role's log, under a line that says where the whole is."""
        path = self.logs / f"{role}.log"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return "\n".join([f"--- last lines of {path}", *(lines[-num_lines:] or ["(empty)"])])

    def _log(self, role: str) -> Any:
        return open(self.logs / f"{role}.log", "wb")

    def _write_launchers(self) -> None:
        (self.folder / "bin").mkdir()
        for program in _warm.PROGRAMS:
            words = [sys.executable, "-IS", _launcher.__file__, program, self._cold(program)]
            line = f'exec {shlex.join(words)} "$@"'
            if program in LOGGED_APART:
                line = f"echo $$ >{shlex.quote(str(self.folder / 'serverapp.pid'))}\n{line}"
                line += f" >>{shlex.quote(str(self.logs / 'serverapp.log'))} 2>&1"
            path = self.folder / "bin" / program
            path.write_text(f"#!/bin/sh\n{line}\n")
            path.chmod(0o755)
        (self.logs / "serverapp.log").write_bytes(b"")

    def _cold(self, program: str) -> str:
        """Return the path of a program that does without the warm server what is done in it, or of Flower's own."""
        module, _, function = _warm.PROGRAMS[program].partition(":")
        if module != _waits.__name__:
            return find_program(program)
        code = f"import sys; from {module} import {function}, shorten_constants; shorten_constants(); "
        words = [sys.executable, "-c", f"{code}sys.exit({function}())"]
        path = self.folder / "bin" / f"cold-{program}"
        path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        path.chmod(0o755)
        return str(path)

    def _end(self) -> None:
        warm = self.processes.get("warm")
        started = [process for process in self.processes.values() if process is not warm]
        end_groups(started, GRACE)
        if warm is not None and warm.stdin is not None:
            warm.stdin.close()
            end_groups([warm], GRACE, first=0)
        end_marked(self.environment[MARK])
        shutil.rmtree(self.folder, ignore_errors=True)
