"""What goes wrong in a deployment, done on purpose: what the user sees, what was lost, how long it took to recover.

    python benchmarks/faults.py [--only partition,clock-skew] [--json OUT]

Every fault meets a small federation of real processes (engine `cluster`: TLS, node keys, gRPC) or, where it is about
the record or the certification service, the in-process engine. A run that went on without a client, or was resumed,
must have every round once; a resumed one must end with the very model of a run that nothing happened to.
Exits with 1 if a finished round was lost or a run came to a wrong end.
"""

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from rich.console import Console
from rich.table import Table

from hawthorn.engines import QUIET, cluster, in_process
from hawthorn.engines._processes import free_ports
from hawthorn.engines.cluster import Cluster
from server.record import RoundRecord, RunRecord, read_run
from tasks.config import RunConfig
from tasks.errors import EngineError, HawthornError

ROOT = Path(__file__).resolve().parents[1]
ROUNDS, CLIENTS, TIMEOUT = 6, 4, 12.0


@dataclass
class Row:
    """One fault: what was seen, what was lost (nothing finished may be), seconds until rounds went on."""

    fault: str
    seen: str
    lost: str
    seconds: float | None
    passed: bool


@dataclass
class Run:
    """A run in a thread: its rounds as they came, its messages, its error."""

    config: RunConfig
    make: type[Cluster] | None = None
    engine: str = "cluster"
    times: list[float] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    error: Exception | None = None

    def start(self) -> "Run":
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        return self

    def wait_round(self, number: int, seconds: float = 180.0) -> None:
        """Wait until a round is finished."""
        deadline = time.monotonic() + seconds
        while len(self.times) < number:
            if time.monotonic() > deadline or not self.thread.is_alive():
                raise EngineError(f"round {number} did not come: {self.error or self.messages}")
            time.sleep(0.02)

    def join(self, seconds: float = 240.0) -> RunRecord:
        """Wait for the end; return the record."""
        self.thread.join(seconds)
        if self.thread.is_alive():
            raise EngineError(f"the run did not end within {seconds:g} s")
        return read_run(self.config.run_folder)

    def pids(self) -> dict[str, object]:
        return json.loads((self.config.run_folder / "cluster.json").read_text())

    def _work(self) -> None:
        try:
            if self.engine == "cluster":
                cluster.run(self.config, self._note, self.messages.append, self.make)
            else:
                in_process.run(self.config, self._note, self.messages.append)
        except Exception as error:
            self.error = error

    def _note(self, record: RoundRecord) -> None:
        self.times.append(time.monotonic())


def settings(folder: Path, name: str, **changes: bool | int | float | str) -> RunConfig:
    """Return a federation that takes about a second a round."""
    base = RunConfig(
        runs_dir=str(folder), num_clients=CLIENTS, num_rounds=ROUNDS, rule="geometric_median()",
        training="sgd(lr=0.5, epochs=8, batch_size=16)", round_timeout=TIMEOUT, startup_timeout=90.0, workers=1,
    )  # fmt: skip
    return base.replace(name=name, **changes)


def clean(config: RunConfig) -> str:
    """Return the hash of the model that the run ends with when nothing happens to it."""
    quiet = config.replace(name=f"{config.name}-clean", resume=False, gate_service="", round_timeout=600.0)
    in_process.run(quiet)
    return str(read_run(quiet.run_folder).facts["sha256"])


def complete(record: RunRecord) -> bool:
    """Whether a run is finished and has every round once, in order."""
    return record.status == "finished" and [r.round for r in record.rounds] == list(
        range(1, record.config.num_rounds + 1)
    )


def reasons(record: RunRecord) -> str:
    """Return the first reason for which each client was dropped, and in how many rounds."""
    found: dict[str, list[str]] = {}
    for r in record.rounds:
        for client, reason in r.dropped.items():
            found.setdefault(client, []).append(reason)
    return "; ".join(f"client {c} dropped in {len(all_)} rounds: {all_[0][:60]}" for c, all_ in found.items())


# -- faults -----------------------------------------------------------------------------------------------------------


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


