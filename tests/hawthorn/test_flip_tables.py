"""FLIP's tables: files that extend others, rows that read another row's run, the paper's figures, and the theory."""

import csv
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hawthorn.arms.perform import How
from hawthorn.arms.run import run_arms
from hawthorn.cli import app
from hawthorn.engines import find_engine
from hawthorn.experiment import distinct, read_experiment
from hawthorn.reproduce.results import write_results
from hawthorn.reproduce.study import check_theory, read_rows, read_study, shipped_studies
from hawthorn.reproduce.theory import Pair, check_pair
from hawthorn.reproduce.theory_results import theory_tables, write_theory
from server.record import read_run
from server.rejection import measure_confidences, rates
from tasks.errors import ConfigError, RecordError

BASE = """
title = "Base"
[settings]
name = "base"
num-clients = 4
num-rounds = 2
model = "logistic_regression(bias=False)"
training = "sgd(lr=0.5, batch_size=32)"
malicious-clients = "0"
attack = "patch_backdoor(target=0, grid=(1, 1), size=(2, 2), per_batch=0.5)"
server-lr = 2.0
[variants.one]
pretrain = { num-rounds = 2 }
[variants.two]
seed = 5
[variants.two.arms.krum]
tau = 0.25
[pretrain]
name = "start"
[arms.mean]
label = "No defence"
[arms.krum]
rule = "krum(num_byzantine=0)"
tau = 0.5
[paper.one]
mean = [90.0, 100.0]
"""
DERIVED = """
title = "Derived"
extends = "{base}"
[arms.mean]
run = "mean"
[arms.without]
label = "tau = 0"
run = "krum"
tau = 0.0
[arms.strict]
run = "krum"
tau = 0.75
[arms.median]
like = "krum"
rule = "median()"
[arms.elsewhere]
run = "{base}:krum"
[paper.one]
without = [80.0, nan]
[theory]
draws = 300
[theory.pairs.first]
before = "mean"
after = "median"
paper = [1, 2, 3, 4]
[theory.pairs.second]
before = "mean"
after = "strict"
"""


@pytest.fixture
def files(tmp_path):
    base, derived = tmp_path / "set" / "base.toml", tmp_path / "set" / "derived.toml"
    base.parent.mkdir()
    base.write_text(BASE)
    derived.write_text(DERIVED.format(base=base))
    return base, derived


@pytest.fixture(autouse=True)
def _short_inversion(monkeypatch):
    monkeypatch.setattr("hawthorn.reproduce.theory.STEPS", 20)


def given(tmp_path):
    return {"runs-dir": str(tmp_path / "runs"), "workers": 1}


def run_study(study):
    assert run_arms([study.first.start], how=How(keep=True))["pretrain"].has_record
    arms = distinct(arm for label in study.rows for arm in study.arms(label))
    return {arm.config.name: run_arms([arm], how=How(keep=True))[arm.label] for arm in arms}


def test_a_file_takes_over_settings_and_runs_of_another(files, tmp_path):
    base, derived = (read_experiment(str(file), given(tmp_path)) for file in files)
    arms, of_base = {a.label: a for a in derived.arms}, {a.label: a for a in base.arms}
    assert (derived.name, derived.variants) == ("set-derived-one", ("one", "two"))
    assert derived.start.config == base.start.config
    assert arms["mean"].config == of_base["mean"].config
    assert arms["without"].config == arms["strict"].config == arms["elsewhere"].config == of_base["krum"].config
    assert [arms[label].tau for label in ("mean", "without", "strict", "elsewhere")] == [None, 0.0, 0.75, None]
    assert (arms["median"].config.rule, arms["median"].config.tau) == ("median()", 0.5)
    assert arms["median"].config.name == "set-derived-one/median"
    assert (arms["mean"].shown, arms["without"].shown) == ("mean", "tau = 0")
    assert len(distinct(derived.arms)) == 3
    other = read_experiment(str(files[1]), given(tmp_path), variant="two")
    assert {a.config.seed for a in other.arms} == {5}
    assert next(a for a in other.arms if a.label == "median").config.tau == 0.25


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (('run = "mean"', 'run = "nobody"'), "there is no arm 'nobody' to run; there are: .*mean, krum"),
        (("tau = 0.75", "tau = 1.5"), "tau must be from 0 to 1, got 1.5"),
        (("tau = 0.75", 'rule = "median()"'), "cannot set 'rule'"),
        (('like = "krum"', 'like = "nobody"'), "like = 'nobody' is no arm above it; there are: mean, krum"),
        (("[paper.one]", "[variants.three]\n[paper.one]"), "no variant 'three'; it has: one, two"),
        (('after = "strict"', 'after = "nobody"'), "wants two of the arms mean, without"),
        (("draws = 300", "draws = 0"), "draws of at least 1"),
        (('after = "strict"', 'after = "strict"\nbeyond = 1'), "unexpected keyword argument 'beyond'"),
    ],
)
def test_what_does_not_fit_is_named(files, tmp_path, change, says):
    files[1].write_text(files[1].read_text().replace(*change))
    with pytest.raises(ConfigError, match=says):
        read_study(str(files[1]), given(tmp_path), dataset=None, rows=[], seeds=[1])


