"""Experiment files: arms, overrides, shipped ones, and errors that say what exists."""

import pytest

from hawthorn.experiment import find_experiment, read_experiment, read_overrides, shipped_experiments
from tasks.errors import ConfigError, SpecError

FILE = """
title = "Two arms"
[settings]
num-rounds = 4
attack = "sign_flip()"
malicious-clients = "1"
[arms.plain]
rule = "mean()"
[arms.safe]
rule = "median()"
num-rounds = 5
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "two.toml"
    path.write_text(FILE)
    return str(path)


def test_arms_share_settings_and_have_folders_of_their_own(file, tmp_path):
    experiment = read_experiment(file, {"runs-dir": str(tmp_path)})
    assert [(c.name, c.rule, c.num_rounds) for c in experiment.runs] == [
        ("two/plain", "mean()", 4),
        ("two/safe", "median()", 5),
    ]
    assert experiment.folder == tmp_path / "two"
    assert experiment.title == "Two arms"


def test_overrides_win_and_one_arm_can_be_picked(file):
    experiment = read_experiment(file, {"num-rounds": 2, "num-clients": 4}, name="mine", arm="safe")
    assert [(c.name, c.rule, c.num_rounds, c.num_clients) for c in experiment.runs] == [("mine", "median()", 2, 4)]


def test_a_flat_file_is_one_run(tmp_path):
    (tmp_path / "flat.toml").write_text('rule = "median()"\nnum-rounds = 2\n')
    assert read_experiment(str(tmp_path / "flat.toml"), {}).runs[0].name == "flat"


@pytest.mark.parametrize("name", list(shipped_experiments()))
def test_every_shipped_experiment_resolves(name):
    experiment = read_experiment(name, {})
    assert experiment.runs
    assert find_experiment(f"experiments/{name}.toml").stem == name.split("/")[-1]


@pytest.mark.parametrize("num_clients", [4, 5, 20, 50])
def test_the_quickstart_takes_other_sizes(num_clients):
    for config in read_experiment(None, {"num-clients": num_clients, "num-rounds": 2}).runs:
        assert config.num_clients == num_clients
        assert len(config.malicious_ids) >= 1


@pytest.mark.parametrize(
    ("content", "error", "says"),
    [
        ("title = ", ConfigError, "cannot read"),
        ("[setting]\nx = 1", ConfigError, r"unknown table 'setting'; there are: \[settings\]"),
        ("[settings]\nrounds = 1", ConfigError, "unknown setting 'rounds'; did you mean 'num-rounds'"),
        ("[arms]\nrule = 'mean()'", ConfigError, "must be tables"),
        ("[arms.a]\nrule = 'krumm()'", SpecError, "arm a: unknown rule 'krumm'; there are: .*krum"),
        ("[settings]\nnum-rounds = '3'", ConfigError, "whole number"),
    ],
)
def test_errors_say_what_exists(tmp_path, content, error, says):
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(error, match=says):
        read_experiment(str(path), {})


def test_unknown_files_and_arms(file):
    with pytest.raises(ConfigError, match=r"shipped are: .*quickstart"):
        read_experiment("no-such", {})
    with pytest.raises(ConfigError, match="it has: plain, safe"):
        read_experiment(file, {}, arm="none")


def test_overrides_are_read_by_type():
    assert read_overrides(
        [
            "num-rounds=2",
            "rule=krum(num_byzantine=1)",
            "tau=0.3",
            "resume=True",
            "malicious_clients=3",
            'attack="a | b"',
        ]
    ) == {
        "num-rounds": 2,
        "rule": "krum(num_byzantine=1)",
        "tau": 0.3,
        "resume": True,
        "malicious-clients": "3",
        "attack": "a | b",
    }
    with pytest.raises(ConfigError, match="key=value"):
        read_overrides(["num-rounds"])
    with pytest.raises(ConfigError, match="write a number"):
        read_overrides(["num-rounds=two"])
