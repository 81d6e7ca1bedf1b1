"""The run record: read back what was written, and lose nothing at a kill between any two writes."""

import dataclasses
import json
import os

import pytest
import torch

from server.record import RoundRecord, read_model, read_run, read_updates
from server.writer import RunWriter, set_aside
from tasks.errors import ConfigError, RecordError
from tasks.params import Layout

LAYOUT = Layout(("w", "b"), ((2, 2), (2,)), 6)


def record(number: int, **changes) -> RoundRecord:
    fields = {
        "round": number,
        "acc": 0.5 + number / 100,
        "asr": None,
        "seconds": 0.1,
        "sampled": [0, 1],
        "malicious": [1],
        "attacking": [1],
        "clients": [0],
        "dropped": {"1": "values are not finite"},
        "weights": [1.0],
        "norms": [0.3],
        "aggregate_norm": 0.3,
        "model_norm": 1.0,
        "skipped": None,
        "sha256": "00",
    }
    return RoundRecord(**{**fields, **changes})


def write(config, last=3, **changes):
    config = config.replace(**changes) if changes else config
    writer = RunWriter.create(config, LAYOUT)
    for number in range(1, last + 1):
        writer.write_round(record(number), torch.full((6,), float(number)), ([0], torch.full((1, 6), float(number))))
    return writer, config


def test_read_back(config):
    writer, config = write(config, keep_updates=True, keep_models=2)
    writer.finish(torch.full((6,), 3.0), sha256="ab")
    writer.close()
    run = read_run(config.run_folder)
    assert run.config == config
    assert run.status == "finished"
    assert run.rounds == [record(n) for n in (1, 2, 3)]
    assert run.final == record(3)
    assert run.facts["sha256"] == "ab"
    assert read_model(config.run_folder / "model.safetensors", LAYOUT).tolist() == [3.0] * 6
    assert read_model(config.run_folder / "models/round-00002.safetensors", LAYOUT).tolist() == [2.0] * 6
    assert not (config.run_folder / "models/round-00001.safetensors").exists()
    clients, updates = read_updates(config.run_folder, 2)
    assert clients == [0]
    assert updates.tolist() == [[2.0] * 6]
    with pytest.raises(RecordError, match="--keep-updates"):
        read_updates(config.run_folder, 9)


@pytest.mark.parametrize("damage", ["nothing", "lost line", "half line", "extra half line"])
def test_resume_after_a_kill_between_two_writes(config, damage):
    writer, config = write(config)
    writer.close()
    path = config.run_folder / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(
        {
            "nothing": "".join(lines),
            "lost line": "".join(lines[:2]),
            "half line": "".join(lines[:2]) + lines[2][:30],
            "extra half line": "".join(lines) + '{"round": 4, "ac',
        }[damage]
    )
    writer, last, vector, _ = RunWriter.resume(config.replace(resume=True), LAYOUT)
    assert last == 3
    assert vector.tolist() == [3.0] * 6
    writer.write_round(record(4), torch.full((6,), 4.0), None)
    writer.close()
    assert [r.round for r in read_run(config.run_folder).rounds] == [1, 2, 3, 4]


def test_resume_before_the_first_round(config):
    write(config, last=0)[0].close()
    writer, last, vector, _ = RunWriter.resume(config, LAYOUT)
    writer.close()
    assert (last, vector) == (0, None)


def test_rounds_without_their_checkpoint_are_not_erased(config):
    write(config)[0].close()
    (config.run_folder / "checkpoint.safetensors").unlink()
    before = (config.run_folder / "rounds.jsonl").read_text()
    with pytest.raises(RecordError, match=r"checkpoint\.safetensors is missing, though 3 rounds are recorded"):
        RunWriter.resume(config.replace(resume=True), LAYOUT)
    assert (config.run_folder / "rounds.jsonl").read_text() == before
    RunWriter.create(config, LAYOUT).close()  # the folder is free again


def test_resume_refuses_another_experiment(config):
    write(config)[0].close()
    with pytest.raises(
        RecordError, match="cannot resume with rule = 'median\\(\\)': the run was started with 'mean\\(\\)'"
    ):
        RunWriter.resume(config.replace(rule="median()"), LAYOUT)
    RunWriter.resume(config.replace(num_rounds=9, workers=2), LAYOUT)[0].close()


def test_one_writer_at_a_time(config):
    writer, _ = write(config)
    with pytest.raises(RecordError, match="another process is writing"):
        RunWriter(config, LAYOUT)
    with pytest.raises(RecordError, match="another process is writing"):
        RunWriter.create(config, LAYOUT)  # would move the folder away under the first writer
    assert set(config.run_folder.parent.glob("earlier/*")) == set()
    writer.write_round(record(4), torch.full((6,), 4.0), None)
    writer.close()
    assert [r.round for r in read_run(config.run_folder).rounds] == [1, 2, 3, 4]
    RunWriter(config, LAYOUT).close()


def test_a_full_disk_says_so_and_keeps_finished_rounds(config, monkeypatch):
    writer, _ = write(config)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("server.writer.save_file", full)
    with pytest.raises(RecordError, match=r"No space left.*--resume"):
        writer.write_round(record(4), torch.full((6,), 4.0), None)
    writer.close()
    assert [r.round for r in read_run(config.run_folder).rounds] == [1, 2, 3]


def test_an_earlier_run_is_set_aside_not_overwritten(config):
    write(config)[0].close()
    write(config, last=1)[0].close()
    assert len(read_run(config.run_folder).rounds) == 1
    aside = config.run_folder.parent / "earlier" / "test.1"
    assert [r.round for r in RoundRecordLines(aside)] == [1, 2, 3]
    assert set_aside(config.run_folder.with_name("nothing")) is None


def RoundRecordLines(folder):
    return [RoundRecord.from_json(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def test_errors_say_what_is_wrong(config, tmp_path):
    with pytest.raises(RecordError, match="no run folder"):
        read_run(tmp_path / "none")
    write(config)[0].close()
    path = config.run_folder / "run.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "schema": 99}))
    with pytest.raises(RecordError, match="schema 99; this version reads 1"):
        read_run(config.run_folder)
    path.write_text("{")
    with pytest.raises(RecordError, match="not valid JSON"):
        read_run(config.run_folder)
    with pytest.raises(RecordError, match=r"rounds\.jsonl"):
        RoundRecord.from_json("{}")


def test_unknown_fields_of_a_later_version_are_ignored():
    line = json.dumps({**dataclasses.asdict(record(1)), "later": 1})
    assert RoundRecord.from_json(line) == record(1)


def test_models_that_do_not_fit_say_why(config, tmp_path):
    writer, _ = write(config)
    writer.finish(torch.zeros(6))
    writer.close()
    other = Layout(("w", "c"), ((4, 1), (2,)), 6)
    with pytest.raises(
        ConfigError, match=r"b: wanted None, came \(2,\), c: wanted \(2,\), came None, w: wanted \(4, 1\)"
    ):
        read_model(config.run_folder / "model.safetensors", other)
    broken = config.replace(name="broken")
    writer = RunWriter.create(broken, LAYOUT)
    writer.finish(torch.tensor([1.0, float("nan"), 1, 1, 1, 1]))
    writer.close()
    with pytest.raises(ConfigError, match="not finite"):
        read_model(broken.run_folder / "model.safetensors", LAYOUT)
    (tmp_path / "junk.safetensors").write_bytes(os.urandom(100))
    with pytest.raises(ConfigError, match="cannot read model"):
        read_model(tmp_path / "junk.safetensors", LAYOUT)
