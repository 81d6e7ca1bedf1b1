"""CFAT's table and figures: the shipped files are the paper's setting, and a small study runs, keeps and writes."""

import csv
import json
import math
import os
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from certify.gate import BoundMetrics, GateMetrics
from hawthorn.cli import app
from hawthorn.experiment import read_experiment
from hawthorn.preflight import preflight
from hawthorn.report._style import new_figure
from hawthorn.reproduce import robustness_results
from hawthorn.reproduce.robustness import PaperRow, judged, measure_robustness, metrics_of, read_robustness
from hawthorn.reproduce.robustness_results import as_csv, as_markdown, robustness_table, write_robustness
from hawthorn.reproduce.study import read_study, shipped_studies
from tasks.errors import ConfigError
from tasks.task import load

PAPERS = ("cfat-table1", "cfat-fig1a", "cfat-fig1b")
NAMES = (*PAPERS, "cfat-convergence")
STUDY = """
title = "A small table"
about = "A distilled model on digits."
[settings]
name = "tiny"
model = "cfat_mnist(padding=1)"
num-clients = 10
clients-per-round = 5
num-rounds = 1
rule = "median()"
training = "adversarial(eps=0.1, attack_steps=2, lr=0.05, momentum=0.9, epochs=1)"
malicious-clients = "0-3"
attack-schedule = "fixed_frequency(period=1, start=1, num_attackers=3)"
gate = "paper(accuracy_share=0.0, loss_share=1000000000.0)"
gate-eps = "0.01,0.05"
gate-attack-steps = 4
gate-validation = 60
gate-certification = 4
[variants.digits]
dataset = "digits()"
[pretrain]
name = "tiny-start"
gate = ""
attack-schedule = "continuous()"
num-rounds = 6
root-samples = 64
[arms.honest]
label = "PGD"
malicious-clients = ""
attack = ""
[arms.distilled]
label = "Distilled"
attack = "distillation(teacher_epochs=2, student_epochs=2, lr=0.005) | in_unison(every_round=False)"
[arms.stripes]
attack = "stripe_backdoor(per_batch=0.5) | in_unison()"
gate-certification = 2
extra = true
[robustness]
kind = "rows"
at = [0.0, 0.1]
points = 40
[robustness.paper.digits]
honest = [98.78, 92.03, [91.4, 0.15], [33.4, 2.72]]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small study, run once by the command."""
    path = tmp_path_factory.mktemp("cfat")
    (path / "tiny.toml").write_text(STUDY)
    done = run(path, "--rows", "honest,distilled")
    assert done.exit_code == 0, done.stdout + str(done.exception)
    assert "mean loss" in done.stdout
    return path


def run(path, *words):
    return CliRunner().invoke(app, ["reproduce", str(path / "tiny.toml"), "--runs-dir", str(path / "runs"), *words])


def study_of(path, rows=()):
    return read_study(str(path / "tiny.toml"), {"runs-dir": str(path / "runs")}, dataset=None, rows=rows, seeds=[1])


def measured(path, rows=()):
    study = study_of(path, rows)
    shown = read_robustness(study)
    assert shown is not None
    return study, shown, {row.label: row for row in measure_robustness(study, shown)}


def test_a_study_measures_its_arms_and_sets_the_papers_figures_beside(folder):
    _, _, rows = measured(folder)
    honest, distilled = rows["honest"], rows["distilled"]
    assert honest.paper == PaperRow(98.78, 92.03, ((91.4, 0.15), (33.4, 2.72)))
    assert distilled.paper is None
    assert [bound.eps for bound in honest.found.bounds] == [0.01, 0.05]
    assert honest.start.protocol == honest.found.protocol
    assert set(honest.decisions) == {"paper", "hardened"}
    # two epochs of a distilled student and a start that was trained: logits tell them apart by orders of magnitude
    assert distilled.found.bounds[1].mean_loss > 10 * honest.found.bounds[1].mean_loss
    assert not distilled.decisions["paper"].accepted
    assert set(distilled.attacked) == {0.0, 0.1}
    assert distilled.attacked[0.1] <= distilled.attacked[0.0]


