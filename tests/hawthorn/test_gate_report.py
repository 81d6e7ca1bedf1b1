"""The report on a gate: its timeline, its decisions, and the quorum's arithmetic beside them."""

import dataclasses
import re

import pytest
import torch
from matplotlib import rc_context

from hawthorn.report import _curves, _gate, _style, write_report
from server.record import RoundRecord, read_run
from server.writer import RunWriter
from tasks.params import Layout

LAYOUT = Layout(("w",), ((2,),), 2)
MALICIOUS = {"malicious_clients": "0-2", "attack": "scale_update(factor=-5)"}


def entry(accepted=True, certified=0.8, loss=0.1, measured=True, **changes):
    """What a round's record holds of its gate."""
    bounds = [
        {"eps": 0.1, "certified_accuracy": certified, "mean_loss": loss, "relative_margin": None},
        {"eps": 0.2, "certified_accuracy": 0.0, "mean_loss": 9.0, "relative_margin": None},
    ]
    metrics = {
        "protocol": "p", "normal_accuracy": 0.95, "pgd_accuracy": 0.85, "bounds": bounds,
        "margin_pgd_accuracy": 0.84, "temperature_pgd_accuracy": None,
    }  # fmt: skip
    return {
        "accepted": accepted, "reasons": [], "notes": ["uninformative: nothing is certified at 0.2"], "limits": {},
        "metrics": metrics if measured else None, "num_accepted": 1, "seconds": 1.5, "where": "in process",
        "back_to": None,
    } | changes  # fmt: skip


def write(config, gates, attacking=(), **changes):
    """Write a run with one round per entry of `gates`."""
    config = config.replace(num_rounds=len(gates), gate="paper()" if any(gates) else "", **changes)
    writer = RunWriter.create(config, LAYOUT)
    writer.write_header(initial={"acc": 0.1, "gate": None}, facts={"dataset": "digits", "num_params": 2})
    for number, gate in enumerate(gates, start=1):
        bad = [0, 1, 2] if number in attacking else []
        record = RoundRecord(
            round=number, acc=0.9, asr=None, seconds=4.0, sampled=[0, 1, 2, 3], malicious=bad, attacking=bad,
            clients=[0, 1, 2, 3], dropped={}, weights=None, norms=[1.0] * 4, aggregate_norm=1.0, model_norm=1.0,
            skipped=None, sha256="0" * 64, seconds_train=1.0, gate=gate, seconds_gate=1.5 if gate else 0.0,
        )  # fmt: skip
        writer.write_round(record, torch.zeros(2), None)
    writer.write_header(status="finished")
    writer.close()
    return read_run(config.run_folder)


LOST = {"measured": False, "accepted": False, "reasons": ["unreachable: 127.0.0.1:1: UNAVAILABLE"], "notes": []}


@pytest.fixture
def gated(config):
    """Accepted, rejected in an attacked round, undecided, on trial, honest and rejected with numbers out of range."""
    rejected = entry(False, 0.1, 50.0, reasons=[f"reason {i}" for i in range(5)], back_to=1)
    odd = entry(False, "nan", "inf", reasons=["mean loss at 0.1 is inf"])
    trial = entry(None, measured=False, reasons=["taken on trial"], notes=[])
    return write(config, [entry(), rejected, entry(**LOST), trial, odd], attacking=(2,), **MALICIOUS)


def test_the_page_shows_the_gate(gated, tmp_path):
    page = write_report([gated], tmp_path / "page.html").read_text()
    assert "<h2>The gate</h2>" in page
    assert "How often attackers outnumber the honest" in page
    assert "unreachable: 127.0.0.1:1: UNAVAILABLE" in page
    assert page.count("uninformative: nothing is certified") == 1  # a note once, not in every round


def test_a_run_without_a_gate_and_attackers_has_neither(config, tmp_path):
    page = write_report([write(config, [None, None])], tmp_path / "page.html").read_text()
    assert "The gate" not in page
    assert "outnumber" not in page


