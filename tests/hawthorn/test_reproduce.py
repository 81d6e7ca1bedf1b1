"""Reproductions: the shipped tables are the papers', and a call runs, keeps, compares and writes."""

import csv
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hawthorn.arms.perform import How, Outcome
from hawthorn.arms.run import run_arms
from hawthorn.cli import app
from hawthorn.experiment import read_experiment, settings_digest
from hawthorn.preflight import preflight
from hawthorn.reproduce.results import as_csv, as_markdown, result_table, write_results
from hawthorn.reproduce.study import read_rows, read_study, shipped_studies
from tasks.errors import ConfigError
from tasks.source import DataSource

STUDY = """
title = "A small table"
about = "Two rules on digits."
[settings]
name = "tiny"
num-clients = 5
num-rounds = 4
eval-every = 2
training = "sgd(lr=0.5, batch_size=32)"
malicious-clients = "0"
attack = "patch_backdoor(target=0, grid=(1, 1), size=(2, 2), per_batch=0.5)"
[variants.plain]
dataset = "digits()"
pretrain = { num-rounds = 2 }
[variants.other]
partition = "dirichlet(alpha=1.0)"
[variants.other.arms.wide]
rule = "trimmed_mean(num_byzantine=2)"
[pretrain]
name = "tiny-start"
rule = "mean()"
[arms.mean]
label = "No defence"
rule = "mean()"
[arms.krum]
label = "Krum"
rule = "krum(num_byzantine=1)"
[arms.wide]
label = "Krum, f = 2"
extra = true
paper = "krum"
rule = "krum(num_byzantine=2)"
[arms.typing]
rule = "krumm()"
[paper.plain]
mean = [95.0, 100.0]
krum = [90.5, 50.0]
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tiny.toml"
    path.write_text(STUDY)
    return str(path)


def study_of(file, tmp_path, rows=(), seeds=(1,), **overrides):
    given = {"runs-dir": str(tmp_path / "runs"), "workers": 1, **overrides}
    return read_study(file, given, dataset=None, rows=rows, seeds=seeds)


def run_all(study):
    for experiment in study.experiments:
        assert run_arms([experiment.start], how=How(keep=True, shared=True))["pretrain"].has_record
    arms = [arm for label in study.rows for arm in study.arms(label)]
    found = {}
    for arm in arms:
        found[arm.config.name if arm.config else arm.label] = run_arms([arm], how=How(keep=True))[arm.label]
    return found


def test_rows_seeds_and_the_shared_start(file, tmp_path):
    study = study_of(file, tmp_path, seeds=(1, 2))
    assert study.rows == ["mean", "krum", "typing"]
    assert study_of(file, tmp_path, rows=("all",)).rows == ["mean", "krum", "wide", "typing"]
    assert study_of(file, tmp_path, rows=("wide", "mean")).rows == ["mean", "wide"]
    names = [arm.config.name for arm in study.arms("krum")]
    assert names == ["tiny-plain/krum+seed=1", "tiny-plain/krum+seed=2"]
    for experiment, arm in zip(study.experiments, study.arms("krum")):
        start = experiment.start.config
        assert (start.num_rounds, start.attack, start.malicious_ids) == (2, "", ())
        assert start.name == f"tiny-start-plain-{settings_digest(start)}+seed={arm.config.seed}"
        assert arm.config.from_model == str(start.run_folder / "model.safetensors")


def test_the_start_is_shared_by_equal_settings_only(file, tmp_path):
    first = study_of(file, tmp_path).first.start.config
    assert study_of(file, tmp_path, **{"num-rounds": 9, "workers": 2}).first.start.config.name == first.name
    assert study_of(file, tmp_path, **{"num-clients": 6}).first.start.config.name != first.name
    given = study_of(file, tmp_path, **{"from-model": "/some/model.safetensors"})
    assert given.first.start is None
    assert given.arms("mean")[0].config.from_model == "/some/model.safetensors"


def test_variants_change_settings_and_arms(file, tmp_path):
    other = read_study(file, {"runs-dir": str(tmp_path)}, dataset="other", rows=["wide"], seeds=[1])
    config = other.arms("wide")[0].config
    assert (config.partition, config.rule) == ("dirichlet(alpha=1.0)", "trimmed_mean(num_byzantine=2)")
    assert other.first.paper == {}
    with pytest.raises(ConfigError, match="no variant 'cifar'; it has: plain, other"):
        read_study(file, {}, dataset="cifar", rows=[], seeds=[1])


def test_a_study_runs_and_its_files_hold_the_figures(file, tmp_path):
    study = study_of(file, tmp_path, seeds=(1, 2))
    outcomes = run_all(study)
    rows = {row.label: row for row in read_rows(study, outcomes)}
    mean, krum, typing = rows["mean"], rows["krum"], rows["typing"]
    assert (mean.shown, mean.paper_acc, mean.paper_asr, mean.seeds, mean.rounds) == ("No defence", 95.0, 100.0, 2, 4)
    assert mean.acc is not None
    assert mean.acc_difference == pytest.approx(mean.acc - 95.0)
    assert mean.acc_range is not None
    assert mean.acc == pytest.approx(sum(mean.acc_range) / 2)
    assert krum.paper_acc == 90.5
    assert typing.acc is None
    assert "unknown rule 'krumm'" in typing.note
    files = write_results(study, list(rows.values()))
    assert {path.name for path in files.values()} == {"table.csv", "table.md", "table.png", "table.html"}
    written = list(csv.DictReader(files["csv"].open()))
    assert [row["row"] for row in written] == ["mean", "krum", "typing"]
    assert float(written[0]["acc"]) == pytest.approx(mean.acc, abs=1e-4)
    assert float(written[0]["asr_difference"]) == pytest.approx(mean.asr_difference, abs=1e-4)
    assert written[2]["acc"] == ""
    assert f"| No defence | {mean.acc:.2f} (" in files["md"].read_text()
    assert files["html"].read_text().count("data:image/png;base64,") == 2
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    again = run_all(study)
    kept = {outcome.status for name, outcome in again.items() if name != "typing"}
    assert kept == {"kept"}


def test_missing_rows_say_why(file, tmp_path):
    study = study_of(file, tmp_path, rows=("mean", "krum", "wide"))
    name = study.arms("wide")[0].config.name
    rows = read_rows(study, {name: Outcome("wide", "undefined", "n >= 7")})
    assert [row.note for row in rows] == ["not run", "not run", "undefined: n >= 7"]
    assert rows[2].paper_acc == 90.5
    assert "undefined: n >= 7" in as_markdown(study, rows)
    assert as_csv(study, rows).count("not run") == 2
    assert result_table(study, rows).row_count == 3


def test_the_caption_says_after_which_round_every_row_is(file, tmp_path):
    study = study_of(file, tmp_path, rows=("mean", "krum"))
    assert "All in %, after round 4, seed 1." in as_markdown(study, read_rows(study))
    Path(file).write_text(STUDY.replace('label = "Krum"', 'label = "Krum"\nnum-rounds = 6'))
    study = study_of(file, tmp_path, rows=("mean", "krum"))
    text = as_markdown(study, read_rows(study))
    assert "All in %, after each row's last round: 4 (No defence); 6 (Krum), seed 1." in text
    only = study_of(file, tmp_path, rows=("krum",))
    assert "All in %, after round 6, seed 1." in as_markdown(only, read_rows(only))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "flip-table99"}, "no reproduction 'flip-table99'; there are: .*flip-table1, .*flip-table2"),
        ({"rows": ["kurm"]}, "no row 'kurm'; there are: mean, krum, wide, typing, all"),
        ({"seeds": [1, 1]}, "different numbers, got 1, 1"),
        ({"seeds": []}, "different numbers, got none"),
    ],
)
def test_errors_say_what_exists(file, arguments, says):
    values = {"name": file, "rows": [], "seeds": [1], **arguments}
    name = values.pop("name")
    with pytest.raises(ConfigError, match=says):
        read_study(name, {}, dataset=None, **values)


@pytest.mark.parametrize("name", ["flip-table1", "flip-table2"])
@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "cifar10"])
def test_every_row_of_the_papers_tables_is_there(name, dataset):
    experiment = read_experiment(str(shipped_studies()[name]), {}, variant=dataset)
    arms = {arm.label: arm for arm in experiment.arms}
    assert set(experiment.paper) <= set(arms)
    for label, arm in arms.items():
        assert arm.config is not None
        assert arm.paper in experiment.paper or label.startswith(("multi_krum", "flame"))
        assert arm.extra == (arm.paper != label)
        assert len(arm.config.malicious_ids) == 4
        attacked = [r for r in range(1, 63) if arm.config.component("attack_schedule")().attackers(r, 4)]
        if name == "flip-table2":
            assert attacked == list(range(1, 63))
            assert (arm.config.num_rounds, arm.config.server_lr) == (60, 0.1 if arm.label == "no_defence_eta" else 1.0)
        else:
            assert attacked == ([3, 5, 7, 9] if dataset == "cifar10" else [2, 4, 6, 8])
            last = 63 if dataset == "cifar10" else 62  # 60 rounds after the first attack
            assert (arm.config.num_rounds, arm.config.server_lr) == (last, 0.1)
            assert "scale_update(factor=100.0)" in arm.config.attack
    assert experiment.start is not None
    assert experiment.start.config is not None
    assert experiment.start.config.num_rounds == (10 if dataset == "mnist" else 200)


def test_both_tables_start_from_one_pretraining():
    starts = [read_experiment(str(shipped_studies()[name]), {}).start for name in ("flip-table1", "flip-table2")]
    assert len({start.config.name for start in starts if start and start.config}) == 1


@pytest.mark.parametrize(
    ("name", "row", "figures"),
    [
        ("flip-table1", "bulyan_trimmed_mean", {"mnist": (97.02, 90.75), "cifar10": (66.69, 84.05)}),
        ("flip-table2", "median", {"mnist": (98.14, 66.01), "fashion_mnist": (84.07, 99.34)}),
        ("flip-table2", "fltrust", {"mnist": (91.96, 20.60), "cifar10": (74.85, 68.70)}),
    ],
)
def test_the_papers_figures(name, row, figures):
    for dataset, wanted in figures.items():
        assert read_experiment(str(shipped_studies()[name]), {}, variant=dataset).paper[row] == wanted


@pytest.mark.parametrize("name", ["flip-table1", "flip-table2"])
def test_every_row_can_start(name, tmp_path):
    if not os.environ.get("HAWTHORN_DATA"):
        pytest.skip("MNIST is looked for through HAWTHORN_DATA, which is not set")
    assert DataSource.default(None).roots
    experiment = read_experiment(str(shipped_studies()[name]), {"runs-dir": str(tmp_path)})
    for config in experiment.runs:
        preflight(config.replace(from_model=""))


def test_the_command_lists_runs_goes_on_and_shows(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def hawthorn(*words):
        return CliRunner().invoke(app, ["reproduce", *words])

    assert "flip-table2" in hawthorn("--list").stdout
    first = hawthorn(file, "--rows", "mean,krum", "--jobs", "2", "--rounds", "2")
    assert first.exit_code == 0, first.stdout
    assert "No defence" in first.stdout
    assert Path(tmp_path / "runs/tiny-plain/table.html").exists()
    second = hawthorn(file, "--rows", "mean,krum", "--jobs", "1", "--rounds", "3")
    assert "tiny-plain/krum+seed=1: 2 of 3 rounds are done, going on" in second.stdout
    shown = hawthorn(file, "--show", "--rounds", "3")
    assert shown.exit_code == 0
    assert "not run" not in shown.stdout
    assert "unknown rule 'krumm'" in shown.stdout
    failed = hawthorn(file, "--rows", "typing,mean", "--rounds", "3")
    assert "1 of 2 runs failed; typing: unknown rule 'krumm'" in str(failed.exception)
