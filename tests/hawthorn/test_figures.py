"""Figures of a paper: read from an experiment file, run once for all curves, certified, compared, written."""

import csv
import dataclasses
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from certify.crfl.corollary import feature_radius
from certify.crfl.coupled import deviation, marginal_start_norm
from certify.crfl.divergence import divergence_budget_lower
from certify.crfl.training_record import TrainingRecord
from hawthorn.arms.run import run_arms
from hawthorn.cli import app
from hawthorn.experiment import read_experiment
from hawthorn.preflight import preflight
from hawthorn.reproduce.by_rounds import radii_by_rounds
from hawthorn.reproduce.certified import WAYS, Found, certify_line
from hawthorn.reproduce.closeness import closeness
from hawthorn.reproduce.figure import Line, read_figure
from hawthorn.reproduce.figure_picture import draw_certified, draw_closeness
from hawthorn.reproduce.figure_results import measure, write_figure
from hawthorn.reproduce.figure_tables import radii_of, summary
from hawthorn.reproduce.study import read_study, shipped_studies
from server.crfl import model_file, read_training_record
from server.record import read_model
from tasks.errors import ConfigError, DataError, RecordError
from tasks.task import load

SETTINGS = """
title = "A small figure"
about = "Digits."
[settings]
name = "small"
num-clients = 5
num-rounds = 6
keep-models = 1
eval-every = 3
training = "sgd(lr=0.01, batch_size=50)"
transform = "crfl(rho=3.0, slope=0.1, sigma=0.02)"
malicious-clients = "0"
attack = "pattern_backdoor(target=0, places=((6, 6), (5, 7)), per_batch=5) | scale_update(factor=2.0)"
attack-schedule = "single_shot(rounds=(2,))"
[variants.plain]
dataset = "digits()"
[variants.other]
partition = "dirichlet(alpha=1.0)"
"""
CERTIFIED = (
    SETTINGS
    + """
[arms.default]
label = "one"
[arms.rfa]
label = "robust"
rule = "geometric_median()"
[arms.quiet]
label = "no noise"
transform = "crfl(rho=3.0, slope=0.1, sigma=0.0)"
[figure]
max-radius = 2.0
points = 60
draws = 300
legend = "what"
[figure.variants.other]
max-radius = 4.0
[figure.variants.other.curves.T3]
arm = "default"
label = "T = 3"
rounds = 3
[figure.variants.other.curves.T6]
arm = "default"
label = "T = 6"
"""
)
CLOSENESS = (
    SETTINGS
    + """
[arms.attacked]
[arms.scaled]
attack = "scale_update(factor=2.0)"
[arms.clean]
attack = ""
malicious-clients = ""
[figure]
kind = "closeness"
[figure.curves.scaled]
arm = "attacked"
clean = "scaled"
label = "against a scaling twin"
[figure.curves.clean]
arm = "attacked"
clean = "clean"
"""
)
ROUNDS = (
    SETTINGS
    + """
[arms.default]
[figure]
kind = "rounds"
pa = 0.8
pb = 0.15
last-round = 30
[figure.curves.twice]
arm = "default"
ratio = 2.0
[figure.curves.wide]
arm = "default"
ratio = 80
"""
)


def study_of(tmp_path, text, dataset="plain", rows=()):
    path = tmp_path / "small.toml"
    path.write_text(text)
    given = {"runs-dir": str(tmp_path / "runs"), "workers": 1}
    return read_study(str(path), given, dataset=dataset, rows=rows, seeds=[1])


def run_all(study):
    for label in study.rows:
        assert run_arms(study.arms(label))[label].status == "finished"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figure")
    study = study_of(folder, CERTIFIED)
    run_all(study)
    return study


def test_curves_are_arms_unless_the_file_says_otherwise(tmp_path):
    plain, other = study_of(tmp_path, CERTIFIED).figure, study_of(tmp_path, CERTIFIED, "other").figure
    assert plain is not None
    assert other is not None
    assert [(line.arm, line.label, line.draws, line.rounds) for line in plain.lines] == [
        ("default", "one", 300, 0),
        ("rfa", "robust", 300, 0),
        ("quiet", "no noise", 300, 0),
    ]
    assert [(line.arm, line.label, line.rounds) for line in other.lines] == [
        ("default", "T = 3", 3),
        ("default", "T = 6", 0),
    ]
    assert (plain.max_radius, other.max_radius, other.points) == (2.0, 4.0, 60)


