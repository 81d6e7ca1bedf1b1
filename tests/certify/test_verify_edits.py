"""Verification of files with one edited field: a finding or an error that says what is wrong, whatever was written.

Every field of the header, of its training record and of a certificate is replaced by values of other types, sizes and
signs. No edit may end in an error that was not raised on purpose, and none that changes a claim may verify.
"""

import contextlib
import copy
import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from certify.bounds import simultaneous
from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.files.header import Header, record_sha256
from certify.files.lines import CertificateFile, read
from certify.files.make import make_file
from certify.files.settings import MAX_DRAWS, CrflSettings, Settings, VoteSettings, ZonotopeSettings
from certify.files.subject import Subject, from_run
from certify.verify import Verdict, verify
from tasks.errors import CertificationError, HawthornError, RecordError

EDITS_PER_FILE = 60
VOTES = VoteSettings(sigma=0.05, num_draws=40, selection_draws=20, alpha=0.01, seed=5)
KINDS: dict[str, Settings] = {
    "sampled": VOTES,
    "exact": VoteSettings(way="exact", sigma=0.05),
    "margin": VoteSettings(way="margin"),
    "crfl": CrflSettings(votes=VOTES),
    "zonotope": ZonotopeSettings(eps=(0.001, 1.0), method="interval"),
}
Path_ = tuple[str | int, ...]
GONE, DEEP = object(), "<deep>"  # take the entry out; write 300 lists inside each other
VALUES: tuple[Any, ...] = (
    GONE, DEEP, None, True, False, 0, 1, -1, 1.0, 3.0, -0.0, -0.5, 1e308, 5e-324, 10**7, 10**18, 2**63, 10**30,
    -(10**30), 10**400, math.nan, math.inf, -math.inf, "", "1", "inf", "-inf", "nan", "\ud800", "\0", "x" * 5000, [],
    [[]], [None], [True], [10**30], {}, {"a": 1}, {"\ud800": 1},
)  # fmt: skip
CHANGES: tuple[Callable[[Any], Any], ...] = (
    lambda value: [value],
    lambda value: value * 2 if isinstance(value, int | float | str | list) else [value, value],
    lambda value: float(value) if type(value) is int else value,
    lambda value: int(value) if isinstance(value, bool | float) else str(value),
    lambda value: value == 1 if isinstance(value, int | float) else value,
    lambda value: -value if isinstance(value, int | float) else value,
    lambda value: value + 1 if isinstance(value, int | float) else value,
    lambda value: value[::-1] if isinstance(value, list) else value,
    lambda value: value[:-1] if isinstance(value, list | str) else value,
    lambda value: {**value, "new": 1} if isinstance(value, dict) else value,
    lambda value: {**value, "eps": 1} if isinstance(value, dict) else value,
)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Return 3 points and a softmax regression whose folder has a training record."""
    folder = tmp_path_factory.mktemp("run")
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) / 8
    save_file({"linear.weight": weight, "linear.bias": torch.zeros(10)}, folder / "model.safetensors")
    record().save(folder / "crfl.json")
    known: dict[str, Any] = {"architecture": "logistic_regression()", "dataset": "digits()", "data_dir": None}
    return from_run(folder, **known, num_points=3)


def record() -> TrainingRecord:
    shared: dict[str, Any] = {"weights": (0.5, 0.5), "learning_rates": (0.001, 0.001)}
    rounds = (RoundWork(participants=(0, 1), clip_norm=5.0, noise=0.05, **shared),) * 2
    work = tuple(
        ClientWork(client=c, weight=0.5, learning_rate=0.001, batch_sizes=(50,), poisoned=(5 * (c == 0),))
        for c in (0, 1)
    )
    return TrainingRecord(
        model="logistic_regression()", bias=True, num_classes=10, num_params=650, num_clients=2, rounds=rounds,
        smoothing_sigma=0.05, attack_round=1, attackers=(0,), work=work, label_flips=True, data_norm_bound=8.0,
        data_norm_found=6.5, start_norm=3.0,
    )  # fmt: skip


def made(subject: Subject, out: Path, settings: Settings) -> CertificateFile:
    model, points = subject.sources(out)
    known = {"record": record(), "record_file": "crfl.json"} if isinstance(settings, CrflSettings) else {}
    return make_file(Header(model=model, points=points, settings=settings, **known), subject, out)


def places(entries: Any, at: Path_ = ()) -> Iterator[Path_]:
    """Return every field, those inside others too, but of a long list the first two alone."""
    if at:
        yield at
    if isinstance(entries, dict):
        for name in entries:
            yield from places(entries[name], (*at, name))
    elif isinstance(entries, list):
        for number in range(min(len(entries), 2)):
            yield from places(entries[number], (*at, number))


def edited(entries: Any, at: Path_, new: Any) -> str:
    """Return the line with one field replaced by a value, or by what a function makes of it."""
    entries = copy.deepcopy(entries)
    inside = entries
    for step in at[:-1]:
        inside = inside[step]
    if new is GONE:
        del inside[at[-1]]
    else:
        inside[at[-1]] = new(inside[at[-1]]) if callable(new) else new
    if at[0] == "record" and isinstance(entries.get("record"), dict):
        with contextlib.suppress(HawthornError, ValueError, TypeError, ArithmeticError):  # no training record
            entries["record_sha256"] = record_sha256(TrainingRecord.from_json(json.dumps(entries["record"])))
    return json.dumps(entries).replace(f'"{DEEP}"', "[" * 300 + "]" * 300)


def judged(path: Path, sample: int | None = None) -> Verdict | HawthornError:
    """Return what the command would print; it must be text that can be printed."""
    try:
        verdict = verify(read(path), sample=sample)
    except HawthornError as error:
        str(error).encode()
        return error
    "\n".join([*verdict.lines(), *verdict.notes]).encode()
    return verdict


def claims(file: CertificateFile, whole: bool) -> tuple[Any, ...]:
    """Return what a file says: text that differs where anything does that a verification must see."""
    told = [json.loads(certificate.to_json()) for certificate in file.certificates]
    settings = file.header.settings
    for entries in told:
        entries["assumptions"].sort(key=str)
        entries["parameters"].pop("unstable", None)  # how often a sign was not proven: nothing is claimed of it
        if isinstance(settings, ZonotopeSettings) and not whole:  # of points that were not looked at
            entries["bounds"].clear()
            entries["parameters"]["tolerance"] = entries["parameters"]["clean_margin"] = None
    if isinstance(settings, VoteSettings) and settings.way != "sampled":  # nothing is drawn, so these have no effect
        settings = VoteSettings(way=settings.way, sigma=settings.sigma)
    header, text = file.header, re.sub(r"-0\.0\b", "0.0", json.dumps(told))  # the two zeros are equal
    return text, header.model.architecture, header.points, settings, header.record


def all_edits(lines: list[Any]) -> list[tuple[int, Path_, Any]]:
    """Return (line, field, edit), of the header and the first certificate."""
    return [(number, at, new) for number in (0, 1) for at in places(lines[number]) for new in (*VALUES, *CHANGES)]


@pytest.mark.parametrize("kind", KINDS)
def test_one_edited_field_is_a_finding_or_an_error(kind: str, subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", KINDS[kind])
    assert isinstance(verdict := judged(file.path), Verdict)
    assert verdict.good
    lines = file.path.read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    edits = all_edits(entries)
    drawn = random.Random(f"edits of {kind}")
    for number, at, new in drawn.sample(edits, EDITS_PER_FILE):
        changed = [*lines]
        changed[number] = edited(entries[number], at, new)
        file.path.write_text("\n".join(changed) + "\n")
        told = (kind, at, changed[number][:300])
        sample = drawn.choice((None, 1))
        outcome = judged(file.path, sample)
        if isinstance(outcome, Verdict) and outcome.good:
            assert claims(read(file.path), sample is None) == claims(file, sample is None), told


# What was verified, or ended in an error of its own, before it was found here: (kind, line, field, edit).
FOUND: tuple[tuple[str, int, Path_, Any], ...] = (
    ("sampled", 1, ("counts", 0), 10**30),
    ("sampled", 1, ("parameters", "selection_counts", 0), 10**30),
    ("sampled", 1, ("parameters", "selection_counts", 0), 2**63),
    ("sampled", 0, ("settings", "num_draws"), 10**7),  # nothing is drawn where all votes are of another number
    ("sampled", 0, ("settings", "selection_draws"), 10**7),
    ("sampled", 0, ("settings", "num_draws"), 10**30),
    ("sampled", 1, ("assumptions", 0, "name"), "\ud800"),
    ("crfl", 1, ("parameters", "scale", 0), 1),
    ("exact", 0, ("settings", "sigma"), 5e-324),
    ("margin", 0, ("kind",), []),
    ("margin", 0, ("kind",), {}),
    ("margin", 0, ("versions", "python"), "\ud800"),
    ("margin", 0, ("versions",), [["python", "3"]]),
    ("margin", 0, ("model", "file"), "x" * 5000),
    ("margin", 0, ("model", "architecture"), f"mlp(hidden=({10**15},))"),
    ("margin", 0, ("schema",), 2.0),
    ("zonotope", 1, ("parameters", "eps"), True),
    ("zonotope", 1, ("parameters", "unstable"), "none"),
    ("zonotope", 1, ("parameters", "input_range", 0), 0),
    ("zonotope", 1, ("parameters", "input_range"), [-9.0, 9.0]),
    ("zonotope", 1, ("assumptions",), []),
    ("zonotope", 1, ("method",), "zonotope/better"),
)


@pytest.mark.parametrize("sample", [None, 1])
@pytest.mark.parametrize("number", range(len(FOUND)))
def test_an_edit_that_was_once_let_through_is_told(
    number: int, sample: int | None, subject: Subject, tmp_path: Path
) -> None:
    kind, line, at, new = FOUND[number]
    file = made(subject, tmp_path / "c.jsonl", KINDS[kind])
    lines = file.path.read_text().splitlines()
    lines[line] = edited(json.loads(lines[line]), at, new)
    file.path.write_text("\n".join(lines) + "\n")
    outcome = judged(file.path, sample)
    assert isinstance(outcome, HawthornError) or not outcome.good


@pytest.mark.parametrize("eps", [1, True, "1.0", [1.0], None, 1.0])
def test_a_point_does_not_stand_twice_in_place_of_another(eps: Any, subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", ZonotopeSettings(eps=(1.0,), method="interval"))
    head, first, second, _ = file.path.read_text().splitlines()
    again = edited(json.loads(first), ("parameters", "eps"), eps)
    file.path.write_text("\n".join([head, first, second, again]) + "\n")
    with pytest.raises(RecordError, match=r"line 4: (eps must be one of|point 0 is there twice)"):
        read(file.path)


@pytest.mark.parametrize("kind", ["sampled", "margin"])
@pytest.mark.parametrize("sample", [0, 0.0, False, "0", None, [0]])
def test_votes_have_each_point_once_whatever_else_they_say(
    kind: str, sample: Any, subject: Subject, tmp_path: Path
) -> None:
    file = made(subject, tmp_path / "c.jsonl", KINDS[kind])
    head, first, second, _ = file.path.read_text().splitlines()
    again = {**json.loads(first), "sample": sample}
    again["parameters"]["eps"] = 0.5
    file.path.write_text("\n".join([head, first, second, json.dumps(again)]) + "\n")
    with pytest.raises(RecordError, match=r"line 4: .*(twice|sample must be)"):
        read(file.path)


def test_the_most_draws_are_those_of_the_bounds() -> None:
    counts = [[MAX_DRAWS, 0]]
    simultaneous(counts, MAX_DRAWS, 0.01)
    with pytest.raises(CertificationError):
        simultaneous(counts, MAX_DRAWS + 1, 0.01)
    for name in ("num_draws", "selection_draws"):
        with pytest.raises(CertificationError, match=f"{name} must be {MAX_DRAWS} at most"):
            dataclasses.replace(VOTES, **{name: MAX_DRAWS + 1})