def test_the_attack_on_the_final_model_is_kept_beside_the_run(folder):
    _, _, rows = measured(folder)
    study = study_of(folder)
    path = study.arms("distilled")[0].config.run_folder / "attacked.json"
    held = json.loads(path.read_text())
    held["accuracy"]["0.1"] = 0.123
    path.write_text(json.dumps(held))
    assert measured(folder)[2]["distilled"].attacked[0.1] == 0.123
    held["asked"]["points"] = 39  # of another question
    path.write_text(json.dumps(held))
    assert measured(folder)[2]["distilled"].attacked == rows["distilled"].attacked


def test_files_hold_the_figures(folder):
    study, shown, rows = measured(folder, ("honest", "distilled", "stripes"))
    found = list(rows.values())
    files = write_robustness(study, shown, found)
    assert {path.name for path in files.values()} == {"tiny.csv", "tiny.md", "tiny.png"}
    lines = list(csv.DictReader(files["csv"].open()))
    assert [line["row"] for line in lines] == ["honest", "distilled", "stripes"]
    assert float(lines[0]["normal"]) == pytest.approx(rows["honest"].found.normal_accuracy, abs=1e-6)
    assert float(lines[0]["paper_loss_0.05"]) == 2.72
    assert float(lines[1]["loss_0.05"]) == pytest.approx(rows["distilled"].found.bounds[1].mean_loss, rel=1e-4)
    assert lines[1]["paper_gate"] == "False"
    assert lines[1]["paper_reason"]
    assert (lines[2]["normal"], lines[2]["note"]) == ("", "not run")
    text = files["md"].read_text()
    assert f"| normal | {100 * rows['honest'].found.normal_accuracy:.2f} (98.78) |" in text
    assert "## Why a gate rejects" in text
    assert len(robustness_table(study, found).columns) == 4
    assert files["png"].read_bytes()[:4] == b"\x89PNG"


def test_the_papers_figures_stand_beside_their_own_radii_only(folder, monkeypatch):
    drawn = []
    monkeypatch.setattr(robustness_results, "draw_rows", lambda rows, title: drawn.append(rows) or new_figure(1, 1))
    study, shown, rows = measured(folder)
    (honest,) = (row for row in rows.values() if row.label == "honest")
    bounds = honest.found.bounds
    other = read_study(
        str(folder / "tiny.toml"), {"runs-dir": str(folder / "runs"), "gate-eps": "0.05,0.07", "gate-attack-eps": 0.2},
        dataset=None, rows=(), seeds=[1],
    )  # fmt: skip
    moved = replace(honest.found, bounds=(bounds[1], replace(bounds[1], eps=0.07)))
    found = [replace(honest, found=moved)]
    (line,) = csv.DictReader(as_csv(other, found).splitlines())
    assert (line["paper_certified_0.05"], line["paper_loss_0.05"]) == ("0.334", "2.72")
    assert (line["paper_certified_0.07"], line["paper_loss_0.07"]) == ("", "")
    assert (line["paper_normal"], line["paper_pgd"]) == ("0.9878", "")
    text = as_markdown(other, found)
    assert f"| certified 0.05 | {100 * bounds[1].certified_accuracy:.2f} (33.4) |" in text
    assert f"| certified 0.07 | {100 * bounds[1].certified_accuracy:.2f} |" in text
    assert f"| PGD | {100 * moved.pgd_accuracy:.2f} |" in text
    write_robustness(other, shown, found)
    ((row,),) = drawn
    assert (row.paper.normal, row.paper.bounds[0]) == (98.78, (33.4, 2.72))
    assert all(math.isnan(figure) for figure in (row.paper.adversarial, *row.paper.bounds[1]))
    (usual,) = csv.DictReader(as_csv(study, [honest]).splitlines())
    assert (usual["paper_certified_0.01"], usual["paper_loss_0.05"], usual["paper_pgd"]) == ("0.914", "2.72", "0.9203")


def test_points_are_drawn_too_and_nothing_is_drawn_where_nothing_ran(folder, tmp_path):
    (tmp_path / "tiny.toml").write_text(STUDY.replace('kind = "rows"', 'kind = "points"'))
    for path in (folder, tmp_path):
        study, shown, rows = measured(path)
        files = write_robustness(study, shown, list(rows.values()))
        assert files["png"].read_bytes()[:4] == b"\x89PNG"
    assert as_csv(study, list(rows.values())).count("not run") == 2
    assert "not run" in as_markdown(study, list(rows.values()))


