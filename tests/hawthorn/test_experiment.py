"""Experiment files: arms, overrides, shipped ones, and errors that say what exists."""

import pytest

from hawthorn.experiment import MACHINE, find_experiment, read_experiment, shipped_experiments
from hawthorn.overrides import read_overrides
from server.writer import MAY_CHANGE
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
        ("[paper.x]\na = [1]", ConfigError, r"\[paper\] a must be \[ACC, ASR\] in percent"),
        ("[arms.a]\n[variants.x.arms.b]\nrule = 'mean()'", ConfigError, "changes 'b', which is no arm"),
        ("[pretrain]\nrule = 'krumm()'", SpecError, r"\[pretrain\]: unknown rule 'krumm'"),
        ("[map]\nrows = 'a'", ConfigError, r"\[map\] draws a \[grid\], and there is none"),
        ("pretrain = 3", ConfigError, "pretrain must be a table, got 3"),
        ("[arms.a]\nlike = ['a']", ConfigError, "is no arm above it"),
        ("[variants.v]\narms = 3", ConfigError, r"\[variants.v\] arms must hold tables, got 3"),
        ("[variants.v.arms]\na = 3", ConfigError, r"\[variants.v\] arms must hold tables"),
        ("[grid]\nf = [0x" + "f" * 4000 + "]", ConfigError, "at most 64 bits"),
        ("seed = " + "9" * 5000, ConfigError, "cannot read"),
        ("x = " + "[" * 5000, ConfigError, "cannot read"),
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
    with pytest.raises(ConfigError, match="write a number"):
        read_overrides(["num-rounds=" + "9" * 5000])


def test_what_does_not_touch_the_numbers_is_what_a_resumed_run_may_change():
    assert MAY_CHANGE - {"num_rounds"} == MACHINE


def test_variants_and_labels(tmp_path):
    path = tmp_path / "forms.toml"
    path.write_text(
        "[settings]\nnum-rounds = 3\n[variants.small]\nnum-rounds = 1\n[variants.large]\nnum-rounds = 9\n"
        "[arms.a]\nlabel = 'First'\n[arms.b]\nextra = true\nnum-rounds = 5\n"
    )
    experiment = read_experiment(str(path), {})
    assert (experiment.variant, experiment.variants, experiment.name) == ("small", ("small", "large"), "forms-small")
    assert [(a.shown, a.extra, a.config.num_rounds) for a in experiment.arms] == [("First", False, 1), ("b", True, 5)]
    large = read_experiment(str(path), {}, variant="large")
    assert [config.name for config in large.runs] == ["forms-large/a", "forms-large/b"]
    assert large.runs[0].num_rounds == 9
    with pytest.raises(ConfigError, match="no variant 'huge'; it has: small, large"):
        read_experiment(str(path), {}, variant="huge")


PARENT = """
[settings]
num-rounds = 2
rule = "median()"
[variants.one]
[variants.one.arms.x]
tau = 0.25
[arms.x]
label = "X"
server-lr = 0.5
[arms.y]
like = "x"
rule = "mean()"
"""


def extending(tmp_path, parent, child):
    (tmp_path / "parent.toml").write_text(parent)
    (tmp_path / "child.toml").write_text(f'extends = "{tmp_path / "parent.toml"}"\n{child}')
    return str(tmp_path / "child.toml")


def test_an_arm_like_one_that_is_like_another_has_all_of_it(tmp_path):
    child = extending(tmp_path, PARENT, '[arms.z]\nlike = "y"\nnum-rounds = 3\n')
    (config,) = read_experiment(child, {}).runs
    assert (config.server_lr, config.tau, config.rule, config.num_rounds) == (0.5, 0.25, "mean()", 3)
    wrong = extending(tmp_path, PARENT.replace('like = "x"', 'like = "w"'), '[arms.z]\nlike = "y"\n')
    with pytest.raises(ConfigError, match=r"parent.toml, arm y: like = 'w' is no arm above it"):
        read_experiment(wrong, {})


@pytest.mark.parametrize("parent", ["", "[settings]\n"])
@pytest.mark.parametrize("child", ["", "[settings]\n"])
def test_settings_above_all_tables_are_settings_in_files_that_extend_too(tmp_path, parent, child):
    parent += 'name = "theirs"\nnum-rounds = 2\nrule = "median()"\n'
    file = extending(tmp_path, parent, child + "num-rounds = 7\n[arms.z]\n")
    (config,) = read_experiment(file, {}).runs
    assert (config.num_rounds, config.rule) == (7, "median()")
    assert config.name == f"{tmp_path.name}-child/z"


def test_a_name_on_the_command_line_merges_no_arms_of_different_files(tmp_path):
    theirs = f"{tmp_path / 'parent.toml'}:x"
    child = f'[arms.x]\nrule = "mean()"\n[arms.old]\nrun = "{theirs}"\n[arms.own]\nrun = "x"\n'
    file = extending(tmp_path, PARENT, child)
    arms = {arm.label: arm.config for arm in read_experiment(file, {"name": "foo"}).arms}
    assert {label: (c.name, c.rule) for label, c in arms.items()} == {
        "x": ("foo-one/x", "mean()"),
        "old": ("parent-one/x", "median()"),
        "own": ("foo-one/x", "mean()"),
    }
    with pytest.raises(ConfigError, match="arms 'x' and 'old' are different runs of one folder, parent-one/x"):
        read_experiment(file, {"name": "parent"})
