"""Whole runs in the in-process engine: same result on any number of workers, after a kill, beside broken clients."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest

from hawthorn.engines import in_process
from server.record import read_run
from tasks.config import RunConfig
from tasks.errors import ConfigError

TRIGGER = "patch_backdoor(target=0, grid=(1, 1), size=(2, 2), per_batch=0.5)"


def run(config: RunConfig):
    in_process.run(config)
    return read_run(config.run_folder)


def test_a_run_learns_and_records(config):
    record = run(config)
    assert record.status == "finished"
    assert [r.round for r in record.rounds] == [1, 2, 3]
    assert record.final.acc > 0.85 > record.initial["acc"] + 0.5
    assert record.final.sha256 == record.facts["sha256"]
    assert all(r.clients == list(range(6)) for r in record.rounds)
    assert sum(record.facts["client_sizes"]) == record.facts["train_samples"]


def test_the_number_of_workers_changes_nothing(config):
    attacked = config.replace(
        malicious_clients="1,4", attack=TRIGGER + " | scale_update(factor=2)", clients_per_round=4
    )
    runs = [run(attacked.replace(workers=w, name=f"w{w}")) for w in (1, 2, 3)]
    assert len({r.facts["sha256"] for r in runs}) == 1
    assert len({tuple(tuple(x.norms) for x in r.rounds) for r in runs}) == 1
    assert runs[0].final.asr is not None
    other = run(attacked.replace(seed=2, name="other"))
    assert other.facts["sha256"] != runs[0].facts["sha256"]


def test_continued_in_two_parts_equals_one(config):
    whole = run(config.replace(name="whole", num_rounds=4, clients_per_round=3))
    part = config.replace(name="part", num_rounds=2, clients_per_round=3)
    run(part)
    again = run(part.replace(num_rounds=4, resume=True))
    assert again.facts["sha256"] == whole.facts["sha256"]
    assert [r.sampled for r in again.rounds] == [r.sampled for r in whole.rounds]


@pytest.mark.slow
def test_sigkill_and_resume_give_the_same_model(config):
    config = config.replace(num_rounds=40, training="sgd(lr=0.1, epochs=8, batch_size=8)", workers=2)
    whole = run(config.replace(name="whole"))
    settings = {k: v for k, v in config.settings().items() if k not in ("name", "runs-dir")}
    flat = config.runs_dir + "/flat.toml"
    with open(flat, "w") as file:
        file.writelines(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
    command = [sys.executable, "-m", "hawthorn.cli", "run", flat, "--name", "killed", "--runs-dir", config.runs_dir]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    lines = config.replace(name="killed").run_folder / "rounds.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not lines.exists() or lines.read_text().count("\n") < 3):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = lines.read_text().count("\n")
    assert 3 <= done < 40
    resumed = run(config.replace(name="killed", resume=True))
    assert [r.round for r in resumed.rounds] == list(range(1, 41))
    assert resumed.facts["sha256"] == whole.facts["sha256"]


def test_broken_clients_are_dropped_by_name_and_change_nothing(config):
    """The run with NaN, wrong-shape and 1e30 clients ends with the model of the run in which they do not take part."""
    config = config.replace(num_rounds=4, num_clients=9)
    broken = "corrupt_reply(kinds=('nan', 'shape', 'huge'))"
    dirty = run(config.replace(name="dirty", malicious_clients="2,4,7", attack=broken))
    reasons = {client: reason for r in dirty.rounds for client, reason in r.dropped.items()}
    assert "not finite" in reasons["2"]
    assert "shape" in reasons["4"]
    assert "max-update-norm" in reasons["7"]
    absent = run(config.replace(name="absent", malicious_clients="2,4,7", attack="corrupt_reply(kinds=('silent',))"))
    assert dirty.facts["sha256"] == absent.facts["sha256"]
    assert "refuses to reply" in absent.rounds[0].dropped["2"]


def test_a_worker_that_dies_costs_one_reply(config, monkeypatch):
    from client import app as client_app

    def deadly(settings, me, job):
        return os._exit(9) if me.client == 3 else client_app.NO_ATTACK

    monkeypatch.setattr(client_app, "current_attack", deadly)
    record = run(config.replace(workers=2, num_rounds=2))
    assert record.status == "finished"
    for r in record.rounds:
        assert r.clients == [0, 1, 2, 4, 5]
        assert r.dropped == {"3": "error 8: the client's process ended with exit code 9"}


def test_a_worker_that_dies_in_the_middle_of_its_reply_costs_one_reply(config, monkeypatch):
    import multiprocessing.connection as connection

    from client import app as client_app

    whole = connection.Connection._send

    def half(pipe, buffer, *rest):
        os.write(pipe.fileno(), bytes(buffer[:10]))
        os._exit(9)

    def deadly(settings, me, job):
        connection.Connection._send = half if me.client == 3 else whole  # in the worker's process alone
        return client_app.NO_ATTACK

    monkeypatch.setattr(client_app, "current_attack", deadly)
    record = run(config.replace(workers=2, num_rounds=2))
    assert record.status == "finished"
    assert connection.Connection._send is whole
    for r in record.rounds:
        assert r.clients == [0, 1, 2, 4, 5]
        assert "process ended with exit code 9" in r.dropped["3"]


def test_resuming_needs_the_model_that_a_run_started_from_no_more(config):
    run(config.replace(name="start", num_rounds=1, workers=1))
    model = config.replace(name="start").run_folder / "model.safetensors"
    begun = config.replace(from_model=str(model), num_rounds=2, workers=1)
    assert len(run(begun).rounds) == 2
    model.unlink()
    assert len(run(begun.replace(num_rounds=3, resume=True)).rounds) == 3
    with pytest.raises(ConfigError, match="cannot read model"):
        run(begun)
    assert len(read_run(begun.run_folder).rounds) == 3


def test_large_states_and_contents_never_block_both_sides(config):
    """Each client keeps a megabyte of state: neither side may write while the other does."""
    import numpy as np
    from flwr.app import Array, ArrayRecord

    from client.app import app
    from hawthorn.engines.in_process import InProcessGrid
    from server.federation import run_federation

    def keeping(message, context):
        seen = context.state["kept"]["rounds"].numpy()[0] if "kept" in context.state else 0
        context.state["kept"] = ArrayRecord({"rounds": Array(np.full(300_000, seen + 1, np.float32))})
        reply = app(message, context)
        if message.metadata.message_type == "train":
            reply.content["metrics"]["seen"] = float(seen)
        return reply

    config = config.replace(workers=2, num_clients=8, num_rounds=3, round_timeout=20.0)
    with InProcessGrid(keeping, config) as grid:
        run_federation(config, grid)
        states = [pickle.loads(state) for state in grid.states.values()]  # noqa: S301
    assert [s["kept"]["rounds"].numpy()[0] for s in states] == [4.0] * 8  # whoami and three rounds
    assert all(r.clients == list(range(8)) for r in read_run(config.run_folder).rounds)


@pytest.mark.parametrize(("away", "used"), [(1.0, [2, 2, 2]), (60.0, [2, 0, 0])])
def test_rounds_wait_while_nobody_is_there(config, away, used):
    """All nodes are gone after the first round, for less than a round's timeout or for more."""
    import time

    from client.app import app
    from hawthorn.engines.in_process import InProcessGrid
    from server.federation import run_federation

    ends = []

    class Absent(InProcessGrid):
        def get_node_ids(self):
            gone = ends and time.monotonic() < ends[0] + away
            return [] if gone else super().get_node_ids()

    config = config.replace(workers=1, num_clients=2, num_rounds=3, round_timeout=3.0 if away < 3 else 0.3)
    with Absent(app, config) as grid:
        run_federation(config, grid, lambda record: ends.append(time.monotonic()))
    rounds = read_run(config.run_folder).rounds
    assert [len(r.clients) for r in rounds] == used
    assert rounds[1].seconds >= min(away, config.round_timeout) - 0.1


def test_a_hung_client_costs_no_more_than_the_round_timeout(config, monkeypatch):
    from client import app as client_app

    honest = client_app.honest

    def trainer(training):
        inner = honest(training)

        def train(job):
            if job.client == 3:
                time.sleep(600)
            return inner(job)

        return train

    monkeypatch.setattr(client_app, "honest", trainer)
    begin = time.monotonic()
    record = run(config.replace(workers=2, num_rounds=2, round_timeout=1.5))
    assert time.monotonic() - begin < 20
    assert "no reply within 1.5 s" in record.rounds[0].dropped["3"]
    assert record.rounds[0].skipped is None


def test_skipped_rounds_keep_the_model(config):
    record = run(config.replace(rule="krum(num_byzantine=4)"))
    assert all("krum" in r.skipped for r in record.rounds)
    assert len({r.sha256 for r in record.rounds}) == 1


def test_start_from_a_model(config):
    first = run(config.replace(name="first"))
    model = str(config.replace(name="first").run_folder / "model.safetensors")
    second = run(config.replace(name="second", from_model=model, num_rounds=1))
    assert second.initial["acc"] == first.final.acc
