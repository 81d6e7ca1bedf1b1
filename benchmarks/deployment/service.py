"""Faults of the certification service: away, silent, restarted."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.deployment.trial import ROOT, Row, Run, complete, settings
from hawthorn.engines._processes import free_ports
from tasks.config import RunConfig
from tasks.errors import EngineError

# A policy that a model which only learns passes: what is refused here is refused for the service's sake.
PATIENT = "paper(two_sided=False, accuracy_share=0.5, loss_floor=1.0)"


class Certify:
    """A certification service in a process, and a proxy before it that can be slowed or closed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_ports(1)[0]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "certify",
            "serve",
            "--port",
            str(self.port),
            "--store",
            str(self.folder / "store"),
        ]
        self.process = subprocess.Popen(
            [*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        if "ready" not in self.process.stdout.readline():
            raise EngineError("the certification service did not start")

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(number)
            self.process.wait(30)
            self.process = None

    def __enter__(self) -> "Certify":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def gated(folder: Path, name: str, port: int) -> RunConfig:
    """Return a run whose every round a service must accept."""
    return settings(
        folder, name, gate=PATIENT, gate_service=f"127.0.0.1:{port}", gate_validation=60, gate_certification=20,
        gate_attack_steps=2, gate_probes=False, gate_timeout=4.0, gate_attempts=2, gate_eps="0.05", num_rounds=14,
    )  # fmt: skip


def _certify(
    fault: str, folder: Path, name: str, stop: Callable[[Certify], None], back: Callable[[Certify], None]
) -> Row:
    """Break the service after two rounds, repair it after two more: every round meanwhile must be refused."""
    with Certify(folder / name) as service:
        run = Run(gated(folder, f"{name}-run", service.port), engine="in_process").start()
        run.wait_round(2)
        stop(service)
        broken = len(run.times) + 1  # a decision may be on its way
        run.wait_round(broken + 2)
        back(service)
        begin, repaired = time.monotonic(), len(run.times)
        record = run.join()
    during = record.rounds[broken:repaired]
    after = [number for number in range(repaired, len(record.rounds)) if record.rounds[number].skipped is None]
    held = bool(during) and all(r.skipped is not None for r in during)
    held = held and len({r.sha256 for r in record.rounds[broken - 1 : repaired]}) <= 2
    passed = complete(record) and held and bool(after) and run.error is None
    said = str(during[0].skipped).replace(f"127.0.0.1:{service.port}", "HOST:PORT") if during else ""
    seen = f"{len(during)} rounds refused: {said[:80]}"
    seconds = run.times[after[0]] - begin if after else None
    return Row(fault, seen, "the rounds meanwhile; the model stays", seconds, passed)


def certify_down(folder: Path) -> Row:
    return _certify("certify killed, started anew", folder, "down", Certify.kill, Certify.start)


def certify_slow(folder: Path) -> Row:
    def stop(service: Certify) -> None:
        assert service.process is not None
        service.process.send_signal(signal.SIGSTOP)

    def back(service: Certify) -> None:
        assert service.process is not None
        service.process.send_signal(signal.SIGCONT)

    return _certify("certify hangs, goes on", folder, "slow", stop, back)


def certify_restarted(folder: Path) -> Row:
    """The service is restarted between rounds; nothing is refused that an undisturbed service takes."""
    with Certify(folder / "again") as service:
        config = gated(folder, "again-run", service.port).replace(gate_timeout=60.0, gate_attempts=8, num_rounds=6)
        run = Run(config, engine="in_process").start()
        run.wait_round(2)
        begin = time.monotonic()
        service.kill(signal.SIGTERM)
        service.start()
        run.wait_round(len(run.times) + 1)
        seconds = run.times[-1] - begin
        record = run.join()
    away = [r for r in record.rounds if r.skipped and "127.0.0.1" in r.skipped]
    passed = complete(record) and not away and run.error is None
    return Row("certify restarted", "the round waits for it and asks again", "nothing", seconds, passed)
