"""The benchmark of rounds: equal work, honest accounts of CPU time and memory, nothing left behind, and its table."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from hawthorn.engines import in_process
from server.record import read_updates
from tasks.params import model_vector
from tasks.task import load

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import rounds  # noqa: E402
from benchmarks.meter import Measured, MeasureError, python, start_time  # noqa: E402
from benchmarks.ways import plain  # noqa: E402
from benchmarks.workloads import BATCH_SIZE, LEARNING_RATE, SEED, Workload  # noqa: E402

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures with Linux's /proc")

BURN = """
import os, sys, time

def burn(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
"""
WORKER = """
while True:
    burn(0.2)
    os.write(1, b".")
    if not os.read(0, 1):
        time.sleep(600)
"""
FAMILY = """
from subprocess import PIPE, Popen
from benchmarks.ways.gate import Gate

ballast = bytearray(os.urandom(1 << 20)) * 128
if not (short := os.fork()):
    burn(0.3)
    os._exit(0)
os.waitpid(short, 0)
# a child that lives on without the mark, in a session of its own, and works when told
worker = Popen([sys.executable, "-c", sys.argv[2]], stdin=PIPE, stdout=PIPE, env={}, start_new_session=True, bufsize=0)
worker.stdout.read(1)
gate = Gate(int(sys.argv[1]))
gate.end_round(1, nothing=0.0)
worker.stdin.write(b".")
worker.stdout.read(1)
gate.end_round(2)
os._exit(0)
"""


def test_children_count_shared_pages_count_once_and_nothing_is_left(tmp_path: Path) -> None:
    with Measured(python("-c", BURN + FAMILY, "{descriptor}", BURN + WORKER), tmp_path, timeout=60) as family:
        family.watch()
        first = family.first_round()
        assert 0.5 <= first.cpu < 1.5  # a dead child's 0.3 s, a living one's 0.2 s, the start of Python
        assert first.parts == {"nothing": 0.0}
        second = family.next_round()
        assert 0.2 <= second.cpu < 0.5
        assert second.seconds >= 0.2
        family.finish()
        assert len(family.members()) == 1  # the child outlives its parent
    assert 128 <= family.peak / 2**20 < 256
    deadline = time.monotonic() + 60
    while (left := [p for p, start in family.seen.items() if start_time(p) == start]) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(family.seen) >= 2
    assert not left


def test_a_process_that_fails_is_told_with_its_output(tmp_path: Path) -> None:
    command = python("-c", "raise SystemExit('no such data')")
    with pytest.raises(MeasureError, match="no such data"), Measured(command, tmp_path, timeout=60) as process:
        process.first_round()


def test_the_plain_loop_trains_each_client_as_the_engine_does_to_the_bit(config) -> None:
    training = f"sgd(lr={LEARNING_RATE}, batch_size={BATCH_SIZE})"
    config = config.replace(seed=SEED, num_rounds=1, training=training, keep_updates=True, eval_every=99)
    in_process.run(config)
    clients, updates = read_updates(config.run_folder, 1)
    assert clients == list(range(config.num_clients))
    task = load(config)
    start, model = task.initial_vector(), task.build_model()
    for client, update in zip(clients, updates, strict=True):
        model.load_state_dict(task.build_model().state_dict())
        plain.train_client(model, task, client, 1)
        assert torch.equal(model_vector(model) - start, update)
        assert update.norm() > 0.01


def test_other_work_is_refused(tmp_path: Path) -> None:
    work = Workload("tiny", "logistic_regression()", "digits()", 2, 20, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounds, "initial_model", lambda work, folder: np.zeros(4, np.float32))
        same, other = np.array([1, 2, 3, 4], np.float32), np.array([1, 2, 3, 5], np.float32)
        outcomes = {"plain": rounds.Outcome("plain", model=same), "by-hand": rounds.Outcome("by-hand", model=same)}
        assert rounds.compare_models(outcomes, work) == {"plain": 0.0, "by-hand": 0.0}
        rounds.refuse_other_work(rounds.compare_models(outcomes, work))
        outcomes["hawthorn-2"] = rounds.Outcome("hawthorn-2", model=other)
        with pytest.raises(SystemExit, match="hawthorn-2"):
            rounds.refuse_other_work(rounds.compare_models(outcomes, work))


@pytest.mark.slow
def test_the_command_measures_compares_and_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, "benchmarks/rounds.py", "--workload", "tiny", "--clients", "4", "--samples", "100"]
    command += ["--rounds", "2", "--skip", "ray,2-threads,by-hand,hawthorn-1", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(out.read_text())
    ways = {way["way"]: way for way in result["ways"]}
    assert list(ways) == ["plain", "hawthorn-2"]
    for way in ways.values():
        assert way["model_distance"] < 1e-5
        assert len(way["steady"]) == 2
        assert way["first_seconds"] > way["seconds"] > 0
        assert way["cpu"] > 0
        assert way["peak_bytes"] > 50e6
    assert [line for line in done.stdout.splitlines() if "hawthorn-2" in line and "│" in line]
    assert len(result["targets"]) == 2
    assert done.stdout.count("x plain") == 2
