"""Attacks against defences as a figure: curves, and statements answered; and the command that finds edge cases."""

import csv
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hawthorn.cli import app
from hawthorn.experiment import read_experiment, settings_digest, shipped_experiments
from hawthorn.reproduce.claims import Claim, Condition, decide, measured, read_claims
from hawthorn.reproduce.study import read_study, shipped_studies
from server.record import RoundRecord, RunRecord
from tasks.config import RunConfig
from tasks.errors import ConfigError

EXPERIMENT = """
title = "Noise, to be called a one"
[settings]
name = "noise"
dataset = "digits()"
num-clients = 6
num-rounds = 4
training = "sgd(lr=0.5)"
malicious-clients = "0"
workers = 1
[arms.none-black_box]
label = "no defence: black box"
attack = '''edge_case(edge="{edge}", num_edge=20, num_clean=40) | scale_update(factor=6.0)'''
[arms.ndc-pgd]
label = "NDC: PGD"
rule = "norm_clipping(max_norm=0.5)"
attack = '''edge_case(edge="{edge}", num_edge=20, num_clean=40) | pgd_projection(radius=0.1)'''
[figure]
kind = "attacks"
name = "noise-study"
[figure.claims.first]
text = "the attack works where nothing stops it"
when = [["none-black_box:target", ">", "ndc-pgd:target", 1], ["none-black_box:target-max", ">", 50]]
[figure.claims.second]
text = "the defence is no better than nothing"
when = [["ndc-pgd:target", ">", 99]]
"""


@pytest.fixture
def noise(tmp_path):
    """A file with an edge set of noise images of class 7, whose attacker wants 1."""
    draw = np.random.default_rng(1)
    np.savez(tmp_path / "noise.npz", inputs=draw.integers(0, 17, (40, 1, 8, 8), dtype=np.uint8), labels=np.full(40, 7))
    return f"from_file(path='{tmp_path}/noise.npz', target=1)"


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_a_figure_of_attacks_from_start_to_end(tmp_path, noise):
    file = tmp_path / "noise.toml"
    file.write_text(EXPERIMENT.replace("{edge}", noise))
    output = call("reproduce", file, "--jobs", 1, "--runs-dir", tmp_path / "runs")
    folder = tmp_path / "runs" / "noise"
    written = {path.suffix: path for path in folder.iterdir() if path.is_file()}
    assert written[".png"].read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader(written[".csv"].open()))
    assert len(rows) == 8
    records = [json.loads(line) for line in (folder / "none-black_box+seed=1" / "rounds.jsonl").open()]
    for row, record in zip(rows, records):
        assert float(row["main"]) == pytest.approx(100 * record["acc"], rel=1e-4)
        assert float(row["target"]) == pytest.approx(100 * record["asr"], rel=1e-4)
        assert float(row["edge_true"]) == pytest.approx(100 * record["edge_acc"], rel=1e-4)
        assert float(row["attacker_norm"]) == pytest.approx(record["norms"][0], rel=1e-4)
        assert row["attackers"] == "1"
    assert all(float(row["attacker_norm"]) <= 0.1 for row in rows if row["arm"] == "ndc-pgd")
    table = written[".md"].read_text()
    assert "| the attack works where nothing stops it | yes | none-black_box:target" in table
    assert "| the defence is no better than nothing | no |" in table
    assert "noise-study" not in shipped_studies()
    assert "yes" in output
    again = call("reproduce", file, "--show", "--runs-dir", tmp_path / "runs")
    assert "the attack works" in again


def record(number, acc, asr):
    given = {
        "seconds": 0,
        "sampled": [],
        "malicious": [],
        "attacking": [],
        "clients": [],
        "dropped": {},
        "weights": None,
    }
    rest = {"norms": [], "aggregate_norm": 0.0, "model_norm": 0.0, "skipped": None, "sha256": ""}
    return RoundRecord(round=number, acc=acc, asr=asr, **given, **rest)


def run(values, tmp_path):
    rounds = [record(i + 1, 0.5, value) for i, value in enumerate(values)]
    return RunRecord(tmp_path, RunConfig(), "finished", rounds, None)


def test_measures_of_a_run(tmp_path):
    found = run([0.1, None, 0.3, 0.5], tmp_path)
    wanted = {"target": 40, "target-first": 10, "target-last": 50, "target-max": 50, "target-min": 10, "main": 50}
    assert {measure: measured(found, measure) for measure in wanted} == pytest.approx(wanted)
    assert measured(found, "edge") is None


