"""Colluding attackers and the server's own update, in whole runs of the in-process engine."""

import pytest
import torch

from hawthorn.engines import in_process
from hawthorn.preflight import preflight
from server.record import read_run, read_updates
from server.root import RootTrainer
from tasks.config import RunConfig
from tasks.errors import ConfigError
from tasks.task import load

BASE = {"num-clients": 6, "num-rounds": 3, "workers": 1, "training": "sgd(lr=0.1, epochs=1, batch_size=32)"}
COLLUDING = {**BASE, "malicious-clients": "1,4", "keep-updates": True}


def run(folder, **changes) -> RunConfig:
    config = RunConfig.read({**BASE, "runs-dir": str(folder), **{k.replace("_", "-"): v for k, v in changes.items()}})
    in_process.run(config)
    return config


@pytest.mark.parametrize("knowledge", ["all", "own"])
def test_attacking_rows_are_written_together(tmp_path, knowledge):
    config = run(
        tmp_path, **COLLUDING, collusion="inner_product_manipulation(epsilon=2.0)", knowledge=knowledge,
        attack_schedule="continuous(start=2)",
    )  # fmt: skip
    clients, first = read_updates(config.run_folder, 1)
    assert clients == list(range(6))
    assert not torch.equal(first[1], first[4])
    _, second = read_updates(config.run_folder, 2)
    assert torch.equal(second[1], second[4])
    if knowledge == "all":
        torch.testing.assert_close(second[1], -2 * second[[0, 2, 3, 5]].mean(0), rtol=1e-4, atol=1e-6)
    record = read_run(config.run_folder).rounds[1]
    assert record.norms[1] == pytest.approx(float(second[1].norm()), rel=1e-5)


def test_rows_that_a_server_would_drop_are_dropped(tmp_path):
    config = run(tmp_path, **COLLUDING, collusion="inner_product_manipulation(epsilon=1e9)", max_update_norm=100.0)
    last = read_run(config.run_folder).rounds[-1]
    assert last.clients == [0, 2, 3, 5]
    assert set(last.dropped) == {"1", "4"}
    assert "max-update-norm" in last.dropped["1"]


def test_root_samples_belong_to_the_server_alone(tmp_path):
    config = RunConfig.read({**BASE, "runs-dir": str(tmp_path), "root-samples": 100})
    task = load(config)
    assert len(task.root) == 100
    everyone = torch.cat(task.partition)
    assert len(everyone) == len(task.dataset.train_labels) - 100
    assert not torch.isin(task.root, everyone).any()
    before = load(config.replace(root_samples=0)).partition
    for with_root, without in zip(task.partition, before, strict=True):
        assert torch.equal(with_root, without[~torch.isin(without, task.root)])
    start = task.initial_vector()
    update = RootTrainer(config, task)(start, 1)
    assert torch.equal(update, RootTrainer(config, task)(start, 1))
    assert float(update.norm()) > 0
    with pytest.raises(ConfigError, match=r"root-samples.* are 100000"):
        load(config.replace(root_samples=100_000))


def test_what_the_server_remembers_survives_a_stop(tmp_path):
    changes = {"optimizer": "adam()", "server-lr": 0.05, "num-rounds": 4}
    whole = run(tmp_path, **{**changes, "name": "whole"})
    cut = run(tmp_path, **{**changes, "name": "cut", "num-rounds": 2})
    in_process.run(cut.replace(num_rounds=4, resume=True))
    rounds = [[r.sha256 for r in read_run(config.run_folder).rounds] for config in (whole, cut)]
    assert rounds[0] == rounds[1]


def test_preflight_tries_mixing_and_step(tmp_path):
    config = RunConfig.read({**BASE, "runs-dir": str(tmp_path), "transform": "gaussian_noise(std=-1.0)"})
    with pytest.raises(ConfigError, match="std >= 0"):
        preflight(config)


def test_preflight_refuses_a_collusion_that_cannot_work(tmp_path):
    config = RunConfig.read(
        {**BASE, "runs-dir": str(tmp_path), "malicious-clients": "0-3", "collusion": "a_little_is_enough()"}
    )
    with pytest.raises(ConfigError, match="not possible with 4 attackers among 6"):
        preflight(config)


FEW = {"num-clients": 20, "clients-per-round": 7, "malicious-clients": "0-3", "collusion": "fang_krum()"}


def test_preflight_counts_the_attackers_that_the_schedule_brings_along(tmp_path):
    settings = {**BASE, **FEW, "runs-dir": str(tmp_path), "rule": "krum(num_byzantine=2)"}
    with pytest.raises(ConfigError, match="not possible with 4 attackers among 7"):
        preflight(RunConfig.read(settings))


def test_the_record_says_that_attackers_could_not_collude(tmp_path):
    record = read_run(run(tmp_path, **{**FEW, "rule": "krum(num_byzantine=2)"}).run_folder)
    for each in record.rounds:
        assert each.attacking == []
        assert "fang_krum wants" in each.collusion_failed


def test_garbage_uses_up_what_the_rule_assumes(tmp_path):
    """Krum with f = 2 wants 7 replies: one NaN of 7 leaves 6 and at most one attacker among them."""
    config = run(
        tmp_path, **{"num-clients": 7, "malicious-clients": "3"}, rule="krum(num_byzantine=2)",
        attack="corrupt_reply(kinds=('nan',))",
    )  # fmt: skip
    for each in read_run(config.run_folder).rounds:
        assert each.skipped is None
        assert each.exposed == 1
    silent = run(
        tmp_path, **{"num-clients": 7, "malicious-clients": "3", "name": "silent"}, rule="krum(num_byzantine=2)",
        attack="corrupt_reply(kinds=('silent',))",
    )  # fmt: skip
    assert all(each.skipped and each.exposed == 0 for each in read_run(silent.run_folder).rounds)
    assert any("do not answer" in warning for warning in preflight(silent))