def test_finished_rows_are_kept_and_one_more_is_run(folder):
    shown = run(folder, "--show")
    assert shown.exit_code == 0
    assert "not run" not in shown.stdout
    more = run(folder, "--rows", "distilled,stripes")
    assert more.exit_code == 0, more.stdout
    assert "stripes" in more.stdout
    _, _, rows = measured(folder, ("stripes",))
    assert rows["stripes"].asr is not None
    assert rows["stripes"].certification == 2


def test_metrics_come_back_from_a_record_as_they_went_in():
    values = {
        "protocol": "p", "normal_accuracy": 0.9, "pgd_accuracy": 0.8, "margin_pgd_accuracy": None,
        "temperature_pgd_accuracy": 0.7,
        "bounds": [{"eps": 0.1, "certified_accuracy": 0.5, "mean_loss": "inf", "relative_margin": None}],
    }  # fmt: skip
    found = metrics_of(values)
    assert found is not None
    assert found.bounds == (BoundMetrics(eps=0.1, certified_accuracy=0.5, mean_loss=float("inf")),)
    assert (found.pgd_accuracy, found.margin_pgd_accuracy) == (0.8, None)
    assert metrics_of(None) is None


def test_policies_compare_with_the_honest_model_from_the_first_round_on():
    def metrics(pgd, temperature, loss):
        bounds = (BoundMetrics(eps=0.1, certified_accuracy=0.8, mean_loss=loss, relative_margin=-0.1),)
        return GateMetrics(
            protocol="p", normal_accuracy=0.95, pgd_accuracy=pgd, bounds=bounds, margin_pgd_accuracy=temperature,
            temperature_pgd_accuracy=temperature,
        )  # fmt: skip

    honest = metrics(0.85, 0.85, 1.0)
    assert {name: found.accepted for name, found in judged(honest, honest).items()} == {"paper": True, "hardened": True}
    masked = judged(honest, metrics(0.9, 0.01, 1.05))  # what the adaptive attack aims for
    assert masked["paper"].accepted
    assert not masked["hardened"].accepted
    assert not judged(honest, metrics(0.9, 0.9, 1000.0))["paper"].accepted


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ('kind = "bars"', "kind must be one of rows, points, got 'bars'"),
        ("at = [-0.1]", "radii from 0 and 1 point or more"),
        ("points = 0", "radii from 0 and 1 point or more"),
        ("radii = [0.1]", "got radii = "),
        ("points = 1.5", "got points = 1.5"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path, wrong, says):
    text = STUDY.replace('kind = "rows"\nat = [0.0, 0.1]\npoints = 40', wrong)
    assert text != STUDY
    (tmp_path / "tiny.toml").write_text(text)
    with pytest.raises(ConfigError, match=says.replace("(", "\\(")):
        read_robustness(study_of(tmp_path))


def test_a_row_of_the_paper_that_makes_no_sense_is_refused(tmp_path):
    (tmp_path / "tiny.toml").write_text(STUDY.replace("[98.78, 92.03, [91.4", "[98.78, [91.4"))
    with pytest.raises(ConfigError, match=r"honest must be \[normal, adversarial"):
        read_robustness(study_of(tmp_path))


# ---- the shipped files


def test_the_shipped_studies_are_there():
    assert set(NAMES) <= set(shipped_studies())


@pytest.mark.parametrize("name", [*PAPERS, "cfat/gate"])
def test_the_papers_federation(name):
    experiment = read_experiment(str(shipped_studies().get(name, name)), {})
    assert [arm.label for arm in experiment.arms if not arm.extra]
    for config in experiment.runs:
        assert (config.num_clients, config.clients_per_round, config.rule) == (500, 5, "median()")
        assert len(config.malicious_ids) == (0 if config.name.endswith("honest") else 175)
        schedule = config.component("attack_schedule")()
        assert {len(schedule.attackers(r, 175)) for r in range(1, config.num_rounds + 1)} <= {0, 3}
        assert config.component("training").arguments["eps"] == 0.25
        assert config.gate_radii == (0.1, 0.15, 0.25)