def test_a_run_is_not_taken_over_from_another_pretraining(files, tmp_path):
    files[1].write_text(
        files[1].read_text().replace("[arms.mean]", "[pretrain]\nnum-rounds = 3\n[variants.one]\n[arms.mean]", 1)
    )
    base = files[0].read_text().replace("pretrain = { num-rounds = 2 }", "")
    files[0].write_text(base.replace('name = "start"', 'name = "start"\nnum-rounds = 2'))
    with pytest.raises(ConfigError, match="starts from another pretraining"):
        read_experiment(str(files[1]), given(tmp_path))


def test_an_arm_that_is_another_ones_run_is_not_run_alone(files, tmp_path):
    with pytest.raises(ConfigError, match="is the run of 'krum', read at another tau"):
        read_experiment(str(files[1]), given(tmp_path), arm="strict")


def test_rows_read_one_run_at_several_thresholds_and_the_theory_holds(files, tmp_path):
    study = read_study(str(files[1]), given(tmp_path), dataset=None, rows=[], seeds=[1])
    outcomes = run_study(study)
    assert len(outcomes) == 3
    rows = {row.label: row for row in read_rows(study, outcomes)}
    run = read_run(next(a for a in study.first.arms if a.label == "strict").config.run_folder)
    final = run.final
    assert (rows["without"].acc, rows["without"].asr) == (100 * final.acc_all, 100 * final.asr_all)
    assert (rows["elsewhere"].acc, rows["elsewhere"].asr) == (100 * final.acc, 100 * final.asr)
    assert rows["strict"].acc < rows["elsewhere"].acc < rows["without"].acc
    assert (rows["without"].paper_acc, rows["without"].paper_asr) == (80.0, None)
    at = rates(measure_confidences(run.folder), [0.0, 0.5, 0.75])
    wanted = [rows[label].acc / 100 for label in ("without", "elsewhere", "strict")]
    assert at.acc == pytest.approx(wanted, abs=1e-6)  # the record has six digits
    assert set(write_results(study, list(rows.values()))) == {"csv", "md", "png", "html", "tau.png"}

    first, second = check_theory(study)
    for found in (first, second):
        assert (found.problem, found.clean.violations, found.backdoored.violations) == ("", 0, 0)
        assert found.clean.samples > found.backdoored.samples > 0
        assert found.attacks.new_attacks_covered == found.attacks.newly_above == 0
        true, inverted = found.radii
        assert (true.trigger, inverted.trigger, true.violations, inverted.violations) == ("true", "inverted", 0, 0)
        assert true.broken_outside == true.tried_outside
        assert true.within == true.radius.certified.sum()
    bounds, radii = theory_tables([first, second])
    assert (bounds.row_count, radii.row_count) == (4, 4)
    written = write_theory(study.folder, "t", [first, second])
    lines = list(csv.DictReader(written["theory.csv"].open()))
    assert [line["what"] for line in lines[:2]] == ["clean", "backdoored"]
    assert (lines[0]["paper_before"], lines[1]["paper_after"]) == ("1", "4")
    assert int(lines[0]["accepted_before"]) == round(rows["mean"].acc / 100 * int(lines[0]["samples"]))
    assert float(lines[0]["lower"]) <= float(lines[0]["loss_change"]) <= float(lines[0]["upper"])


def test_the_theory_speaks_of_runs_that_differ_in_the_defence_alone(files, tmp_path):
    study = read_study(str(files[1]), given(tmp_path), dataset=None, rows=["mean", "median"], seeds=[1])
    run_study(study)
    mean, median = (next(a for a in study.first.arms if a.label == label) for label in ("mean", "median"))
    pair, before = Pair("p", "p", "mean", "median"), mean.config.run_folder
    checked = check_pair(pair, before, median.config.run_folder, 10)
    taus = mean.config.tau, median.config.tau
    assert taus[0] != taus[1]
    finals = [read_run(arm.config.run_folder).final for arm in (mean, median)]
    shares = [hits / checked.backdoored.samples for hits in checked.attacks_accepted]
    assert shares == pytest.approx([final.asr for final in finals], abs=1e-6)  # each at its own tau
    for change in (
        {"server_lr": 1.0},
        {"malicious_clients": "1"},
        {"attack": median.config.attack.replace("(2, 2)", "(1, 2)")},
    ):
        other = median.config.replace(name="other", **change)
        find_engine("in_process").run(other)
        with pytest.raises(
            RecordError, match=r"differ in more than the defence: (server_lr|malicious_clients|the attack)"
        ):
            check_pair(pair, before, other.run_folder, 10)


