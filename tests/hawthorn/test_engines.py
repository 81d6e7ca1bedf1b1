"""The three engines on the same federation: one seed, one model; and a process killed in the middle of a round."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from hawthorn.engines import ENGINES, find_engine
from server.record import read_run
from tasks.config import RunConfig
from tasks.errors import ConfigError, EngineError

TRIGGER = "patch_backdoor(target=0, grid=(1, 1), size=(2, 2), per_batch=0.5) | scale_update(factor=2.0)"


def test_unknown_engines_list_what_exists():
    with pytest.raises(ConfigError, match="there are: in_process, flower, cluster"):
        find_engine("ray")
    assert find_engine("in-process") is find_engine("in_process")


@pytest.mark.slow
def test_one_seed_one_model_on_every_engine(config):
    config = config.replace(
        num_clients=4,
        clients_per_round=3,
        num_rounds=2,
        malicious_clients="1,3",
        attack=TRIGGER,
        rule="geometric_median()",
    )
    records = []
    for engine in ENGINES:
        seen = []
        find_engine(engine).run(config.replace(name=engine), seen.append)
        assert [r.round for r in seen] == [1, 2]
        records.append(read_run(config.replace(name=engine).run_folder))
    assert {r.status for r in records} == {"finished"}
    assert len({r.facts["sha256"] for r in records}) == 1
    assert len({tuple((x.acc, x.asr, *x.norms, *x.weights) for x in r.rounds) for r in records}) == 1
    assert all(r.facts["malicious_clients"] == [1, 3] for r in records)


@pytest.mark.slow
def test_a_supernode_killed_in_the_middle_of_a_round_costs_no_more_than_the_setting(config):
    timeout = 6.0
    config = config.replace(
        num_clients=4, num_rounds=4, round_timeout=timeout, training="sgd(lr=0.1, epochs=60, batch_size=4)"
    )
    messages: list[str] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            find_engine("cluster").run(config, None, messages.append)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    kill_supernode_after_round(config, client=2, round=1)
    thread.join(120)
    assert not thread.is_alive()
    assert not errors
    record = read_run(config.run_folder)
    assert [r.round for r in record.rounds] == [1, 2, 3, 4]
    lost = [r for r in record.rounds if "2" in r.dropped]
    assert lost, "no round lost the client"
    assert any(word in lost[0].dropped["2"] for word in ("no reply within", "error 5"))
    assert max(r.seconds_train for r in record.rounds) < timeout + 3
    assert all(set(r.clients) <= {0, 1, 3} and r.clients for r in record.rounds[-2:])  # a busy machine loses others too
    assert any("client 2" in text for text in messages)


def kill_supernode_after_round(config: RunConfig, client: int, round: int) -> None:
    """SIGKILL a SuperNode a moment after a round was recorded, so that the next one is under way."""
    folder = Path(config.run_folder)
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        lines = folder / "rounds.jsonl"
        if lines.exists() and lines.read_text().count("\n") >= round:
            break
        time.sleep(0.02)
    time.sleep(0.4)
    os.kill(json.loads((folder / "cluster.json").read_text())["supernodes"][str(client)], signal.SIGKILL)


@pytest.mark.slow
def test_a_failing_server_says_why(config, tmp_path):
    broken = config.replace(num_clients=2, from_model=str(tmp_path / "nothing.safetensors"))
    with pytest.raises(EngineError, match=r"cannot read model .*nothing\.safetensors"):
        find_engine("cluster").run(broken)