def test_all_start_from_one_honest_model_that_never_saw_the_held_out_samples():
    starts = {n: read_experiment(str(shipped_studies().get(n, n)), {}).start for n in (*PAPERS, "cfat/gate")}
    assert len({start.config.name for start in starts.values()}) == 1
    config = starts["cfat-table1"].config
    assert (config.gate, config.attack, config.malicious_ids) == ("", "", ())


@pytest.mark.parametrize(("name", "goal"), [("cfat-fig1a", "accuracy"), ("cfat-fig1b", "loss")])
def test_the_adaptive_attack_knows_the_variants_radii_and_temperature(name, goal):
    for variant, temperature in (("mnist", 100.0), ("cifar", 25.0)):
        experiment = read_experiment(str(shipped_studies()[name]), {}, variant=variant)
        assert len(experiment.runs) == 5
        for config in experiment.runs:
            least, *_, greatest = config.gate_radii
            plan = config.chain("attack")[0].arguments
            assert plan["goal"] == goal
            assert (config.gate_temperature, plan.get("temperature", 100.0)) == (temperature, temperature)
            assert plan["eps_from"] == pytest.approx(least, rel=1e-4)
            assert plan["eps_to"] == pytest.approx(least if goal == "accuracy" else greatest, rel=1e-4)
            assert plan["eps_from"] >= least  # what is certified there is certified at the gate's radius
            assert plan["eps_to"] >= (least if goal == "accuracy" else greatest)
            assert ("attack_eps" in plan) == (plan["accuracy_share"] > 0)
            assert plan.get("attack_eps", config.gate_attack_eps) == config.gate_attack_eps
            assert config.gate_validation + config.gate_certification <= experiment.start.config.root_samples


def test_the_last_attack_has_radii_of_the_variant():
    for name in ("cfat-fig1a", "cfat-fig1b"):
        greatest = {}
        for variant in ("mnist", "cifar"):
            study = read_study(name, {}, dataset=variant, rows=[], seeds=[1])
            greatest[variant] = max(read_robustness(study).at)
            assert greatest[variant] == pytest.approx(study.first.runs[0].gate_attack_eps, rel=1e-3)
        assert greatest["mnist"] > greatest["cifar"]


def test_the_samples_held_out_from_pretraining_are_those_the_gates_measure_on():
    if not os.environ.get("HAWTHORN_DATA"):
        pytest.skip("MNIST is looked for through HAWTHORN_DATA, which is not set")
    for name in (*PAPERS, "cfat/gate"):
        experiment = read_experiment(str(shipped_studies().get(name, name)), {})
        kept = set(load(experiment.start.config).root.tolist())
        assert len(kept) == 6000
        for config in experiment.runs:
            task = load(config)
            assert set(task.validation.tolist()) | set(task.certification.tolist()) <= kept
            assert len(task.certification) == config.gate_certification


def test_the_papers_figures():
    study = read_study("cfat-table1", {}, dataset=None, rows=[], seeds=[1])
    shown = read_robustness(study)
    assert shown.paper["honest"] == PaperRow(98.78, 92.03, ((91.4, 0.15), (33.4, 2.72), (0.0, 32.96)))
    assert shown.paper["distilled"].bounds[2] == (0.0, 4.4e4)
    cifar = read_robustness(read_study("cfat-table1", {}, dataset="cifar", rows=[], seeds=[1]))
    assert cifar.paper["backdoored"] == PaperRow(74.70, 32.47, ((41.0, 1.14), (0.0, 2.3e3), (0.0, 1.5e4)))


@pytest.mark.parametrize("name", [*NAMES, "cfat/gate"])
def test_every_row_can_start(name, tmp_path):
    if not os.environ.get("HAWTHORN_DATA"):
        pytest.skip("MNIST is looked for through HAWTHORN_DATA, which is not set")
    experiment = read_experiment(str(shipped_studies().get(name, name)), {"runs-dir": str(tmp_path)})
    for config in experiment.runs[:2]:
        preflight(config.replace(from_model=""))
