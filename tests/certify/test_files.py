"""Files of certificates: round trips, damage with its line, appending, interruptions that change nothing."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from certify.files import recipes
from certify.files.header import Header
from certify.files.lines import Appender, read, write
from certify.files.make import make_file
from certify.files.recipes import InterruptedWork
from certify.files.settings import CrflSettings, VoteSettings, ZonotopeSettings, read_entries, write_settings
from certify.files.subject import Subject, from_header, from_run
from tasks.errors import CertificationError, ConfigError, HawthornError, RecordError

VOTES = VoteSettings(sigma=0.05, num_draws=300, selection_draws=50, alpha=0.01, seed=5)
BOUNDS = ZonotopeSettings(eps=(0.01, 0.05), method="interval")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a run's, with a softmax regression on digits."""
    folder = tmp_path_factory.mktemp("run")
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) / 8
    save_file({"linear.weight": weight, "linear.bias": torch.zeros(10)}, folder / "model.safetensors")
    settings = {"model": "logistic_regression()", "dataset": "digits()"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    return folder


@pytest.fixture(scope="module")
def subject(model: Path) -> Subject:
    return from_run(model, architecture=None, dataset=None, data_dir=None, num_points=20)


def header(subject: Subject, out: Path, settings: Any = VOTES) -> Header:
    model, points = subject.sources(out)
    return Header(model=model, points=points, settings=settings)


@pytest.fixture
def whole(subject: Subject, tmp_path: Path) -> Path:
    """Return a complete file of 20 certificates."""
    out = tmp_path / "votes.jsonl"
    make_file(header(subject, out), subject, out)
    return out


@pytest.mark.parametrize("settings", [VOTES, VoteSettings(way="margin"), BOUNDS, CrflSettings(votes=VOTES)])
def test_settings_come_back_from_json(settings: Any) -> None:
    assert read_entries(type(settings), json.loads(json.dumps(write_settings(settings)))) == settings


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        (VoteSettings, {"way": "sampled", "sigma": -1.0, "num_draws": 10, "selection_draws": 5, "alpha": 0.1}),
        (VoteSettings, {"sigma": 0.1, "num_draws": 0, "selection_draws": 5, "alpha": 0.1}),
        (VoteSettings, {"sigma": 0.1, "num_draws": 10, "selection_draws": 0, "alpha": 0.1}),
        (VoteSettings, {"sigma": 0.1, "num_draws": 10, "selection_draws": 5, "alpha": 1.0}),
        (VoteSettings, {"sigma": 0.1, "num_draws": 10, "alpha": 0.1, "bound": "crfl_top_two"}),
        (VoteSettings, {"way": "margin", "sigma": 0.1}),
        (ZonotopeSettings, {"eps": ()}),
        (ZonotopeSettings, {"eps": (0.2, 0.1)}),
        (ZonotopeSettings, {"eps": (0.1,), "input_range": (1.0, 0.0)}),
    ],
)
def test_settings_that_make_no_sense_are_refused(kind: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(CertificationError, match="must be"):
        kind(**wrong)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": "0.1"}, "sigma must be float"),
        ({"num_draws": 3.5}, "num_draws must be int"),
        ({"joint": 1}, "joint must be bool"),
        ({"way": "guessed"}, "way must be sampled or exact or margin"),
        ({"extra": 1}, "unknown .'extra'"),
    ],
)
def test_settings_of_a_wrong_type_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CertificationError, match=message):
        read_entries(VoteSettings, {**write_settings(VOTES), **change})


def test_a_file_comes_back_as_it_was_written(whole: Path, tmp_path: Path) -> None:
    file = read(whole)
    assert len(file.certificates) == 20
    assert not file.missing
    again = tmp_path / "again.jsonl"
    write(again, file.header, file.certificates)
    assert again.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert file.header.points.indices == tuple(range(20))


def test_a_moved_pair_of_model_and_certificates_finds_itself(model: Path, whole: Path, tmp_path: Path) -> None:
    file = read(whole)
    subject = from_header(file.header, file.path)
    assert subject.network.sha256() == file.header.model.sha256
    (tmp_path / "deep" / "er").mkdir(parents=True)
    moved = whole.rename(tmp_path / "deep" / "er" / "votes.jsonl")
    with pytest.raises(RecordError, match="--model-file"):
        from_header(file.header, moved)
    found = from_header(file.header, moved, file=model)
    assert found.network.sha256() == file.header.model.sha256