def superlink_restart(folder: Path) -> Row:
    config = settings(folder, "superlink")
    run = Run(config).start()
    run.wait_round(3)
    begin = time.monotonic()
    os.kill(int(run.pids()["superlink"]), signal.SIGKILL)  # type: ignore[arg-type]
    return _resumed("SuperLink killed, started anew, run resumed", run, config, begin)


def serverapp_crash(folder: Path) -> Row:
    config = settings(folder, "serverapp")
    run = Run(config).start()
    run.wait_round(3)
    begin = time.monotonic()
    os.kill(int(run.pids()["serverapp"]), signal.SIGKILL)  # type: ignore[arg-type]
    return _resumed("ServerApp SIGKILL, run resumed", run, config, begin)


def _resumed(fault: str, run: Run, config: RunConfig, begin: float) -> Row:
    before = run.join().rounds
    seen = str(run.error).splitlines()[0][:110] if run.error else "nothing"
    again = Run(config.replace(resume=True)).start()
    again.wait_round(1)
    record = again.join()
    kept = [r.sha256 for r in record.rounds[: len(before)]] == [r.sha256 for r in before]
    same = record.facts.get("sha256") == clean(config)
    passed = complete(record) and kept and same and run.error is not None and len(before) >= 3
    lost = f"no finished round ({len(before)} kept), same final model" if passed else f"kept {kept}, same model {same}"
    return Row(fault, f"{seen}; --resume", lost, again.times[0] - begin, passed)


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


SKEWED = """
import datetime, time
import flwr.supercore.date as date
ahead, of_date, of_time = {seconds}, date.now, time.time
date.now = lambda: of_date() + datetime.timedelta(seconds=ahead)
time.time = lambda: of_time() + ahead
"""


def clock_skew(folder: Path) -> Row:
    """One SuperNode's clock is a minute ahead: fine. An hour: its signatures are too far from the SuperLink's clock."""

    def skewed(seconds: int) -> Run:
        place = folder / f"ahead-{seconds}"
        place.mkdir()
        (place / "sitecustomize.py").write_text(SKEWED.format(seconds=seconds))

        class Skewed(Cluster):
            def variables(self, role: str) -> dict[str, str]:
                if role != "supernode-1":
                    return super().variables(role)
                path = os.pathsep.join([str(place), self.workplace.environment.get("PYTHONPATH", str(ROOT))])
                return {**super().variables(role), "PYTHONPATH": path, "HAWTHORN_WARM_SOCKET": ""}  # a cold start

        return Run(
            settings(folder, f"skew-{seconds}", num_rounds=2, round_timeout=60.0, startup_timeout=40.0), Skewed
        ).start()

    near = skewed(60)
    record = near.join()
    fine = complete(record) and record.facts["sha256"] == clean(near.config) and not reasons(record)
    far, begin = skewed(3600), time.monotonic()
    far.thread.join(120)
    log = (far.config.run_folder / "logs" / "supernode-1.log").read_text(errors="replace")
    refused = isinstance(far.error, EngineError) and "Invalid timestamp" in log
    seen = f"60 s: nothing; 1 h: {str(far.error).splitlines()[0][:80]}, its log: Invalid timestamp"
    return Row("clock skew between nodes", seen, "nothing", time.monotonic() - begin, fine and refused)


def full_disk(folder: Path) -> Row:
    """The runs folder is a file system that fills up; then there is room again."""
    config = settings(folder, "disk", keep_updates=True, num_rounds=12)
    place = folder / "small"
    place.mkdir()
    script = f"mount -t tmpfs -o size=72k tmpfs {place} && exec {sys.executable} {Path(__file__)} --disk {place}"
    begin = time.monotonic()
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if result.returncode not in (0, 1) or not result.stdout.strip().startswith("{"):
        return Row("full disk in runs/", f"not tried: {result.stderr.strip()[-80:]}", "-", None, os.name != "posix")
    found = json.loads(result.stdout)
    passed = found["complete"] and found["kept"] and found["sha256"] == clean(config) and "No space" in found["error"]
    lost = f"no finished round ({found['before']} kept), same final model" if passed else str(found)
    return Row("full disk in runs/", found["error"][:110], lost, time.monotonic() - begin, passed)