def test_every_decision_is_a_line(gated):
    table = _gate.decisions(gated)
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    assert [row["verdict"] for row in rows.values()] == [
        "accepted", "rejected, back to 1", "no decision", "on trial", "rejected",
    ]  # fmt: skip
    assert rows["1"]["certified at 0.1, 0.2, %"] == "80.0, 0.0"
    assert rows["1"]["mean loss at 0.1, 0.2"] == "0.1, 9"
    assert rows["1"]["PGD on margin, temperature, %"] == "84.0"
    assert rows["2"]["reasons; notes"] == "reason 0; reason 1; reason 2; 2 more reasons in rounds.jsonl"
    assert rows["5"]["mean loss at 0.1, 0.2"] == "inf, 9"


def test_long_runs_list_what_was_not_accepted(config):
    run = write(config, [entry()] * 70 + [entry(False, reasons=["x"])])
    table = _gate.decisions(run)
    assert [row[0] for row in table.rows] == ["71"]
    assert table.note.startswith("70 accepted rounds are left out.")


def test_the_tally_counts_false_rejections_and_misses(gated, config):
    row = dict(zip(_gate.tally([gated]).head, _gate.tally([gated]).rows[0], strict=True))
    assert (row["accepted"], row["rejected"], row["undecided"], row["on trial"]) == ("1", "2", "1", "1")
    assert row["honest rounds rejected"] == "1 of 2"  # rounds 1 and 5 were decided, 3 was not, 4 is on trial
    assert row["attacked rounds accepted"] == "0 of 1"
    assert row["seconds a decision"] == "1.5"
    assert not _gate.tally([write(config.replace(name="none"), [None])]).rows


def test_the_timeline_marks_accepted_and_rejected(gated):
    with rc_context(_style.STYLE):
        figure = _gate.draw_gate(gated, "run")
    upper, lower = figure.axes
    assert lower.get_yscale() == "log"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert {"normal", "PGD", "margin-loss PGD", "certified at 0.1", "certified at 0.2"} <= set(names)
    normal, crosses = upper.lines[0], upper.lines[1]
    assert list(normal.get_xdata()) == [1]
    assert list(crosses.get_xdata()) == [2, 5]
    assert crosses.get_marker() == "X"
    certified = upper.lines[2 * names.index("certified at 0.1")]
    assert list(certified.get_ydata()) == [80.0]
    assert list(upper.lines[2 * names.index("certified at 0.1") + 1].get_xdata()) == [2]  # NaN has no place
    assert len(lower.patches) == 3  # rounds 2, 3 and 5 are shaded
    assert list(upper.lines[-1].get_xdata()) == [2]  # the attacked round


def test_a_gate_that_never_measured_has_no_timeline(config):
    assert _gate.draw_gate(write(config, [entry(**LOST)]), "run") is None


def test_the_given_model_is_round_0(config):
    run = write(config, [entry()])
    run = dataclasses.replace(run, initial={"acc": 0.1, "gate": entry(certified=0.5)})
    figure = _gate.draw_gate(run, "run")
    assert list(figure.axes[0].lines[0].get_xdata()) == [0, 1]


def test_quorum_beside_the_settings(gated, config):
    row = dict(zip(_gate.quorums([gated]).head, _gate.quorums([gated]).rows[0], strict=True))
    assert row["a round is dominated, %"] == "forced"  # continuous() puts its attackers into the round
    free = write(
        config.replace(name="free"),
        [entry()] * 3,
        (3,),
        attack_schedule="fixed_pool()",
        clients_per_round=4,
        **MALICIOUS,
    )
    row = dict(zip(_gate.quorums([free]).head, _gate.quorums([free]).rows[0], strict=True))
    assert (row["clients"], row["malicious"], row["sampled a round"], row["a median withstands"]) == (
        "6",
        "3",
        "4",
        "1",
    )
    assert row["a round is dominated, %"] == "80"  # 3 of 15 draws have one attacker only
    assert row["at least one round of the run, %"] == f"{100 * (1 - 0.2**3):.4g}"
    assert row["dominated rounds, expected"] == "2.4"
    assert (row["in fact"], row["of them attacked"]) == ("1 of 3", "1")


def test_time_has_the_gates_part(gated):
    with rc_context(_style.STYLE):
        figure = _curves.draw_seconds([gated])
    assert "gate" in [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_page_is_strict_html(gated, tmp_path):
    page = write_report([gated, gated], tmp_path / "page.html").read_text()
    assert not re.search(r"<script|https?://", page)
    assert page.count("Every decision of ") == 2
