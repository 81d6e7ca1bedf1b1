"""Faults of the server's side: SuperLink and ServerApp killed, a full disk, two runs at once, a large model."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.deployment.trial import ROOT, Row, Run, clean, complete, settings
from hawthorn.engines import in_process
from server.record import read_run
from tasks.config import RunConfig
from tasks.errors import HawthornError


def superlink_restart(folder: Path) -> Row:
    return _killed(settings(folder, "superlink"), "superlink", "SuperLink killed, started anew, run resumed")


def serverapp_crash(folder: Path) -> Row:
    return _killed(settings(folder, "serverapp"), "serverapp", "ServerApp SIGKILL, run resumed")


def _killed(config: RunConfig, process: str, fault: str) -> Row:
    """Kill a process of a run after three rounds; resume the run."""
    run = Run(config).start()
    run.wait_round(3)
    begin = time.monotonic()
    os.kill(int(run.pids()[process]), signal.SIGKILL)  # type: ignore[arg-type]
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


def full_disk(folder: Path) -> Row:
    """The runs folder is a file system that fills up; then there is room again."""
    config = settings(folder, "disk", keep_updates=True, num_rounds=12)
    place = folder / "small"
    place.mkdir()
    again = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--disk", str(place)]
    script = f"mount -t tmpfs -o size=72k tmpfs {place} && exec {shlex.join(again)}"
    result = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], capture_output=True, text=True, check=False
    )
    if result.returncode not in (0, 1) or not result.stdout.strip().startswith("{"):
        return Row("full disk in runs/", f"not tried: {result.stderr.strip()[-80:]}", "-", None, os.name != "posix")
    found = json.loads(result.stdout)
    passed = found["complete"] and found["kept"] and found["sha256"] == clean(config) and "No space" in found["error"]
    lost = f"no finished round ({found['before']} kept), same final model" if passed else str(found)
    return Row("full disk in runs/", found["error"][:110], lost, found["seconds"], passed)


def disk_child(place: Path) -> None:
    """Run on a disk that is too small, make room, resume; print what happened as JSON."""
    config, error = settings(place, "disk", keep_updates=True, num_rounds=12), ""
    try:
        in_process.run(config)
    except HawthornError as caught:
        error = str(caught).replace(str(place), "runs")
    before = read_run(config.run_folder).rounds
    subprocess.run(["mount", "-o", "remount,size=20m", str(place)], check=True)
    begin, times = time.monotonic(), list[float]()
    in_process.run(config.replace(resume=True), lambda _: times.append(time.monotonic()))
    record = read_run(config.run_folder)
    kept = [r.sha256 for r in record.rounds[: len(before)]] == [r.sha256 for r in before]
    found = {"error": error, "before": len(before), "kept": kept and len(before) > 0, "seconds": times[0] - begin}
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