def test_a_model_that_normalises_has_no_radius(files, tmp_path):
    files[0].write_text(BASE.replace("bias=False", "mean=(0.5,), std=(0.5,)"))
    study = read_study(str(files[1]), given(tmp_path), dataset=None, rows=["mean", "median"], seeds=[1])
    run_study(study)
    (first,) = check_theory(study)
    assert (first.problem, first.clean.violations, first.backdoored.violations, first.radii) == ("", 0, 0, [])


def test_the_command_prints_both_and_runs_each_model_once(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["reproduce", str(files[1]), "--rows", "without,strict,mean", "--rounds", "1", "--jobs", "1"]
    first = CliRunner().invoke(app, words)
    assert first.exit_code == 0, first.stdout
    assert first.stdout.count("1 rounds in") == 2
    assert "clean" in first.stdout
    assert "theory.md" in first.stdout
    again = CliRunner().invoke(app, words)
    assert again.stdout.count("finished before, kept") == 3  # the pretraining, too


# ---- the shipped tables

FIGURES = {
    "flip-table5": {"mnist": {"adaptive": (96.82, 0.61)}, "cifar10": {"adaptive": (60.08, 14.02)}},
    "flip-table6": {"mnist": {"threshold_only": (96.88, 51.75)}, "fashion_mnist": {"threshold_only": (79.68, 98.53)}},
    "flip-table7": {"mnist": {"hardening_only": (97.20, 22.35)}, "cifar10": {"hardening_only": (75.31, 52.47)}},
    "flip-table8": {"cifar10": {"abs_single": (74.14, 8.0), "abs_continuous": (74.90, 22.38)}},
    "flip-table9": {"mnist": {"flip_8x": (96.83, 0.45), "no_defence_1x": (97.58, 1.48)}},
    "flip-table10": {"cifar10": {"random_colour": (78.65, 80.99), "oracle": (76.98, 2.64)}},
    "flip-table11": {"mnist": {"flip_0_2": (97.56, 0.34), "no_defence_2_0": (97.82, 93.25)}},
    "flip-tau": {"mnist": {"tau_0": (97.20, 22.35), "tau_0_7": (88.86, 0.91)}},
    "flip-table3": {"mnist": {"single_flip": (84.58, 5.28), "continuous_no_defence": (83.03, 63.78)}},
}


@pytest.mark.parametrize("name", [*FIGURES, "flip-multi-krum"])
def test_every_shipped_table_has_its_rows(name):
    path = str(shipped_studies()[name])
    for variant in read_experiment(path, {}).variants:
        study = read_study(name, {}, dataset=variant, rows=[], seeds=[1])
        arms = {arm.label: arm for arm in study.first.arms}
        assert [arm.problem for arm in arms.values() if arm.config is None] == []
        assert set(study.first.paper) <= set(arms)
        for row, figures in FIGURES.get(name, {}).get(variant, {}).items():
            assert study.first.paper[row] == figures
        for arm in arms.values():
            if "flip" in arm.config.training and "adaptive" not in arm.label:
                assert "train_with(training='sgd(" in arm.config.attack  # attackers do not harden


def test_rows_of_other_tables_are_those_tables_runs():
    def configs(name, dataset):
        return {a.label: a for a in read_experiment(str(shipped_studies()[name]), {}, variant=dataset).arms}

    for dataset, tau in (("mnist", 0.3), ("fashion_mnist", 0.3), ("cifar10", 0.4)):
        table2 = configs("flip-table2", dataset)
        six, seven = configs("flip-table6", dataset), configs("flip-table7", dataset)
        assert six["threshold_only"].config == table2["no_defence"].config
        assert (six["threshold_only"].tau, table2["flip"].config.tau) == (tau, tau)
        assert seven["hardening_only"].config == table2["flip"].config
        assert seven["hardening_only"].tau == 0.0
    table1 = configs("flip-table1", "mnist")
    assert configs("flip-table9", "mnist")["flip_4x"].config == table1["flip"].config
    single = configs("flip-multi-krum", "cifar10")["multi_krum_single"]
    assert single.config == configs("flip-table1", "cifar10")["multi_krum"].config
    paper = read_experiment(str(shipped_studies()["flip-multi-krum"]), {}).paper
    assert math.isnan(paper["multi_krum_single"][0])
    assert paper["multi_krum_single"][1] == 4.18


@pytest.mark.parametrize("name", shipped_studies())
def test_no_two_runs_of_a_table_share_a_folder_whatever_its_name(name):
    study = read_study(name, {"name": "foo"}, dataset=None, rows=["all"], seeds=[1])
    runs = {(arm.config.name, arm.config) for arm in study.first.arms if arm.config}
    assert len({folder for folder, _ in runs}) == len(runs)


def test_the_grid_of_combinations_is_readable():
    experiment = read_experiment("flip/combined", {})
    assert len(experiment.points) == 16
    assert [arm.problem for arm in experiment.arms if arm.config is None] == []
    assert experiment.start.config == read_experiment("flip/table2", {}).start.config


# ---- models at other thresholds, and their triggers


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    file = folder / "one.toml"
    file.write_text(BASE.replace("logistic_regression(bias=False)", "logistic_regression()"))
    experiment = read_experiment(str(file), {"runs-dir": str(folder), "workers": 1})
    assert run_arms([experiment.start])["pretrain"].has_record
    arm = next(arm for arm in experiment.arms if arm.label == "krum")
    assert run_arms([arm])["krum"].has_record
    return arm.config.run_folder


def test_tau_writes_curves_that_the_report_shows(finished):
    shown = CliRunner().invoke(app, ["tau", str(finished), "--taus", "0,0.5,1"])
    assert shown.exit_code == 0, shown.output
    lines = list(csv.DictReader((finished / "tau.csv").open()))
    final = read_run(finished).final
    assert float(lines[0]["acc"]) == pytest.approx(final.acc_all, abs=1e-6)
    assert float(lines[1]["asr"]) == pytest.approx(final.asr, abs=1e-6)
    assert float(lines[1]["auc"]) == pytest.approx(final.auc, abs=1e-4)
    assert (finished / "tau.png").read_bytes()[:4] == b"\x89PNG"
    assert CliRunner().invoke(app, ["report", str(finished)]).exit_code == 0
    assert "Rejection at every threshold" in (finished / "report.html").read_text()
    assert "--taus wants numbers" in str(CliRunner().invoke(app, ["tau", str(finished), "--taus", "2"]).exception)


def test_triggers_are_drawn_and_kept_beside_the_true_one(finished):
    from hawthorn.triggers import kept_triggers

    shown = CliRunner().invoke(app, ["triggers", str(finished), "--steps", "30", "--samples", "2"])
    assert shown.exit_code == 0, shown.output
    found = kept_triggers(read_run(finished))
    assert found.target == 0
    assert torch.equal(found.true_mask, torch.nn.functional.pad(torch.ones(1, 2, 2), (0, 6, 0, 6)))
    assert torch.equal(found.true_pattern, found.true_mask)
    assert found.before is not None  # the pretraining that the run started from
    for seen in (found.before, found.after):
        assert seen.distances.shape == (10, 10)
        assert torch.isnan(seen.distances.diagonal()).all()
        for source, mask, _, size in seen.to_class(0):
            value = seen.distances[source, 0]
            assert float(mask.sum()) == pytest.approx(size)
            assert (size == 0) if torch.isnan(value) else size == pytest.approx(float(value), rel=1e-5)
    lines = list(csv.DictReader((finished / "distances.csv").open()))
    assert len(lines) == 2 * 90
    for name in ("triggers.png", "distances.png"):
        assert (finished / name).read_bytes()[:4] == b"\x89PNG"
    assert CliRunner().invoke(app, ["report", str(finished)]).exit_code == 0
    page = (finished / "report.html").read_text()
    assert "Triggers and class distances" in page
    assert np.char.count(page, "class distances, the l1 norm") == 1


def test_distances_that_were_not_found_are_said_so(finished):
    from hawthorn.report._triggers import draw_distances
    from hawthorn.triggers import kept_triggers

    shown = CliRunner().invoke(app, ["triggers", str(finished), "--steps", "1", "--samples", "2"])
    assert "none found" in shown.stdout
    assert "inf" not in shown.stdout
    found = kept_triggers(read_run(finished))
    lost = int(torch.isinf(found.after.distances).sum())
    assert lost > 0
    lines = list(csv.DictReader((finished / "distances.csv").open()))
    assert [line["l1"] for line in lines if line["model"] == "after"].count("") == lost
    axes = draw_distances(found).axes[1]
    assert "inf" not in axes.get_title()
    assert sum(text.get_text() == "–" for text in axes.texts) == lost


def test_an_extra_arm_runs_when_it_is_named(tmp_path):
    file = tmp_path / "study.toml"
    extra = '[arms.more]\nextra = true\nrule = "median()"\n'
    file.write_text(BASE.replace('start"\n', 'start"\n' + extra))
    given = ["--variant", "two", "--set", "num-rounds=1", "--set", "dataset=digits()", "--no-report"]
    done = CliRunner().invoke(app, ["run", str(file), "--arm", "more", "--runs-dir", str(tmp_path), *given])
    assert done.exit_code == 0, done.output
    assert "median()" in done.output