def test_the_papers_radius_is_corollary_1_on_the_record(finished):
    """The largest radius there can be, every vote for one class, computed from the formula and the run's files."""
    folder = finished.arms("default")[0].config.run_folder
    found = certify_line(Line("x", "default", "x", draws=300), folder, 1, 60)
    record = TrainingRecord.load(folder / "crfl.json")
    margin = math.sqrt(math.log(1000) / 600)
    pa, pb = 1 - margin, margin
    eps = -math.log(1 - (math.sqrt(pa) - math.sqrt(pb)) ** 2)
    batches = [5 / 50] * 5 + [5 / 38]
    lipschitz = math.sqrt(2 + 2 * 3.2 + 3.2**2)
    wanted = math.sqrt(eps * 0.02**2 / 2) / (lipschitz * 0.2 * 2 * 0.01 * sum(batches))
    radii = found.ways["paper"].radii
    unanimous = [c.counts and max(c.counts) == 300 for c in found.ways["paper"].certificates]
    assert any(unanimous)
    assert radii[unanimous] == pytest.approx(wanted, rel=1e-6)
    assert radii.max() <= wanted * (1 + 1e-6)
    assert record.rounds[1].clip_norm == pytest.approx(3.2)
    assert {"labels", "law_of_votes"} <= set(found.ways["paper"].broken)
    assert found.ways["votes"].broken == found.ways["margin"].broken == ()


def test_an_earlier_round_of_a_run_is_a_run_of_its_own(finished, tmp_path):
    long = finished.arms("default")[0].config
    short = long.replace(runs_dir=str(tmp_path), num_rounds=3)
    assert run_arms([dataclasses.replace(finished.arms("default")[0], config=short)])["default"].status == "finished"
    ours = certify_line(Line("x", "d", "x", rounds=3, draws=200), long.run_folder, 1, 50)
    theirs = certify_line(Line("x", "d", "x", draws=200), short.run_folder, 1, 50)
    for way in WAYS:
        assert ours.ways[way].certificates == theirs.ways[way].certificates
        assert len(ours.ways[way].certificates) == 50
    assert ours.accuracy == theirs.accuracy


def test_what_has_no_certificate_says_why(finished):
    found = {each.line.arm: each for each in measure(finished)}
    assert found["rfa"].ways["votes"].problem.startswith("no sound certificate: fixed_weights")
    assert found["rfa"].ways["paper"].certificates
    assert "fixed_weights" in found["rfa"].ways["paper"].broken
    assert found["quiet"].ways["paper"].problem == "no noise was added, so there are no votes"
    assert found["quiet"].ways["margin"].certificates


def test_the_files_hold_the_curves(finished):
    found = measure(finished)
    files = write_figure(finished, found)
    assert {path.name for path in files.values()} == {"small.csv", "small.md", "small.png"}
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    rows = list(csv.DictReader(files["csv"].open()))
    mine = [row for row in rows if row["curve"] == "default" and row["certificate"] == "paper"]
    assert len(mine) == 101
    assert [float(mine[place]["radius"]) for place in (0, 100)] == [0.0, 2.0]
    paper = found[0].ways["paper"]
    for row in mine:
        assert float(row["certified_rate"]) == pytest.approx(np.mean(paper.radii >= float(row["radius"])), abs=1e-5)
        right = [c.label == label for c, label in zip(paper.certificates, found[0].labels)]
        share = np.mean((paper.radii >= float(row["radius"])) & np.array(right))
        assert float(row["certified_accuracy"]) == pytest.approx(share, abs=1e-5)
    assert float(mine[0]["certified_rate"]) == 1.0
    assert next(row["note"] for row in rows if row["curve"] == "quiet" and row["certificate"] == "votes")
    text = files["md"].read_text()
    assert "| one | 1 | margin |" in text
    assert len(summary(finished, found)) == 9


