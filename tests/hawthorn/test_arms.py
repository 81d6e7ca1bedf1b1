"""Arms of an experiment: several at a time, kept, resumed, failed apart from each other, stopped without leftovers."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hawthorn.arms.perform import How, earlier_run, perform
from hawthorn.arms.run import Events, run_arms
from hawthorn.cli import app
from hawthorn.engines import in_process
from hawthorn.experiment import Arm
from server.record import read_run
from tasks.errors import ConfigError, RecordError


@pytest.fixture
def arms(config):
    """Four small runs: two that work, one whose rule refuses its clients, one that cannot be read."""
    return [
        Arm("mean", config.replace(name="e/mean")),
        Arm("median", config.replace(name="e/median", rule="median()")),
        Arm("krum", config.replace(name="e/krum", rule="krum(num_byzantine=3)")),
        Arm("typing", None, problem="unknown rule 'medan'"),
    ]


@pytest.mark.parametrize("jobs", [1, 3])
def test_failing_arms_do_not_stop_the_others(arms, jobs):
    told: dict[str, list[str]] = {}
    events = Events(
        on_begin=lambda arm: told.setdefault(arm.label, []).append("begin"),
        on_round=lambda arm, record: told[arm.label].append(str(record.round)),
        on_end=lambda arm, outcome: told[arm.label].append(outcome.status),
    )
    outcomes = run_arms([arms[3], arms[2], *arms[:2]], jobs=jobs, events=events)
    assert {label: outcome.status for label, outcome in outcomes.items()} == {
        "typing": "failed",
        "krum": "undefined",
        "mean": "finished",
        "median": "finished",
    }
    assert outcomes["typing"].error == "unknown rule 'medan'"
    assert "n >= 2f + 3 = 9" in outcomes["krum"].error
    assert told["mean"] == ["begin", "1", "2", "3", "finished"]
    assert told["krum"] == ["begin", "undefined"]


def test_processes_give_the_numbers_of_one(arms, tmp_path):
    run_arms(arms[:2], jobs=1)
    moved = [dataclasses.replace(a, config=a.config.replace(runs_dir=str(tmp_path / "many"))) for a in arms[:2]]
    run_arms(moved, jobs=2)
    for one, other in zip(arms, moved):
        assert one.config is not None
        assert other.config is not None
        ours, theirs = read_run(one.config.run_folder), read_run(other.config.run_folder)
        assert [r.sha256 for r in ours.rounds] == [r.sha256 for r in theirs.rounds]


def test_a_finished_arm_is_kept_and_one_with_other_settings_is_not(arms):
    arm = arms[0]
    assert earlier_run(arm.config) == ("none", 0)
    assert perform(arm, in_process, How(keep=True)).status == "finished"
    first = read_run(arm.config.run_folder)
    again = dataclasses.replace(arm, config=arm.config.replace(workers=2, round_timeout=99.0))
    assert perform(again, in_process, How(keep=True)).status == "kept"
    assert not (arm.config.run_folder.parent / "earlier").exists()
    other = dataclasses.replace(arm, config=arm.config.replace(seed=2))
    assert perform(other, in_process, How(keep=True)).status == "finished"
    assert read_run(arm.config.run_folder).final != first.final
    assert (arm.config.run_folder.parent / "earlier" / "mean.1").is_dir()


def test_without_keep_a_finished_arm_is_run_again(arms):
    for _ in range(2):
        assert perform(arms[0], in_process, How()).status == "finished"
    assert (arms[0].config.run_folder.parent / "earlier" / "mean.1").is_dir()


def test_more_rounds_go_on_from_the_last_and_fewer_start_anew(arms):
    arm = arms[0]
    perform(arm, in_process, How(keep=True))
    longer = dataclasses.replace(arm, config=arm.config.replace(num_rounds=5))
    assert earlier_run(longer.config) == ("begun", 3)
    rounds = []
    assert perform(longer, in_process, How(keep=True), lambda r: rounds.append(r.round)).status == "finished"
    assert rounds == [4, 5]
    assert earlier_run(arm.config) == ("none", 0)


def test_an_interrupted_arm_ends_with_the_model_of_an_uninterrupted_one(arms, tmp_path):
    arm = arms[1]
    perform(arm, in_process, How())
    cut = dataclasses.replace(arm, config=arm.config.replace(runs_dir=str(tmp_path / "cut")))

    def stop(record):
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perform(cut, in_process, How(keep=True), stop)
    assert read_run(cut.config.run_folder).status == "interrupted"
    assert perform(cut, in_process, How(keep=True)).status == "finished"
    ours, theirs = read_run(arm.config.run_folder), read_run(cut.config.run_folder)
    assert [r.sha256 for r in ours.rounds] == [r.sha256 for r in theirs.rounds]


class Engine:
    """An engine that does what it is told instead of a federation."""

    def __init__(self, act):
        self.act = act

    def run(self, config, on_round=None, on_message=None):
        self.act(config)


def test_an_unexpected_error_is_written_down_and_named(arms):
    def act(config):
        config.run_folder.mkdir(parents=True)
        raise ZeroDivisionError("by nought")

    outcome = perform(arms[0], Engine(act), How())
    note = arms[0].config.run_folder / "error.txt"
    assert outcome.status == "failed"
    assert outcome.error == f"ZeroDivisionError: by nought; see {note}"
    assert "Traceback" in note.read_text()


def test_a_process_that_dies_costs_its_arm_only(arms):
    def act(config):
        if config.name == "e/mean":
            os._exit(7)
        in_process.run(config)

    from hawthorn.arms.run import _Pool

    with _Pool(2, Engine(act), How()) as pool:
        outcomes = pool.run([arms[0], arms[1], arms[3]], Events())
        processes = [worker.process.pid for worker in pool.workers]
    assert outcomes["mean"].error == "its process ended with exit code 7"
    assert outcomes["median"].status == "finished"
    assert not any(Path(f"/proc/{pid}").exists() for pid in processes)


def test_a_run_that_another_process_writes_is_waited_for_if_it_is_shared(arms, monkeypatch):
    monkeypatch.setattr("hawthorn.arms.perform.POLL", 0.0)
    tries = []

    def act(config):
        tries.append(config.name)
        if len(tries) < 3:
            raise RecordError(f"another process is writing {config.run_folder}; wait for it")
        in_process.run(config)

    assert perform(arms[0], Engine(act), How(keep=True, shared=True)).status == "finished"
    assert len(tries) == 3
    tries.clear()
    alone = perform(dataclasses.replace(arms[0], config=arms[0].config.replace(seed=3)), Engine(act), How(keep=True))
    assert alone.error.startswith("another process is writing")


@pytest.mark.parametrize(
    ("jobs", "engine", "says"),
    [(0, "in_process", "at least 1, got 0"), (2, "flower", "works with --engine in_process")],
)
def test_impossible_calls_are_refused(arms, jobs, engine, says):
    with pytest.raises(ConfigError, match=says):
        run_arms(arms, jobs=jobs, engine=engine)


EXPERIMENT = """
[settings]
num-clients = 5
num-rounds = 2
[pretrain]
num-rounds = 1
[arms.one]
[arms.two]
rule = "median()"
[arms.three]
extra = true
"""


def test_the_command_keeps_finished_arms_and_starts_all_from_one_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(EXPERIMENT)

    def hawthorn(*words):
        done = CliRunner().invoke(app, ["run", "small.toml", "--continue", "--jobs", "2", *words])
        assert done.exit_code == 0, f"{done.stdout} {done.exception}"
        return done.stdout

    hawthorn("--no-report")
    folders = sorted(path.parent.name for path in tmp_path.glob("runs/small/*/run.json"))
    assert folders == ["one", "two"]
    start = next(tmp_path.glob("runs/small-pretrain-*"))
    records = [read_run(tmp_path / "runs/small" / arm) for arm in folders]
    assert {record.config.from_model for record in records} == {str(start / "model.safetensors")}
    assert len({json.dumps(record.initial) for record in records}) == 1
    (tmp_path / "small.toml").write_text(EXPERIMENT.replace("[arms.two]", "[arms.two]\nseed = 2"))
    text = hawthorn("--no-report")
    assert "1 of 2 runs are finished already" in text
    assert "small/one: finished before, kept" in text
    assert "an earlier run of that name is now" in text
    assert "2 of 3 rounds are done, going on" in hawthorn("--no-report", "--set", "num-rounds=3")


def test_resume_goes_on_with_several_arms_at_a_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(EXPERIMENT)
    CliRunner().invoke(app, ["run", "small.toml", "--no-report"])
    words = ["run", "--resume", "runs/small", "--jobs", "2", "--set", "num-rounds=4", "--no-report"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, f"{done.stdout} {done.exception}"
    assert [len(read_run(tmp_path / "runs/small" / arm).rounds) for arm in ("one", "two")] == [4, 4]


STOPPED = """
[settings]
num-clients = 4
num-rounds = 100000
eval-every = 1000
[arms.one]
[arms.two]
rule = "median()"
[arms.three]
"""


def _children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopping_leaves_no_process_and_whole_records(tmp_path, number):
    (tmp_path / "long.toml").write_text(STOPPED)
    command = [sys.executable, "-m", "hawthorn.cli", "run", "long.toml", "--jobs", "2", "--no-report"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = [tmp_path / f"runs/long/{arm}/rounds.jsonl" for arm in ("one", "two")]
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not all(line.exists() and line.stat().st_size for line in lines):
            time.sleep(0.05)
        workers = _children(process.pid)
        assert len(workers) >= 2
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    for line in lines:
        assert json.loads((line.parent / "run.json").read_text())["status"] == "interrupted"
        numbers = [json.loads(text)["round"] for text in line.read_text().splitlines()]
        assert numbers == list(range(1, len(numbers) + 1))
    assert not (tmp_path / "runs/long/three").exists()
