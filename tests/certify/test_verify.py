"""Verification: what was made verifies, what was changed is found and named; radii against attacks on the model."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import stats

from certify.crfl.certificates import BrokenAssumption
from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.files import recipes
from certify.files.header import Header
from certify.files.lines import CertificateFile, read, write
from certify.files.make import make_file
from certify.files.settings import CrflSettings, VoteSettings, ZonotopeSettings
from certify.files.subject import Subject, from_run, load_record
from certify.linear import LinearModel
from certify.verify import Verdict, verify
from tasks import spec
from tasks.errors import RecordError
from tasks.model import build
from tasks.params import Layout, model_vector
from tasks.rng import generator
from tasks.source import DataSource

NUM = 24
TWO_STAGE = VoteSettings(sigma=0.05, num_draws=300, selection_draws=50, alpha=0.01, seed=5)
WAYS: dict[str, VoteSettings] = {
    "two_stage": TWO_STAGE,
    "joint": dataclasses.replace(TWO_STAGE, joint=True, interval="hoeffding"),
    "simultaneous": dataclasses.replace(TWO_STAGE, bound="simultaneous", selection_draws=0),
    "paper": dataclasses.replace(TWO_STAGE, bound="crfl_top_two", selection_draws=0, interval="hoeffding"),
    "exact": VoteSettings(way="exact", sigma=0.05),
    "margin": VoteSettings(way="margin"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a run's: a softmax regression trained on digits, and its training record."""
    folder = tmp_path_factory.mktemp("run")
    data = spec.resolve("dataset", "digits()")(DataSource.default())
    inputs, labels = data.batch("train", slice(0, 600))
    weight, bias = torch.zeros(10, 64, requires_grad=True), torch.zeros(10, requires_grad=True)
    for _ in range(60):
        loss = torch.nn.functional.cross_entropy(inputs.flatten(1) @ weight.T + bias, labels)
        steps = torch.autograd.grad(loss, (weight, bias))
        with torch.no_grad():
            weight -= 0.2 * steps[0]
            bias -= 0.2 * steps[1]
    save_file({"linear.weight": weight.detach(), "linear.bias": bias.detach()}, folder / "model.safetensors")
    settings = {"model": "logistic_regression()", "dataset": "digits()"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    training_record().save(folder / "crfl.json")
    return folder


def training_record(**entries: Any) -> TrainingRecord:
    each, rates = (0.1,) * 10, (0.001,) * 10
    work = RoundWork(participants=tuple(range(10)), weights=each, learning_rates=rates, clip_norm=5.0, noise=0.05)
    local = tuple(
        ClientWork(
            client=c, weight=0.1, learning_rate=0.001, batch_sizes=(50, 50), poisoned=(5, 5) if c == 0 else (0, 0)
        )
        for c in range(10)
    )
    known: dict[str, Any] = {
        "model": "logistic_regression()", "bias": True, "num_classes": 10, "num_params": 650, "num_clients": 10,
        "rounds": (work,) * 3, "smoothing_sigma": 0.05, "attack_round": 2, "attackers": (0,), "work": local,
        "label_flips": True, "data_norm_bound": 8.0, "data_norm_found": 6.5, "start_norm": 3.0,
    }  # fmt: skip
    return TrainingRecord(**known | entries)


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return from_run(folder, architecture=None, dataset=None, data_dir=None, num_points=NUM)


def made(subject: Subject, out: Path, settings: Any, **record: Any) -> CertificateFile:
    model, points = subject.sources(out)
    return make_file(Header(model=model, points=points, settings=settings, **record), subject, out)


def change(file: CertificateFile, number: int, alter: Callable[[dict[str, Any]], None]) -> Verdict:
    """Change one line of a file (1 is the header) and verify what is there then."""
    lines = file.path.read_text().splitlines()
    entries = json.loads(lines[number - 1])
    alter(entries)
    assert json.dumps(entries) != json.dumps(json.loads(lines[number - 1]))
    lines[number - 1] = json.dumps(entries)
    file.path.write_text("\n".join(lines) + "\n")
    return verify(read(file.path))


def named(verdict: Verdict) -> set[tuple[int, str]]:
    return {(finding.line, finding.what) for finding in verdict.findings}


# ---- what was made verifies


@pytest.mark.parametrize("way", WAYS)
def test_certificates_of_a_model_verify(way: str, subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", WAYS[way])
    assert sum(not certificate.abstained for certificate in file.certificates) > NUM / 2
    verdict = verify(file)
    assert verdict.good, verdict.findings
    assert verdict.num_recomputed == NUM
    assert all(certificate.sound == (way != "paper") for certificate in file.certificates)


@pytest.mark.parametrize("level", ["feature", "sample", "client"])
@pytest.mark.parametrize(("certificate", "way", "form"), [
    ("sound", "two_stage", None), ("sound", "simultaneous", "divergence"), ("sound", "margin", "margin"),
    ("sound", "exact", "neyman_pearson"), ("paper", "paper", None),
])  # fmt: skip
def test_crfl_certificates_verify(
    certificate: Any, way: str, form: Any, level: Any, subject: Subject, folder: Path, tmp_path: Path
) -> None:
    norm = 0.1 if certificate == "paper" and level != "feature" else None
    settings = CrflSettings(votes=WAYS[way], certificate=certificate, level=level, form=form, change_norm=norm)
    record: dict[str, Any] = {"record": training_record(), "record_file": str(folder / "crfl.json")}
    if certificate == "paper":
        with pytest.warns(BrokenAssumption):
            file = made(subject, tmp_path / "c.jsonl", settings, **record)
    else:
        file = made(subject, tmp_path / "c.jsonl", settings, **record)
    assert max(c.radius for c in file.certificates) > 0
    assert verify(file).good


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an untrained convolutional network on digits."""
    folder = tmp_path_factory.mktemp("network")
    model = build(spec.resolve("model", "cfat_mnist(padding=1)"), (1, 8, 8), 10, generator(3, "model"))
    arrays = {name: part.clone() for name, part in Layout.of(model).split(model_vector(model)).items()}
    save_file(arrays, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def bounds(network_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CertificateFile:
    """Return bounds of 40 points, some certified at the small radius, none at the large one."""
    known: dict[str, Any] = {"architecture": "cfat_mnist(padding=1)", "dataset": "digits()", "data_dir": None}
    subject = from_run(network_folder, **known, num_points=40)
    out = tmp_path_factory.mktemp("bounds") / "bounds.jsonl"
    return made(subject, out, ZonotopeSettings(eps=(1e-4, 0.2), method="interval"))


@pytest.fixture
def copy(bounds: CertificateFile, network_folder: Path, tmp_path: Path) -> CertificateFile:
    """Return a copy that a test may change."""
    header = dataclasses.replace(
        bounds.header, model=dataclasses.replace(bounds.header.model, file=str(network_folder / "model.safetensors"))
    )
    write(tmp_path / "bounds.jsonl", header, bounds.certificates)
    return read(tmp_path / "bounds.jsonl")


def test_bounds_on_inputs_verify(copy: CertificateFile) -> None:
    certified = [certificate for certificate in copy.certificates if not certificate.abstained]
    assert 0 < len(certified) < 40
    assert {certificate.radius for certificate in certified} == {1e-4}
    verdict = verify(copy)
    assert verdict.good, verdict.findings
    assert verdict.num_recomputed == 80
    some = verify(copy, sample=3, seed=1)
    assert some.good
    assert some.num_recomputed == 6


@pytest.mark.parametrize("method", ["zonotope", "crown", "best"])
def test_other_relaxations_verify(method: Any, network_folder: Path, tmp_path: Path) -> None:
    known: dict[str, Any] = {"architecture": "cfat_mnist(padding=1)", "dataset": "digits()", "data_dir": None}
    subject = from_run(network_folder, **known, num_points=3)
    file = made(subject, tmp_path / "bounds.jsonl", ZonotopeSettings(eps=(0.005,), method=method))
    assert verify(file).good
    assert verify(file, sample=1).good  # other points in a batch, other roundings


# ---- what was changed is found


def certified(file: CertificateFile) -> int:
    """Return the line of the first certificate that claims something."""
    return next(n for n, c in enumerate(file.certificates, start=2) if not c.abstained and c.radius > 0)


TAMPERING: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "radius": (lambda c: c.update(radius=c["radius"] * 1.001), "radius"),
    "infinite radius": (lambda c: c.update(radius="inf"), "radius"),
    "label": (lambda c: c.update(label=(c["label"] + 1) % 10), "label"),
    "seed": (lambda c: c.update(seed=6), "seed"),
    "level": (lambda c: c.update(level="input"), "level"),
    "unit": (lambda c: c.update(unit="linf"), "unit"),
    "method": (lambda c: c.update(method="smooth/better"), "method"),
    "closed": (lambda c: c.update(closed=True), "closed"),
    "bound": (lambda c: c["bounds"].update(pa_lower=c["bounds"]["pa_lower"] + 1e-6), "pa_lower"),
    "infinite bound": (lambda c: c["bounds"].update(pb_upper="-inf"), "pb_upper"),
    "no bound": (lambda c: c["bounds"].pop("pb_upper"), "pb_upper"),
    "alpha": (lambda c: c["parameters"].update(alpha=1e-9), "parameter alpha"),
    "sigma": (lambda c: c["parameters"].update(sigma=0.5), "parameter sigma"),
    "new parameter": (lambda c: c["parameters"].update(proof="yes"), "parameter proof"),
    "selection": (lambda c: c["parameters"]["selection_counts"].reverse(), "selection_counts"),
    "no selection": (lambda c: c["parameters"].pop("selection_counts"), "counts"),
    "assumption gone": (lambda c: c["assumptions"].pop(), "assumption confidence"),
    "assumption checked": (lambda c: c["assumptions"][0].update(status="checked"), "assumption classifier"),
    "assumption reworded": (lambda c: c["assumptions"][1].update(detail="never fails"), "assumption confidence"),
    "counts": (lambda c: c.update(counts=[*c["counts"][1:], c["counts"][0]]), "counts"),
    "counts short": (lambda c: c.update(counts=c["counts"][:9]), "counts"),
    "counts many": (lambda c: c.update(counts=[300] * 10), "counts"),
}


@pytest.mark.parametrize("name", TAMPERING)
def test_a_changed_certificate_is_found_and_named(name: str, subject: Subject, tmp_path: Path) -> None:
    alter, what = TAMPERING[name]
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    line = certified(file)
    verdict = change(file, line, alter)
    assert (line, what) in named(verdict)
    assert {finding.line for finding in verdict.findings} == {line}
    assert all(finding.point == line - 2 for finding in verdict.findings)


def test_counts_that_were_changed_with_all_that_follows_are_found(subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    better = np.zeros((1, 10), dtype=np.int64)
    better[0, 3] = 300
    drawn = recipes.Drawn(better, better.copy() // 6)
    forged = recipes.from_evidence(file.header, recipes.evidence(file.header, None, drawn), drawn, [7])
    kept = [c for c in file.certificates if c.sample != 7]
    write(file.path, file.header, [*kept, *forged])
    verdict = verify(read(file.path))
    assert named(verdict) == {(NUM + 1, "counts"), (NUM + 1, "selection_counts")}
    assert "[0, 0, 0, 300, 0" in str(verdict.findings[0])


def test_a_sample_recounts_some_points_and_still_follows_all_counts(subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    line = certified(file)
    assert verify(file, sample=5, seed=0).num_recomputed == 5
    change(file, line, lambda c: c.update(radius=9.0))
    found = [verify(read(file.path), sample=2, seed=seed) for seed in range(6)]
    assert all(named(verdict) == {(line, "radius")} for verdict in found)


@pytest.mark.parametrize("way", ["exact", "margin"])
def test_a_radius_that_nothing_was_drawn_for_is_checked_too(way: str, subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", WAYS[way])
    assert (5, "radius") in named(change(file, 5, lambda c: c.update(radius=c["radius"] + 0.01)))


ZONOTOPE_TAMPERING: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "margin": (lambda c: c["bounds"].update(margin_upper=-9.0), "margin_upper"),
    "infinite margin": (lambda c: c["bounds"].update(margin_upper="-inf"), "margin_upper"),
    "clean margin": (lambda c: c["parameters"].update(clean_margin=-1.0), "parameter clean_margin"),
    "tolerance": (lambda c: c["parameters"].update(tolerance=0.0), "parameter tolerance"),
    "radius": (lambda c: c.update(radius=0.2), "radius"),
    "label": (lambda c: c.update(label=(c["label"] + 1) % 10), "label"),
    "open": (lambda c: c.update(closed=False), "closed"),
    "range": (lambda c: c["parameters"].update(input_range=[-9.0, 9.0]), "parameter input_range"),
    "asked label": (lambda c: c["parameters"].update(checked_label=77), "checked_label"),
    "assumption": (lambda c: c.update(assumptions=[]), "assumption rounding"),
}


@pytest.mark.parametrize("name", ZONOTOPE_TAMPERING)
def test_a_changed_bound_is_found_and_named(name: str, copy: CertificateFile) -> None:
    alter, what = ZONOTOPE_TAMPERING[name]
    line = certified(copy)
    assert (line, what) in named(change(copy, line, alter))


def test_an_uncertified_point_cannot_be_called_certified(copy: CertificateFile) -> None:
    line = next(n for n, c in enumerate(copy.certificates, start=2) if c.abstained and c.parameters["eps"] == 0.2)
    label = copy.true_label(copy.certificates[line - 2])
    verdict = change(copy, line, lambda c: c.update(label=label, radius=0.2))
    assert {(line, "label"), (line, "radius")} <= named(verdict)
    # consistent in itself: found where the point is recomputed
    verdict = change(
        copy, line, lambda c: (c["bounds"].update(margin_upper=-1.0), c["parameters"].update(clean_margin=1.0))
    )
    assert {(line, "margin_upper"), (line, "label"), (line, "radius")} <= named(verdict)


def test_another_model_is_found(subject: Subject, folder: Path, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    arrays = load_file(folder / "model.safetensors")
    arrays["linear.bias"][3] += 1e-3
    save_file(arrays, tmp_path / "model.safetensors")
    verdict = verify(file, model_file=tmp_path / "model.safetensors")
    assert named(verdict) == {(1, "model sha256")}
    assert verdict.num_recomputed == 0


def test_other_points_and_labels_are_found(subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    text = file.path.read_text()
    assert (1, "data sha256") in named(change(file, 1, lambda h: h["points"]["indices"].reverse()))
    file.path.write_text(text)
    verdict = change(file, 1, lambda h: h["points"]["labels"].__setitem__(2, (h["points"]["labels"][2] + 1) % 10))
    assert named(verdict) == {(1, "the true label")}
    assert verdict.findings[0].point == 2


def test_missing_certificates_are_found(subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    write(file.path, file.header, file.certificates[3:])
    verdict = verify(read(file.path))
    assert named(verdict) == {(1, "the number of certificates")}
    assert verdict.num_recomputed == NUM - 3


def test_a_training_record_that_is_not_the_runs_is_found(subject: Subject, folder: Path, tmp_path: Path) -> None:
    weaker = training_record(work=tuple(dataclasses.replace(w, poisoned=(w.poisoned[0] // 5,) * 2) for w in WORK))
    record: dict[str, Any] = {"record": weaker, "record_file": str(folder / "crfl.json")}
    file = made(subject, tmp_path / "c.jsonl", CrflSettings(votes=WAYS["margin"], form="margin"), **record)
    verdict = verify(file)
    assert named(verdict) == {(1, "the training record's work")}


@pytest.mark.parametrize("told", [None, "gone.json", "forged.json"])
def test_a_record_that_is_not_the_runs_own_is_a_finding(told: str | None, subject: Subject, tmp_path: Path) -> None:
    weak = training_record(label_flips=False, start_norm=0.0)
    weak.save(tmp_path / "forged.json")  # beside the certificates, as the file says
    bare = copy_of_model(subject, tmp_path / "model")
    known: dict[str, Any] = {"record": weak, "record_file": told}
    for place, finding in ((bare, "the training record"), (subject, "the training record's label_flips")):
        out = tmp_path / f"{finding[-5:]}.jsonl"
        file = made(place, out, CrflSettings(votes=WAYS["margin"], form="margin"), **known)
        assert (1, finding) in named(verify(file))
    file = made(bare, tmp_path / "c.jsonl", CrflSettings(votes=WAYS["margin"], form="margin"), **known)
    allowed = verify(file, allow_unrecorded=True)
    assert allowed.good
    assert any("not compared" in note for note in allowed.notes)
    assert any(str(file.header.record_sha256) in note for note in allowed.notes)
    assert verify(file, record_file=tmp_path / "forged.json").good  # the verifier's own word for it
    assert not verify(file, record_file=subject.file.parent / "crfl.json").good


def copy_of_model(subject: Subject, folder: Path) -> Subject:
    """Return the subject with its model in a folder that has no training record."""
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(subject.file.read_bytes())
    return dataclasses.replace(subject, file=folder / "model.safetensors")


def test_a_record_of_another_model_or_with_too_short_a_norm_is_found(
    subject: Subject, folder: Path, tmp_path: Path
) -> None:
    for entries, what in (
        ({"model_sha256": "0" * 64}, "the training record's model"),
        ({"data_norm_bound": 0.01, "data_norm_found": 0.01}, "the training record's data_norm_bound"),
    ):
        record = training_record(**entries)
        record.save(tmp_path / "own.json")
        settings = CrflSettings(votes=WAYS["margin"], form="margin")
        file = made(subject, tmp_path / f"{what[-5:]}.jsonl", settings, record=training_record())
        write(file.path, dataclasses.replace(file.header, record=record), file.certificates)
        file = read(file.path)
        assert (1, what) in named(verify(file, record_file=tmp_path / "own.json"))


def test_the_hash_of_the_record_is_the_records(subject: Subject, folder: Path, tmp_path: Path) -> None:
    settings = CrflSettings(votes=WAYS["margin"], form="margin")
    file = made(subject, tmp_path / "c.jsonl", settings, record=training_record())
    text = file.path.read_text()
    file.path.write_text(text.replace(str(file.header.record_sha256), "0" * 64))
    with pytest.raises(RecordError, match="record_sha256"):
        read(file.path)


@pytest.mark.parametrize("way", ["exact", "margin"])
def test_votes_that_nobody_drew_are_found(way: str, subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", WAYS[way])
    text = file.path.read_text()
    assert (3, "counts") in named(change(file, 3, lambda c: c.update(counts=[300] + [0] * 9)))
    file.path.write_text(text)
    verdict = change(file, 3, lambda c: c["parameters"].update(selection_counts=[50] + [0] * 9))
    assert (3, "selection_counts") in named(verdict)


def test_votes_in_bounds_on_inputs_are_found(copy: CertificateFile) -> None:
    assert (4, "counts") in named(change(copy, 4, lambda c: c.update(counts=[1, 2])))
    assert (4, "selection_counts") in named(change(copy, 4, lambda c: c["parameters"].update(selection_counts=None)))


def test_a_selection_that_is_the_counts_again_is_found_even_in_a_sample(subject: Subject, tmp_path: Path) -> None:
    noisy = dataclasses.replace(TWO_STAGE, sigma=0.5, selection_draws=300)
    file = made(subject, tmp_path / "c.jsonl", noisy)
    assert (1, "the selection") not in named(verify(file, sample=1))
    certificates = [
        dataclasses.replace(c, parameters={**c.parameters, "selection_counts": c.counts}) for c in file.certificates
    ]
    write(file.path, file.header, certificates)
    assert (1, "the selection") in named(verify(read(file.path), sample=1))


def test_a_header_says_each_thing_once(subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", TWO_STAGE)
    text = file.path.read_text()
    file.path.write_text('{"versions":{"other":"1"},' + text[1:])
    with pytest.raises(RecordError, match=r"line 1: .*'versions'.* twice"):
        read(file.path)


@pytest.mark.parametrize("digits", [400, 5000])
def test_huge_integers_are_refused_with_their_line(digits: int, subject: Subject, folder: Path, tmp_path: Path) -> None:
    settings = CrflSettings(votes=WAYS["margin"], form="margin")
    file = made(subject, tmp_path / "c.jsonl", settings, record=training_record())
    text = file.path.read_text()
    for old in ('"sigma":0.0', '"smoothing_sigma": 0.05', '"smoothing_sigma":0.05'):
        if old in text:
            file.path.write_text(text.replace(old, old.split(":")[0] + ":1" + "0" * digits, 1))
            with pytest.raises(RecordError, match="line 1"):
                read(file.path)
    huge = (folder / "crfl.json").read_text().replace('"smoothing_sigma": 0.05', '"smoothing_sigma": 1' + "0" * digits)
    (tmp_path / "huge.json").write_text(huge)
    with pytest.raises(RecordError):
        load_record(tmp_path / "huge.json")


WORK = training_record().work


def test_a_record_that_no_longer_allows_the_claim_is_found(subject: Subject, folder: Path, tmp_path: Path) -> None:
    for settings in (CrflSettings(votes=WAYS["margin"], form="margin"), CrflSettings(votes=TWO_STAGE)):
        record: dict[str, Any] = {"record": training_record(), "record_file": str(folder / "crfl.json")}
        file = made(subject, tmp_path / f"{settings.votes.way}.jsonl", settings, **record)
        changed = dataclasses.replace(file.header, record=training_record(momentum=0.9))
        write(file.path, changed, file.certificates)
        verdict = verify(read(file.path))
        assert (1, "the training record's momentum") in named(verdict)
        assert any("plain_sgd" in finding.found for finding in verdict.findings)


# ---- what a radius says


def test_a_smoothed_radius_is_the_formula(subject: Subject, tmp_path: Path) -> None:
    for certificate in made(subject, tmp_path / "c.jsonl", TWO_STAGE).certificates:
        if certificate.abstained:
            continue
        lower = stats.beta.ppf(0.01, k := certificate.counts[certificate.label or 0], 300 - k + 1)
        gap = stats.norm.ppf(lower) - stats.norm.ppf(1 - lower)
        assert certificate.radius == pytest.approx(0.05 / 2 * gap, rel=1e-6)
        assert certificate.radius <= 0.05 / 2 * gap * (1 + 1e-9)


def test_no_shorter_change_of_the_model_changes_a_label_and_a_longer_one_does(subject: Subject, tmp_path: Path) -> None:
    file = made(subject, tmp_path / "c.jsonl", WAYS["margin"])
    model = LinearModel.from_network(subject.network)
    assert model.bias is not None
    lifted = np.hstack([model.design(subject.inputs), np.ones((NUM, 1))])
    weights = np.hstack([model.weight, model.bias[:, None]])
    for certificate, point in zip(file.certificates, lifted):
        top = weights @ point
        assert certificate.label == top.argmax()
        nearest = None
        for other in set(range(10)) - {certificate.label}:
            step = np.zeros_like(weights)
            step[certificate.label], step[other] = -point, point
            step *= certificate.radius / np.linalg.norm(step)
            assert ((weights + 0.999 * step) @ point).argmax() == certificate.label
            if ((weights + 1.001 * step) @ point).argmax() != certificate.label:
                nearest = other
        assert nearest is not None
    assert math.isfinite(max(c.radius for c in file.certificates))