def test_sound_certificates_hold_against_the_twin(finished, tmp_path):
    """The same run without poison: no prediction changes whose radius covers what the attacker did."""
    attacked = finished.arms("default")[0].config
    twin = attacked.replace(runs_dir=str(tmp_path), attack="scale_update(factor=2.0)")
    run_arms([dataclasses.replace(finished.arms("default")[0], config=twin)])
    found = certify_line(Line("x", "d", "x", draws=300), attacked.run_folder, 1, 0)
    task = load(attacked)
    inputs, _ = task.dataset.batch("test", slice(None))
    model = task.build_model()
    layout = task.layout
    vector = read_model(twin.run_folder / "model.safetensors", layout)
    model.load_state_dict(layout.split(vector))
    with torch.no_grad():
        clean = model(inputs).argmax(1).tolist()
    margin = found.ways["margin"]
    covered = [i for i, c in enumerate(margin.certificates) if c.label is not None and c.radius > 0.1]
    assert len(covered) > 20
    assert all(margin.certificates[i].label == clean[i] for i in covered)


def test_closeness_is_the_distance_of_kept_models(tmp_path):
    study = study_of(tmp_path, CLOSENESS)
    run_all(study)
    first, second = (study.arms(label)[0].config.run_folder for label in ("attacked", "scaled"))
    found = closeness(first, second)
    layout = load(study.first.runs[0]).layout
    assert [number for number, _ in found] == [1, 2, 3, 4, 5, 6]
    assert found[0][1] == 0.0  # before the attack the twins are one
    for number, distance in found:
        models = [read_model(model_file(folder, number, 6), layout).double() for folder in (first, second)]
        assert distance == pytest.approx(float((models[0] - models[1]).norm()))
    scaled, clean = (dict(each.rounds) for each in measure(study))
    assert 0 < scaled[2] < clean[2]  # a twin that does not scale is further away
    files = write_figure(study, measure(study))
    rows = list(csv.DictReader(files["csv"].open()))
    assert len(rows) == 12
    assert float(rows[1]["distance"]) == pytest.approx(found[1][1], rel=1e-6)


def test_the_coupled_bound_covers_the_twins_distance(tmp_path):
    """Delta of the sound certificate, from the record alone, is above what happened."""
    study = study_of(tmp_path, CLOSENESS, rows=("attacked", "scaled"))
    run_all(study)
    folder = study.arms("attacked")[0].config.run_folder
    record = read_training_record(folder)
    assert record.start_norm is not None
    bound = float(deviation(record, record.attacking, record.start_norm).upper(0.1))
    largest = max(distance for _, distance in closeness(folder, study.arms("scaled")[0].config.run_folder))
    assert 0 < largest <= bound


def test_radii_by_rounds_are_those_of_a_record_with_such_rounds(tmp_path, finished):
    """Figure 9(b) of the run: Corollary 1 shrinks by the clip's contraction, and nothing else, from round to round."""
    study = study_of(tmp_path, ROUNDS)
    run_all(study)
    twice, wide = measure(study)
    record = read_training_record(study.arms("default")[0].config.run_folder)
    budget = divergence_budget_lower(np.array([0.8]), np.array([0.15]))
    alone = dataclasses.replace(record, rounds=record.rounds[:2], smoothing_sigma=0.02)
    first = float(feature_radius(alone, budget)[0])
    assert [number for number, *_ in twice.radii] == list(range(2, 31))
    for number, printed, _ in twice.radii:
        assert printed == pytest.approx(first / math.erf(2 / math.sqrt(2)) ** ((number - 2) / 2), rel=1e-9)
    assert wide.radii[-1][1] == pytest.approx(first)  # at 80 sigma the paper's product is 1
    amplified = [radius for *_, radius in wide.radii]
    assert amplified[0] == 0.0  # flipped labels alone are more than one round's noise hides
    assert amplified == sorted(amplified)
    assert amplified[-1] > 0
    files = write_figure(study, [twice, wide])
    rows = list(csv.DictReader(files["csv"].open()))
    assert (len(rows), rows[0]["curve"], rows[-1]["rounds"]) == (58, "twice", "30")
    assert float(rows[1]["printed"]) == pytest.approx(twice.radii[1][1], rel=1e-8)
    assert "| wide | 1 | 30 |" in files["md"].read_text()
    assert files["png"].read_bytes()[:4] == b"\x89PNG"