def edit(number: int, change: Callable[[bytes], bytes]) -> Callable[[list[bytes]], list[bytes]]:
    """Return the damage of one line (from 1)."""
    return lambda lines: [change(line) if i == number else line for i, line in enumerate(lines, start=1)]


DAMAGE: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "bit": (edit(4, lambda line: line[:30] + b"\xff" + line[31:]), "line 4: .*utf-8"),
    "half": (edit(7, lambda line: line[: len(line) // 2]), "line 7: a certificate is one line of JSON"),
    "blank": (edit(3, lambda line: b""), "line 3: a certificate is one line of JSON"),
    "model": (edit(5, lambda line: line.replace(b'"model_sha256":"', b'"model_sha256":"0')), "line 5: .*model_sha256"),
    "other model": (
        edit(5, lambda line: line.replace(line.split(b'"model_sha256":"')[1][:64], b"0" * 64)),
        "line 5: model_sha256 is 000",
    ),
    "other data": (
        edit(9, lambda line: line.replace(line.split(b'"data_sha256":"')[1][:64], b"1" * 64)),
        "line 9: data_sha256 is 111",
    ),
    "far": (edit(6, lambda line: line.replace(b'"sample":4', b'"sample":40')), "line 6: sample must be from 0 to 19"),
    "twice": (lambda lines: [*lines, lines[3]], "line 22: point 2 is there twice"),
    "deep": (edit(4, lambda line: b"[" * 100_000), "line 4: "),
    "NaN": (edit(4, lambda line: line.replace(b'"radius":', b'"radius":NaN,"r":')), "line 4: .*NaN"),
    "no header": (lambda lines: lines[1:], "line 1: the first line must be the header"),
    "header": (edit(1, lambda line: line.replace(b'"joint":false', b'"joint":0')), "line 1: .*joint must be bool"),
    "newer": (edit(1, lambda line: line.replace(b'"schema":2', b'"schema":3', 1)), "line 1: .*schema 2, got 3"),
    "labels": (edit(1, lambda line: line.replace(b'"labels":[', b'"labels":[3,')), "line 1: .*one label each"),
    "kind": (edit(1, lambda line: line.replace(b'"kind":"smooth"', b'"kind":"x"')), "line 1: .*kind 'x'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused_with_its_line(name: str, whole: Path) -> None:
    damage, message = DAMAGE[name]
    before = whole.read_bytes()
    lines = damage(before.splitlines())
    whole.write_bytes(b"".join(line + b"\n" for line in lines))
    assert whole.read_bytes() != before
    with pytest.raises(RecordError, match=f"votes.jsonl, {message}"):
        read(whole)


@pytest.mark.parametrize("kept", [0.1, 0.4, 0.77, 0.999])
def test_a_file_cut_anywhere_is_refused_or_known_to_be_incomplete(kept: float, whole: Path) -> None:
    content = whole.read_bytes()
    whole.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(RecordError, match=r"line \d+: cut off"):
        read(whole)
    whole.write_bytes(b"".join(content.splitlines(keepends=True)[:-2]))
    assert read(whole).missing == 2


def test_nothing_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="No such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RecordError, match="is empty"):
        read(tmp_path / "empty.jsonl")


def test_a_full_disk_leaves_the_earlier_file(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, before = read(whole), whole.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="disk is full"):
        write(whole, file.header, file.certificates[:3])
    assert whole.read_bytes() == before


def test_a_file_of_other_work_is_not_overwritten(whole: Path, subject: Subject) -> None:
    other = VoteSettings(sigma=0.06, num_draws=100, selection_draws=50, alpha=0.01)
    before = whole.read_bytes()
    with pytest.raises(RecordError, match="--force"):
        make_file(header(subject, whole, other), subject, whole)
    assert whole.read_bytes() == before
    assert make_file(header(subject, whole, other), subject, whole, force=True).header.settings == other


def test_appending_cuts_a_half_line_and_goes_on(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "bounds.jsonl"
    expected = make_file(header(subject, out, BOUNDS), subject, out).certificates
    content = out.read_bytes()
    out.write_bytes(content[: int(len(content) * 0.6)])
    with Appender(out, header(subject, out, BOUNDS)) as file:
        there = len(file.done)
        assert 0 < there < len(expected)
    assert out.read_bytes() == b"".join(content.splitlines(keepends=True)[: there + 1])
    assert make_file(header(subject, out, BOUNDS), subject, out).certificates == expected
    assert out.read_bytes() == content


def test_interrupted_bounds_go_on_to_the_same_file(subject: Subject, tmp_path: Path) -> None:
    plain, out = tmp_path / "plain.jsonl", tmp_path / "stopped.jsonl"
    make_file(header(subject, plain, BOUNDS), subject, plain)
    done: list[int] = []
    with pytest.raises(InterruptedWork, match="after 16 of 40"):
        make_file(
            header(subject, out, BOUNDS), subject, out,
            on_progress=lambda n, _: done.append(n), should_stop=lambda: bool(done),
        )  # fmt: skip
    assert read(out).missing == 24
    make_file(header(subject, out, BOUNDS), subject, out)
    assert out.read_bytes() == plain.read_bytes()


def test_interrupted_votes_go_on_to_the_same_file(whole: Path, subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "stopped.jsonl"
    done: list[int] = []
    with pytest.raises(InterruptedWork) as stopped:
        make_file(
            header(subject, out), subject, out,
            on_progress=lambda n, _: done.append(n), should_stop=lambda: bool(done),
        )  # fmt: skip
    assert stopped.value.votes is not None
    assert 0 < stopped.value.votes.num_draws < 300
    state = tmp_path / ".stopped.jsonl.votes"
    assert state.exists()
    assert not out.exists()
    again: list[int] = []
    make_file(header(subject, out), subject, out, on_progress=lambda n, _: again.append(n))
    assert again[0] > done[-1]  # what was counted is not counted again
    assert out.read_bytes() == whole.read_bytes()
    assert not state.exists()


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_state_of_votes_is_left_aside(content: bytes, whole: Path, subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "other.jsonl"
    (tmp_path / ".other.jsonl.votes").write_bytes(content)
    make_file(header(subject, out), subject, out)
    assert out.read_bytes() == whole.read_bytes()


def test_votes_of_some_points_are_those_among_all(subject: Subject) -> None:
    rows = [17, 3, 4]
    some, every = recipes.draw(VOTES, subject, rows), recipes.draw(VOTES, subject)
    assert some.selection is not None
    assert every.selection is not None
    assert (some.counts == every.counts[rows]).all()
    assert (some.selection == every.selection[rows]).all()
    assert (every.counts.sum(axis=1) == 300).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "cfat_mnist(padding=1)"}, r"is no cfat_mnist.*conv1.bias None, wanted \(16,\)"),
        ({"architecture": "logistic_regression(bias=False)"}, "linear.bias"),
        ({"architecture": "nothing()"}, "unknown model"),
        ({"dataset": "nothing()"}, "unknown dataset"),
        ({"num_points": 1000}, "has 359 test points"),
        ({"first": 400}, "has 359 test points"),
        ({"data_dir": "/nowhere/at/all"}, "does not exist"),
    ],
)
def test_a_subject_that_cannot_be_is_refused_with_a_reason(change: dict[str, Any], message: str, model: Path) -> None:
    known: dict[str, Any] = {"architecture": None, "dataset": None, "data_dir": None, "num_points": 5}
    with pytest.raises(HawthornError, match=message):
        from_run(model, **known | change)


def test_a_model_without_a_run_must_be_told_what_it_is(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "model.safetensors"
    bare.write_bytes((model / "model.safetensors").read_bytes())
    known: dict[str, Any] = {"data_dir": None, "num_points": 5}
    with pytest.raises(ConfigError, match="--model"):
        from_run(bare, architecture=None, dataset="digits()", **known)
    with pytest.raises(ConfigError, match="--dataset"):
        from_run(bare, architecture="logistic_regression()", dataset=None, **known)
    subject = from_run(bare, architecture="logistic_regression()", dataset="digits()", **known)
    assert subject.inputs.shape == (5, 1, 8, 8)
    bare.write_bytes(b"no model")
    with pytest.raises(RecordError, match="holds no model"):
        from_run(bare, architecture="logistic_regression()", dataset="digits()", **known)