def disk_child(place: Path) -> None:
    """Run on a disk that is too small, make room, resume; print what happened as JSON."""
    config, error = settings(place, "disk", keep_updates=True, num_rounds=12), ""
    try:
        in_process.run(config)
    except HawthornError as caught:
        error = str(caught).replace(str(place), "runs")
    before = read_run(config.run_folder).rounds
    subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
    in_process.run(config.replace(resume=True))
    record = read_run(config.run_folder)
    kept = [r.sha256 for r in record.rounds[: len(before)]] == [r.sha256 for r in before]
    found = {"error": error, "before": len(before), "kept": kept and len(before) > 0}
    print(json.dumps({**found, "complete": complete(record), "sha256": record.facts["sha256"]}))


def two_runs(folder: Path) -> Row:
    """The same name twice, and two names on one SuperLink's machine at the same time."""
    config = settings(folder, "same", num_rounds=8)
    first = Run(config).start()
    first.wait_round(1)
    begin = time.monotonic()
    second = Run(config, engine="in_process").start()
    second.thread.join(60)
    other = Run(settings(folder, "other", num_rounds=8), engine="in_process").start()
    record, beside = first.join(), other.join()
    wanted = clean(config)
    passed = complete(record) and complete(beside) and isinstance(second.error, HawthornError)
    passed = passed and record.facts["sha256"] == beside.facts["sha256"] == wanted
    seen = f"same name: {str(second.error).replace(str(folder), 'runs')[:90]}; other name: both finish"
    return Row("two runs at once", seen, "nothing, same models", time.monotonic() - begin, passed)


def large_model(folder: Path) -> Row:
    """200 MB of parameters to three clients and back, over TLS."""
    changes = {"model": "mlp(hidden=(7000, 7000))", "training": "sgd(lr=0.01, epochs=1, batch_size=600)"}
    run = Run(settings(folder, "large", num_clients=3, num_rounds=2, round_timeout=200.0, **changes)).start()
    record = run.join(400.0)
    size = 4 * int(record.facts["num_params"]) / 1e6
    passed = complete(record) and run.error is None and all(r.clients == [0, 1, 2] for r in record.rounds)
    seen = f"{size:.0f} MB a model, {record.rounds[-1].seconds:.0f} s a round"
    return Row("200 MB model", seen, "nothing", None, passed and size > 190)


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
        folder, name, gate="paper()", gate_service=f"127.0.0.1:{port}", gate_validation=60, gate_certification=20,
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
    seen = f"{len(during)} rounds refused: {during[0].skipped if during else ''}"[:120]
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


FAULTS: dict[str, Callable[[Path], Row]] = {
    "supernode-killed": supernode_killed,
    "supernode-hung": supernode_hung,
    "superlink-restart": superlink_restart,
    "serverapp-crash": serverapp_crash,
    "certify-down": certify_down,
    "certify-slow": certify_slow,
    "certify-restarted": certify_restarted,
    "partition": partition,
    "full-disk": full_disk,
    "two-runs": two_runs,
    "clock-skew": clock_skew,
    "large-model": large_model,
}


def try_faults(names: list[str]) -> Iterator[Row]:
    """Try faults one after the other; what raises is a failure."""
    for name in names:
        with tempfile.TemporaryDirectory(prefix="hawthorn-faults-") as folder:
            try:
                yield FAULTS[name](Path(folder))
            except Exception as error:
                yield Row(name, f"{type(error).__name__}: {error}"[:300], "?", None, False)


def table(rows: list[Row]) -> Table:
    """Return the table of what happened."""
    shown = Table("fault", "what the user sees", "what was lost", "seconds to recover", "")
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        shown.add_row(row.fault, row.seen, row.lost, seconds, "ok" if row.passed else "FAILED")
    return shown


def main() -> None:
    """Print the table; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"of: {', '.join(FAULTS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if given.disk is not None:
        disk_child(given.disk)
        return
    names = given.only.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]!r}; there are: {', '.join(FAULTS)}")
    rows = []
    for row in try_faults(names):
        rows.append(row)
        print(f"{row.fault}: {'ok' if row.passed else 'FAILED'}", file=sys.stderr, flush=True)
    Console(width=170).print(table(rows))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
