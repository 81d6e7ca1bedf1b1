"""Faults of a SuperNode: killed, hung, cut off, its clock wrong."""

import contextlib
import os
import signal
import socket
import threading
import time
from pathlib import Path

from benchmarks.deployment.trial import ROOT, TIMEOUT, Row, Run, clean, complete, reasons, settings
from hawthorn.engines.cluster import Cluster
from tasks.errors import EngineError


def supernode_killed(folder: Path) -> Row:
    run = Run(settings(folder, "killed", training="sgd(lr=0.5, epochs=12, batch_size=4)")).start()
    run.wait_round(2)
    time.sleep(0.3)
    begin = time.monotonic()
    os.kill(run.pids()["supernodes"]["2"], signal.SIGKILL)  # type: ignore[index]
    record = run.join()
    without = [number for number, r in enumerate(record.rounds) if 2 not in r.clients]
    passed = complete(record) and run.error is None and [r.clients for r in record.rounds[-2:]] == [[0, 1, 3]] * 2
    said = next((m for m in run.messages if "client 2" in m), "nothing")
    seconds = run.times[without[0]] - begin if without else None
    return Row("SuperNode SIGKILL mid-train", f"{said}; {reasons(record)}", "that client's update", seconds, passed)


def supernode_hung(folder: Path) -> Row:
    """A ClientApp trains for ever; its SuperNode's heartbeats go on."""
    forever = {
        "malicious_clients": "1",
        "attack": "train_with(epochs=10000000)",
        "attack_schedule": "continuous(start=3)",
    }
    run = Run(settings(folder, "hung", num_rounds=5, **forever)).start()
    run.wait_round(2)
    begin = run.times[1]
    run.wait_round(4)
    record = run.join()
    passed = complete(record) and run.error is None and record.rounds[2].dropped.keys() == {"1"}
    passed = passed and record.rounds[2].seconds < TIMEOUT + 3 and record.rounds[3].seconds < TIMEOUT
    seen = f"{reasons(record)}; later rounds do not wait for it ({record.rounds[3].seconds:.1f} s)"
    return Row("SuperNode hung", seen, "that client's updates", run.times[2] - begin, passed)


class Freezer:
    """A proxy on loopback that can stop passing bytes on without closing anything: a network gone silent."""

    def __init__(self, target: int) -> None:
        self.target, self.open = target, threading.Event()
        self.open.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self.listener.accept()
                self.open.wait()
                far = socket.create_connection(("127.0.0.1", self.target))
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=pair, daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError), source, sink:
            while data := source.recv(65536):
                self.open.wait()
                sink.sendall(data)


def partition(folder: Path) -> Row:
    proxies: list[Freezer] = []

    class Apart(Cluster):
        def fleet_port(self, client: int) -> int:
            if client != 2:
                return self.fleet
            proxies.append(Freezer(self.fleet))
            return proxies[0].port

    run = Run(settings(folder, "partition", num_rounds=40, round_timeout=3.0), Apart).start()
    run.wait_round(2)
    proxies[0].open.clear()
    run.wait_round(5)
    begin, there = time.monotonic(), len(run.times)
    proxies[0].open.set()
    record = run.join()
    proxies[0].listener.close()
    missed = [r.round for r in record.rounds if 2 not in r.clients]
    back = [number for number in range(there + 1, 41) if number not in missed]
    passed = complete(record) and run.error is None and bool(missed) and bool(back) and 40 not in missed
    seconds = run.times[back[0] - 1] - begin if back else None
    seen = f"{reasons(record)}; rounds {missed[0]} to {missed[-1]} without it, then back" if missed else "nothing"
    return Row("network partition of one node", seen, "that client's updates meanwhile", seconds, passed)


# Flower's own clock; Python's would take gRPC's deadlines along, which are of the machine's.
SKEWED = """
import datetime
from hawthorn.engines._waits import shorten_constants
shorten_constants()  # before Flower's other modules, as in every SuperNode
import flwr.supercore.date as date
ahead, of_date = datetime.timedelta(seconds={seconds}), date.now
date.now = lambda: of_date() + ahead
"""


def clock_skew(folder: Path) -> Row:
    """One SuperNode's clock is four minutes behind: fine. A minute ahead: the SuperLink refuses its signatures."""

    def skewed(seconds: int) -> Run:
        place = folder / f"ahead{seconds}"
        place.mkdir()
        (place / "sitecustomize.py").write_text(SKEWED.format(seconds=seconds))

        class Skewed(Cluster):
            def variables(self, role: str) -> dict[str, str]:
                if role != "supernode-1":
                    return super().variables(role)
                path = os.pathsep.join([str(place), self.workplace.environment.get("PYTHONPATH", str(ROOT))])
                return {**super().variables(role), "PYTHONPATH": path, "HAWTHORN_WARM_SOCKET": ""}  # a cold start

        return Run(
            settings(folder, f"skew{seconds}", num_rounds=2, round_timeout=60.0, startup_timeout=120.0), Skewed
        ).start()

    near = skewed(-240)
    record = near.join()
    fine = complete(record) and record.facts["sha256"] == clean(near.config) and not reasons(record)
    far, begin = skewed(60), time.monotonic()
    far.thread.join(150)
    refused = isinstance(far.error, EngineError) and "Invalid timestamp" in str(far.error)
    said = [line for line in str(far.error).splitlines() if "ended with" in line or "refused" in line]
    seen = f"4 min behind: nothing; 1 min ahead: {'; '.join(said)}"
    return Row("clock skew between nodes", seen, "nothing", time.monotonic() - begin, fine and refused)
