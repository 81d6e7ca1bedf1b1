"""Grids of experiment files: axes, templates, shared runs, and errors that name the axis."""

import pytest

from hawthorn.experiment import read_experiment
from hawthorn.grid import expand, read_axes
from tasks.errors import ConfigError

GRID = """
title = "Small"
[settings]
num-clients = 7
num-rounds = 2
[grid.rule]
mean = { rule = "mean()" }
krum = { rule = "krum(num_byzantine={f})" }
[grid.attack]
flip = { attack = "sign_flip()" }
noise = { attack = "gaussian_noise()" }
[grid.f]
0 = { attack = "" }
2 = { malicious-clients = "0-1" }
[map]
rows = "rule"
columns = "f"
worst = "attack"
"""


def write(tmp_path, text, name="small.toml"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


def test_points_with_equal_settings_share_an_arm(tmp_path):
    experiment = read_experiment(write(tmp_path, GRID), {"runs-dir": str(tmp_path)})
    assert len(experiment.points) == 2 * 2 * 2
    assert sorted(arm.label for arm in experiment.arms) == [
        "krum+flip+f=0",
        "krum+flip+f=2",
        "krum+noise+f=2",
        "mean+flip+f=0",
        "mean+flip+f=2",
        "mean+noise+f=2",
    ]
    assert experiment.points["mean", "noise", "0"] == "mean+flip+f=0"
    assert experiment.map is not None
    assert (experiment.map.rows, experiment.map.columns, experiment.map.worst) == ("rule", "f", "attack")


def test_labels_are_filled_in_and_later_axes_win(tmp_path):
    arms = {arm.label: arm for arm in read_experiment(write(tmp_path, GRID), {}).arms}
    config = arms["krum+flip+f=2"].config
    assert config is not None
    assert (config.rule, config.attack, config.malicious_ids) == ("krum(num_byzantine=2)", "sign_flip()", (0, 1))
    none = arms["krum+flip+f=0"].config
    assert none is not None
    assert (none.rule, none.attack, none.malicious_ids) == ("krum(num_byzantine=0)", "", ())
    assert config.name == "small/krum+flip+f=2"


def test_a_list_is_an_axis_of_labels():
    axes = read_axes({"seed": [1, 2], "rounds": [3]})
    arms, points = expand({"seed-text": "s{seed}", "num-rounds": 4}, axes)
    assert arms["seed=1+rounds=3"] == {"seed-text": "s1", "num-rounds": 4}
    assert points == {("1", "3"): "seed=1+rounds=3", ("2", "3"): "seed=2+rounds=3"}


def test_a_point_that_names_what_does_not_exist_keeps_its_error(tmp_path):
    experiment = read_experiment(write(tmp_path, GRID.replace("gaussian_noise", "no_such_noise")), {})
    problems = {arm.label: arm.problem for arm in experiment.arms if arm.problem}
    assert sorted(problems) == ["krum+noise+f=2", "mean+noise+f=2"]
    assert "unknown attack 'no_such_noise'; there are: " in problems["mean+noise+f=2"]


def test_one_point_can_be_run_alone(tmp_path):
    file = write(tmp_path, GRID.replace("gaussian_noise", "no_such_noise"))
    experiment = read_experiment(file, {}, arm="krum+flip+f=2")
    assert [config.rule for config in experiment.runs] == ["krum(num_byzantine=2)"]
    assert (experiment.axes, experiment.points, experiment.map) == ((), {}, None)
    with pytest.raises(ConfigError, match="unknown attack 'no_such_noise'"):
        read_experiment(file, {}, lenient=False)


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("{f}", "{g}", r"\{g\} is no axis of \[grid\]; there are: rule, attack, f"),
        ('rows = "rule"', 'rows = "rules"', r"must name each axis of \[grid\] once; the axes are rule, attack, f"),
        ('rows = "rule"\n', "", r"\[map\] wants rows, columns and worst"),
        ('worst = "attack"', 'worst = "attack"\nvalue = "loss"', "value must be acc or asr, got 'loss'"),
        ("[map]", "[arms.a]\n[map]", r"has \[grid\] and \[arms\]"),
        ("[grid.f]\n0 = ", "[grid.f]\n'a/b' = ", "a label is made of letters"),
        ("flip = {", '"" = {', "a label is made of letters"),
        ('noise = { attack = "gaussian_noise()" }', "noise = 3", "list of labels or a table from labels to settings"),
    ],
)
def test_errors_say_which_axis(tmp_path, before, after, says):
    assert before in GRID
    with pytest.raises(ConfigError, match=says):
        read_experiment(write(tmp_path, GRID.replace(before, after)), {})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({}, "must be a table of axes"),
        ({"f": [1, 1]}, "different numbers"),
        ({"f": []}, "list of labels"),
        ({"1f": [1]}, "an axis is named by letters"),
        ({"a": list(range(200)), "b": list(range(200))}, "40000 points"),
    ],
)
def test_impossible_axes_are_refused(content, says):
    with pytest.raises(ConfigError, match=says):
        read_axes(content)
