"""The comparison of runs, from records written here."""

import csv
import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from hawthorn.compare import attacker_share, compare_rows, compare_table, shorten_spec
from server.record import RoundRecord, read_run
from server.writer import RunWriter
from tasks.params import Layout

LAYOUT = Layout(("w",), ((2,),), 2)
ATTACK = "patch_backdoor(target=2, size=(1, 4)) | scale_update(factor=10)"


def write(config, rounds: list[dict], *, status: str = "finished", **changes):
    config = config.replace(**{"num_rounds": len(rounds), **changes})
    writer = RunWriter.create(config, LAYOUT)
    for number, values in enumerate(rounds, start=1):
        fields = {
            "round": number,
            "acc": 0.9,
            "asr": None,
            "seconds": 2.0,
            "sampled": [0, 1, 2],
            "malicious": [],
            "attacking": [],
            "clients": [0, 1, 2],
            "dropped": {},
            "weights": None,
            "norms": [1.0] * len(values.get("clients", [0, 1, 2])),
            "aggregate_norm": 1.0,
            "model_norm": 1.0,
            "skipped": None,
            "sha256": f"{number:064d}",
        }
        writer.write_round(RoundRecord(**(fields | values)), torch.zeros(2), None)
    writer.write_header(status=status)
    writer.close()
    return read_run(config.run_folder)


def text(table, width: int = 160) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def attacked(**values) -> dict:
    return {"malicious": [1], "attacking": [1], "weights": [0.5, 0.25, 0.25], **values}


def test_a_row_has_the_numbers_of_its_run(config):
    rounds = [attacked(asr=0.1 * n, acc=0.5 + 0.01 * n) for n in range(12)]
    rounds[1] |= {"dropped": {"2": "values are not finite"}, "clients": [0, 1], "weights": [0.0, 1.0]}
    rounds[2] |= {"skipped": "too few", "weights": None}
    rounds[3] |= {"attacking": []}
    rounds[11] |= {"acc": None, "asr": None}
    (row,) = compare_rows([write(config, rounds, malicious_clients="1", attack=ATTACK)])
    assert (row["rounds"], row["num_rounds"], row["malicious"], row["clients"]) == (12, 12, 1, 6)
    assert (row["acc"], row["asr"]) == (pytest.approx(0.6), pytest.approx(1.0))  # of the last evaluated round
    assert (row["acc_min_last10"], row["acc_max_last10"]) == (pytest.approx(0.52), pytest.approx(0.6))
    assert (row["asr_min_last10"], row["asr_max_last10"]) == (pytest.approx(0.2), pytest.approx(1.0))
    assert row["attacker_share"] == pytest.approx((9 * 0.25 + 1.0) / 10)  # 12, less the skipped and the quiet round
    assert (row["dropped"], row["skipped"]) == (1, 1)
    assert row["seconds_per_round"] == pytest.approx(2.0)
    assert row["sha256"] == f"{12:064d}"
    assert row["attack"] == ATTACK


def test_a_run_without_rounds_has_no_numbers(config):
    run = write(config, [], status="running", num_rounds=5)
    (row,) = compare_rows([run])
    for key in ("acc", "asr", "acc_min_last10", "asr_max_last10", "attacker_share", "seconds_per_round", "sha256"):
        assert row[key] is None
    shown = text(compare_table([run]))
    assert "test (running)" in shown
    assert "0/5" in shown


def test_rows_go_into_json_and_csv(config):
    rows = compare_rows([write(config, [attacked()], malicious_clients="1", attack=ATTACK)])
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    buffer = StringIO()
    writer = csv.DictWriter(buffer, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    assert next(csv.DictReader(StringIO(buffer.getvalue())))["attack"] == ATTACK


def test_texts_that_all_runs_share_stand_in_the_title(config):
    runs = [write(config, [{}], name=f"run-{rule}", rule=f"{rule}()") for rule in ("mean", "median")]
    table = compare_table(runs)
    assert table.row_count == 2
    names = [column.header for column in table.columns]
    assert "rule" in names
    assert "dataset" not in names
    assert "dataset" in [column.header for column in compare_table(runs[:1]).columns]
    shown = text(table)
    assert "dataset: digits()" in shown
    assert "00000000" in shown
    assert f"{1:064d}" not in shown  # eight digits of it


def test_names_in_brackets_are_shown_not_read_as_markup(config):
    run = write(config, [{}], malicious_clients="1", attack="corrupt_reply(kinds=['red'])")
    assert "['red']" in text(compare_table([run]), 300)


def test_shares():
    assert attacker_share([4, 7], [0.75, 0.25], {7}) == 0.25
    assert attacker_share([4, 7], [1.5, 0.5], [7]) == 0.25  # weights need not sum to 1
    assert attacker_share([4, 7], [0.0, 0.0], {7}) is None
    assert attacker_share([4, 7], None, {7}) is None
    assert attacker_share([4], [1.0], {7}) == 0.0  # the attacker's reply was dropped


def test_long_texts_lose_their_arguments_first():
    assert shorten_spec("krum(num_byzantine=2)") == "krum(num_byzantine=2)"
    assert shorten_spec(ATTACK, 40) == "patch_backdoor | scale_update"
    assert shorten_spec(ATTACK, 10) == "patch_bac…"