def test_amplified_radii_are_where_the_deviation_meets_what_the_noise_of_all_rounds_hides(finished):
    record = read_training_record(finished.arms("default")[0].config.run_folder)
    *_, (last, _, amplified) = radii_by_rounds(record, 3.0, 0.8, 0.15, 40)
    attacked = dataclasses.replace(record.rounds[1], noise=0.02, model_norm=None)
    later = dataclasses.replace(attacked, clip_norm=0.06)
    shaped = dataclasses.replace(record, rounds=(record.rounds[0], attacked, *[later] * (last - 2)))
    variance, divergence = 0.02**2 * np.arange(1, 40), float(divergence_budget_lower(0.8, 0.15))
    contraction = math.erf(3 / math.sqrt(2)) ** np.arange(38, -1, -1)
    hidden = float(np.sqrt(2 * variance * divergence / contraction).max())
    moved = deviation(shaped, shaped.attacking, marginal_start_norm(shaped), any_training=True)
    assert amplified > 0
    assert float(moved.upper(amplified)) == pytest.approx(hidden, rel=1e-3)
    assert float(moved.upper(amplified)) <= hidden


def test_a_figure_of_rounds_says_what_is_missing(tmp_path, finished):
    study = study_of(tmp_path, ROUNDS)
    twice, wide = measure(study)
    assert (twice.problem, wide.problem) == ("not run", "not run")
    assert write_figure(study, [twice, wide])["png"].stat().st_size > 0
    quiet = read_training_record(finished.arms("quiet")[0].config.run_folder)
    with pytest.raises(RecordError, match="wants noise and rounds from 2 on"):
        radii_by_rounds(quiet, 2.0, 0.7, 0.1, 10)


def test_curves_that_ended_are_not_drawn_on_the_axis_and_the_dots_are_explained(finished):
    found = measure(finished)
    radii = {way: radii_of(finished, found, way) for way in WAYS}
    picture = draw_certified(found, radii, "title", "what")
    legend = [text.get_text() for text in picture.legends[0].get_texts()]
    assert legend == ["what: one", "what: robust", "what: no noise", "accuracy, nothing certified"]
    panel = picture.axes[0]
    for line, each in zip(panel.get_lines(), (e for e in found if e.ways["paper"].certificates)):
        heights = np.asarray(line.get_ydata(), dtype=float)
        drawn = heights[~np.isnan(heights)]
        assert (drawn[:-1] > 0).all()
        if each.ways["paper"].radii.max() < 2.0:
            assert drawn[-1] == 0
    said = [text.get_text() for axes in picture.axes for text in axes.texts]
    assert not any("every point abstains" in text for text in said)
    sure = dataclasses.replace(found[0].ways["votes"].certificates[0], label=None, radius=0.0)
    none = Found((sure,) * 60)
    abstaining = dataclasses.replace(found[0], ways={**found[0].ways, "votes": none})
    picture = draw_certified([abstaining], radii)
    assert [t.get_text() for axes in picture.axes for t in axes.texts].count("every point abstains") == 2


def test_logarithmic_axes_have_plain_numbers(tmp_path):
    study = study_of(tmp_path, CLOSENESS)
    run_all(study)
    picture = draw_closeness(measure(study))
    picture.draw_without_rendering()
    labels = [tick.get_text() for tick in picture.axes[0].get_yticklabels()]
    assert any(labels)
    assert not any("$" in label for label in labels)
    assert "seed" not in picture.legends[0].get_texts()[0].get_text()


def test_runs_that_are_no_twins_are_not_compared(tmp_path, finished):
    study = study_of(tmp_path, CLOSENESS.replace("[arms.scaled]", "[arms.scaled]\nserver-lr = 0.5"))
    run_all(study)
    attacked, scaled = measure(study)
    assert "no twins; they differ in server_lr" in attacked.problem
    assert not scaled.problem
    with pytest.raises(RecordError, match="no twins; they differ in rule"):
        closeness(*(finished.arms(label)[0].config.run_folder for label in ("default", "rfa")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ROUNDS.replace("ratio = 2.0", "ratio = 0.0"), "wants ratio, the clip norm in units of the noise"),
        (ROUNDS.replace("pb = 0.15", "pb = 0.9"), "wants pb < pa of sum 1 at most"),
        (CERTIFIED.replace("points = 60", "pionts = 60"), "no 'pionts'; it has: kind, max-radius"),
        (CERTIFIED.replace("points = 60", 'points = "all"'), "points must be a number from 0, got 'all'"),
        (CERTIFIED.replace("points = 60", 'kind = "map"'), "one of certified, closeness, .*got 'map'"),
        (CLOSENESS.replace('clean = "clean"', ""), "wants clean, one of the arms attacked, scaled, clean; got None"),
        (CLOSENESS.replace('arm = "attacked"\nclean = "scaled"', 'arm = "x"'), "wants arm, one of the arms"),
    ],
)
def test_a_wrong_table_is_refused(tmp_path, text, says):
    with pytest.raises(ConfigError, match=says):
        study_of(tmp_path, text)


