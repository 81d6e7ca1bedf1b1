"""The map of a grid: which figure is the worst, what has none, and the files that show it."""

import csv

import pytest

from hawthorn.arms.perform import How, Outcome
from hawthorn.arms.run import run_arms
from hawthorn.experiment import read_experiment
from hawthorn.heatmap import Cell, as_csv, cell_text, read_cells, tables, worst
from hawthorn.report.map_page import write_map

GRID = """
title = "Small <map>"
about = "What a rule keeps."
[settings]
num-clients = 5
num-rounds = 2
training = "sgd(lr=0.5, batch_size=32)"
[grid.rule]
mean = { rule = "mean()" }
krum = { rule = "krum(num_byzantine={f})" }
[grid.attack]
flip = { attack = "sign_flip(factor=20.0)" }
little = { attack = "gaussian_noise(std=0.0001, add=True)" }
typing = { attack = "no_such()" }
[grid.f]
0 = { attack = "" }
1 = { malicious-clients = "0" }
2 = { malicious-clients = "0-1" }
[map]
rows = "rule"
columns = "f"
worst = "attack"
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("map")
    (folder / "small.toml").write_text(GRID)
    experiment = read_experiment(str(folder / "small.toml"), {"runs-dir": str(folder)})
    return experiment, run_arms(experiment.arms, how=How(keep=True))


def test_cells_come_from_records_and_say_why_they_are_empty(done):
    experiment, outcomes = done
    cells = read_cells(experiment, outcomes)
    assert len(cells) == 18
    assert cells["krum", "flip", "2"].state == "undefined"
    assert "n >= 2f + 3 = 7" in cells["krum", "flip", "2"].error
    assert cells["mean", "typing", "1"].state == "failed"
    assert "unknown attack 'no_such'" in cells["mean", "typing", "1"].error
    assert cells["mean", "flip", "0"] == cells["mean", "typing", "0"]
    flip, little = cells["mean", "flip", "1"], cells["mean", "little", "1"]
    assert flip.rate is not None
    assert little.rate is not None
    assert flip.rate < little.rate
    krum = cells["krum", "flip", "1"]
    assert krum.rate is not None
    assert krum.rate > flip.rate


def test_the_worst_is_taken_over_what_there_is(done):
    experiment, outcomes = done
    cells = read_cells(experiment, outcomes)
    table, panels = tables(experiment, cells)
    assert table.cells["mean", "1"].rate == cells["mean", "flip", "1"].rate
    assert table.cells["mean", "1"].by == "flip"
    assert table.cells["mean", "1"].partial  # one attack could not be read
    assert table.cells["krum", "2"].state == "failed"  # undefined, but for the attack that cannot be read
    assert (table.cells["mean", "0"].by, table.cells["mean", "0"].partial) == ("", False)
    assert [panel.title for panel in panels] == ["mean", "krum"]
    assert panels[1].cells["little", "1"] == cells["krum", "little", "1"]


def test_worst_of_either_rate():
    cells = {"a": Cell("done", 0.25, run="1"), "b": Cell("done", 0.75, run="2"), "c": Cell("undefined")}
    assert (worst(cells, "acc").rate, worst(cells, "acc").by) == (0.25, "a")
    assert (worst(cells, "asr").rate, worst(cells, "asr").by) == (0.75, "b")
    assert not worst(cells, "acc").partial
    assert worst({"a": Cell("undefined", error="n >= 7")}, "acc") == Cell("undefined", error="n >= 7")
    assert worst({"a": Cell("undefined"), "b": Cell("failed", error="no")}, "acc").state == "failed"


def test_texts_of_cells():
    assert cell_text(Cell("done", 0.98765)) == "98.8"
    assert cell_text(Cell("done", 0.5, partial=True)) == "50.0*"
    assert cell_text(Cell("undefined")) == "–"
    assert cell_text(Cell("failed")) == "failed"
    assert cell_text(Cell("missing")) == "not run"


def test_files_hold_the_figures(done):
    experiment, outcomes = done
    files = write_map(experiment, outcomes)
    assert sorted(files) == ["grid.csv", "panels.png", "report.html", "worst.csv", "worst.png"]
    cells = read_cells(experiment, outcomes)
    rows = list(csv.DictReader(files["grid.csv"].open()))
    assert len(rows) == 18
    for row in rows:
        cell = cells[row["rule"], row["attack"], row["f"]]
        assert row["state"] == cell.state
        assert row["acc"] == ("" if cell.acc is None else f"{cell.acc:.6f}")
    found = {(row["rule"], row["f"]): row for row in csv.DictReader(files["worst.csv"].open())}
    assert found["mean", "1"]["attack"] == "flip"
    assert float(found["mean", "1"]["worst_acc"]) == pytest.approx(cells["mean", "flip", "1"].rate, abs=1e-6)
    page = files["report.html"].read_text()
    assert "Small &lt;map&gt;" in page
    assert page.count("data:image/png;base64,") == 2
    assert cell_text(cells["krum", "flip", "1"]) in page
    assert files["worst.png"].read_bytes()[:4] == b"\x89PNG"


def test_points_that_were_not_run_are_said_to_be_missing(done):
    experiment, _ = done
    nowhere = read_experiment(
        str(experiment.folder.parent / "small.toml"), {"runs-dir": str(experiment.folder / "none")}
    )
    text = as_csv(nowhere, read_cells(nowhere, {}))
    assert text.count(",missing,") == 2 * 3 + 2 * 2 * 2  # f = 0 under all attacks, f = 1 and 2 under those that exist
    outcome = {"mean+flip+f=1": Outcome("mean+flip+f=1", "failed", "its process ended")}
    assert "failed,,,small/mean+flip+f=1,its process ended" in as_csv(nowhere, read_cells(nowhere, outcome))