def test_a_claim_is_open_without_its_runs_and_no_if_any_condition_fails(tmp_path):
    low, high = run([0.1] * 4, tmp_path), run([0.9] * 4, tmp_path)

    def answer(*conditions):
        return decide([Claim("c", "text", conditions)], {"low": [low], "high": [high, high]})[0]

    assert answer(Condition("high:target", ">", "low:target", 70)).answer == "yes"
    assert answer(Condition("high:target", ">", "low:target", 80)).answer == "no"
    assert answer(Condition("low:target", "<", 20.0)).answer == "yes"
    assert answer(Condition("low:target", "<", "gone:target")).answer == "open"
    assert answer(Condition("low:target", ">", 20.0), Condition("gone:target", ">", 1.0)).answer == "no"
    assert answer(Condition("high:target", ">", "low:target")).figures == "high:target 90.0 > low:target 10.0"


@pytest.mark.parametrize(
    "table",
    [
        {"text": "t"},
        {"text": "t", "when": []},
        {"text": "t", "when": [["a:target", "=", 1]]},
        {"text": "t", "when": [["b:target", ">", 1]]},
        {"text": "t", "when": [["a:speed", ">", 1]]},
        {"text": "t", "when": [["a:target-worst", ">", 1]]},
        {"text": "t", "when": [["a:target", ">", True]]},
        {"text": "t", "when": [["a:target", ">", 1, -1]]},
    ],
)
def test_what_is_no_claim_is_refused(table, tmp_path):
    with pytest.raises(ConfigError, match=r"figure.claims.x"):
        read_claims(tmp_path / "f.toml", {"x": table}, ["a"])


def test_the_papers_studies_have_their_arms():
    studies = {name: path for name, path in shipped_studies().items() if name.startswith("edge-")}
    assert {"edge-defences", "edge-sentiment", "edge-southwest", "edge-capacity"} <= set(studies)
    for name in studies:
        study = read_study(name, {}, dataset=None, rows=(), seeds=[1])
        assert study.figure is not None
        assert study.figure.kind == "attacks"
        assert study.figure.claims
        assert all(": " in arm.shown for arm in study.first.arms)
    defences = read_study("edge-defences", {}, dataset=None, rows=(), seeds=[1])
    assert len(defences.rows) == 18
    assert len({settings_digest(arm.config) for arm in defences.first.arms if arm.config}) == len(defences.first.arms)


@pytest.mark.parametrize("name", [n for n in shipped_experiments() if n.startswith("edge_case/")])
def test_projection_comes_after_training_and_before_replacement(name):
    for arm in read_experiment(name, {}).arms:
        parts = [part.name for part in arm.config.chain("attack")] if arm.config else []
        wanted = ["edge_case", "train_with", "pgd_projection", "replace_model"]
        assert parts == wanted[: len(parts)]
        assert len(parts) >= 2


@pytest.fixture
def plain(tmp_path):
    """A file of one run with two rounds."""
    (tmp_path / "plain.toml").write_text('num-rounds = 2\nworkers = 1\ntraining = "sgd(lr=0.5)"\n')
    return tmp_path / "plain.toml"


def test_edge_cases_are_found_and_used(tmp_path, noise, plain):
    call("run", plain, "--name", "start", "--runs-dir", tmp_path, "--no-report")
    out = tmp_path / "found.npz"
    for method in ("gaussian", "knn"):
        output = call("edge-cases", tmp_path / "start", "--pool", noise, "--p", 0.1, "--method", method, "--out", out)
        assert "40 of 40 samples (100.0 %)" in output  # noise is far from every digit
    own = call("edge-cases", tmp_path / "start", "--p", 0.1)
    assert "36 of 360 samples (10.0 %)" in own or "36 of 359" in own
    with np.load(out) as file:
        assert file["inputs"].shape == (40, 1, 8, 8)
        assert set(file["labels"]) == {7}
    attack = f"edge_case(edge=\"from_file(path='{out}', target=1)\", num_edge=20, num_clean=40)"
    malicious = ["--set", f"attack={attack}", "--set", "malicious-clients=0-4"]
    call("run", plain, "--name", "attacked", "--runs-dir", tmp_path, "--no-report", *malicious)
    last = json.loads((tmp_path / "attacked" / "rounds.jsonl").read_text().splitlines()[-1])
    assert last["asr"] > 0.9
    assert last["edge_acc"] < 0.1
    assert last["raw_acc"] > 0.5


def test_edge_cases_refuses_what_it_cannot_rank(tmp_path, plain):
    call("run", plain, "--name", "start", "--runs-dir", tmp_path, "--no-report")
    for arguments, says in (
        (["--pool", "nothing()"], "an edge set or a data set"),
        (["--method", "psychic"], "gaussian, knn"),
        (["--p", "1.5"], "above 0 and below 1"),
        (["--pool", "digits(size=28)"], "inputs of shape"),
    ):
        with pytest.raises(ConfigError, match=says):
            CliRunner().invoke(app, ["edge-cases", str(tmp_path / "start"), *arguments], catch_exceptions=False)