def test_the_command_runs_keeps_and_shows_a_figure(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(CERTIFIED)

    def hawthorn(*words):
        return CliRunner().invoke(app, ["reproduce", "small.toml", *words])

    before = hawthorn("--show")
    assert before.exit_code == 0, before.output
    assert "not run" in before.stdout
    first = hawthorn("--rows", "default", "--jobs", "1")
    assert first.exit_code == 0, first.output
    assert "certifying one, seed 1" in first.stdout
    assert (tmp_path / "runs/small-plain/small.csv").exists()
    again = hawthorn("--rows", "default", "--jobs", "1")
    assert "1 of 1 runs are finished already" in again.stdout


FIGURES = [name for name in shipped_studies() if name.startswith("crfl")]


def variants():
    return [
        (name, variant)
        for name in FIGURES
        for variant in read_experiment(str(shipped_studies()[name]), {}, lenient=True).variants
    ]


def test_every_figure_is_there():
    numbers = {"crfl-fig2", "crfl-fig3", "crfl-fig4", "crfl-fig5", "crfl-fig6", "crfl-fig7", "crfl-fig8", "crfl-fig9a"}
    assert numbers | {"crfl-fig9b", "crfl-draws", "crfl-confidence", "crfl-attack-round"} == set(FIGURES)


def test_extra_arms_are_curves_where_they_are_asked_for():
    def curves(rows, dataset=None):
        study = read_study("crfl-fig6", {}, dataset=dataset, rows=rows, seeds=[1])
        return [line.arm for line in study.figure.lines]

    usual = [f"rfa-attackers={number}" for number in (1, 2, 3, 4)]
    assert curves([]) == usual
    assert curves(["all"]) == curves(["rfa-to-the-end"]) == [*usual, "rfa-to-the-end"]
    assert curves([], "loan") == usual[:3]
    assert curves([usual[3]], "loan") == usual


def test_the_papers_settings():
    for name, variant in variants():
        experiment = read_experiment(str(shipped_studies()[name]), {}, variant=variant)
        assert read_figure(shipped_studies()[name], experiment)
        for arm in experiment.arms:
            assert arm.config is not None
            assert arm.config.transform.startswith("crfl(")
            assert "magnitude=0.1" in arm.config.attack or name == "crfl-fig9a"
    mnist = {a.label: a.config for a in read_experiment(str(shipped_studies()["crfl-fig2"]), {}).arms}
    default = mnist["default"]
    assert default is not None
    assert (default.num_clients, default.num_rounds, default.training) == (20, 100, "sgd(lr=0.001, batch_size=100)")
    assert default.transform == "crfl(rho=2.0, slope=0.1, cap=15, sigma=0.01)"


def test_arms_of_one_name_are_one_run_in_all_figures():
    """They share a folder, so a figure that meant something else by a name would undo another's run."""
    seen = {}
    for name, variant in variants():
        for arm in read_experiment(str(shipped_studies()[name]), {}, variant=variant).arms:
            assert arm.config is not None
            assert seen.setdefault(arm.config.name, arm.config) == arm.config, (name, variant, arm.label)


@pytest.mark.parametrize("variant", ["mnist", "loan"])
def test_the_default_arm_can_start(variant, tmp_path):
    experiment = read_experiment(str(shipped_studies()["crfl-fig2"]), {"runs-dir": str(tmp_path)}, variant=variant)
    try:
        for arm in experiment.arms[:2]:
            assert arm.config is not None
            preflight(arm.config)
    except DataError as error:
        pytest.skip(str(error).splitlines()[0])
