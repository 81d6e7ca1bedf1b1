"""Verifying a file of certificates: everything in it is made again, and what differs is named.

Four things are held against the file: the model and the points, by their hashes; the true labels; the counts, which
the seed gives bit by bit; and every entry of every certificate, which counts, settings and training record give.
Votes of some points cost nearly what the votes of all cost; bounds on inputs cost by the point, so of these a sample
can be chosen. Certificates outside the sample are still checked for what follows from their own entries.

A training record is where a CRFL certificate gets its strength from, so it is held against the run's own: the one that
the verifier names, or `crfl.json` in the folder of the model. A record that merely lies where the file says is the
file's word for itself, and counts, like none at all, as a finding. The norm that it promises of all training inputs
is held against the data set.

A bound or radius may differ in the last digits, as another build of the libraries rounds differently. What is not
checked: that a file claims what its reader wanted (its alpha, its level), that its seed was not chosen among many for
the votes it gives, and that the run's own training record is true: whoever can write the run's folder can write
another one. Its hash, which is told, can be compared with one that the run published.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from certify.crfl.certificates import BrokenAssumption
from certify.crfl.training_record import TrainingRecord
from certify.files import recipes
from certify.files.header import Header, versions
from certify.files.lines import CertificateFile, key_of
from certify.files.settings import ZonotopeSettings
from certify.files.subject import Subject, from_header, load_points, load_record
from certify.layers import run
from certify.record import Assumption, Certificate
from tasks.errors import CertificationError, HawthornError, RecordError
from tasks.rng import generator

_RELATIVE = 1e-9  # what another build may change in a bound made in float64
_ABSENT = object()
_MOST_BY_CHANCE = 5  # points whose two votes agree to the last one
_NUMBERS_OF_DRAWS = ("num_draws", "selection_draws")
_SINGLE = 1e5  # how much larger the tolerance of float32 is than that of float64, for zonotopes
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be: in which line (1 is the header), of which point, what."""

    line: int
    what: str
    stored: str
    found: str
    point: int | None = None  # index in the data set

    def __str__(self) -> str:
        where = f"line {self.line}" if self.point is None else f"line {self.line} (point {self.point})"
        return f"{where}: {self.what} is {self.stored}, recomputed {self.found}"


@dataclass(frozen=True)
class Verdict:
    """What was found, and how much was looked at."""

    findings: tuple[Finding, ...]
    num_certificates: int
    num_recomputed: int  # from the model itself; the others from their own entries
    notes: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """True where nothing was found."""
        return not self.findings

    def lines(self) -> list[str]:
        """Return the findings as text, those that differ by their line alone together."""
        groups: dict[tuple[str, str, str], list[Finding]] = {}
        for finding in self.findings:
            groups.setdefault((finding.what, finding.stored, finding.found), []).append(finding)
        texts = []
        for (what, stored, found), same in groups.items():
            where = f"lines {same[0].line} to {same[-1].line} ({len(same)} certificates)"
            alone = len(same) == 1 or same[0].line == same[-1].line
            texts.append(str(same[0]) if alone else f"{where}: {what} is {stored}, recomputed {found}")
        return texts


def verify(
    file: CertificateFile, *, sample: int | None = None, seed: int = 0, model_file: Path | None = None,
    architecture: str | None = None, record_file: Path | None = None, data_dir: str | None = None,
    device: str | None = None, on_progress: OnProgress | None = None, allow_unrecorded: bool = False,
) -> Verdict:  # fmt: skip
    """Recompute the certificates of `file`, or of `sample` points drawn with `seed`, and compare all entries.

    With `allow_unrecorded`, a training record that cannot be compared with the run's own is a note, not a finding.
    """
    findings: list[Finding] = []
    notes = _other_versions(file.header)
    if file.missing:
        wanted, there = file.header.num_certificates, len(file.certificates)
        findings.append(Finding(1, "the number of certificates", str(there), str(wanted)))
    subject = from_header(file.header, file.path, file=model_file, architecture=architecture, data_dir=data_dir)
    findings += _sources(file, subject)
    record_findings, record_notes = _record(file, record_file, subject, allow_unrecorded)
    record_findings += _data_norm(file, subject, data_dir) + _undrawn(file) + _copied(file)
    findings += record_findings
    if any(finding.line == 1 and finding.what in ("model sha256", "data sha256") for finding in findings):
        notes.append("model or data are others, so nothing was recomputed")
        return Verdict(tuple(findings), len(file.certificates), 0, (*notes, *record_notes))
    rows = _chosen(file, sample, seed)
    work = _zonotopes if isinstance(file.header.settings, ZonotopeSettings) else _votes
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # the header may say any sigma
        found, number = work(file, subject, rows, device, on_progress)
    return Verdict(tuple(findings + found), len(file.certificates), number, (*notes, *record_notes))


def _other_versions(header: Header) -> list[str]:
    here = versions()
    other = [
        f"{name} {made}, here {here.get(name)}" for name, made in header.versions.items() if made != here.get(name)
    ]
    return [f"made with {'; '.join(other)}"] if other else []


def _sources(file: CertificateFile, subject: Subject) -> list[Finding]:
    """Compare hashes of model and data, and the true labels."""
    model, points = subject.sources(file.path)
    told = file.header
    findings = []
    if model.sha256 != told.model.sha256:
        findings.append(Finding(1, "model sha256", told.model.sha256, model.sha256))
    if points.sha256 != told.points.sha256:
        findings.append(Finding(1, "data sha256", told.points.sha256, points.sha256))
    pairs = zip(told.points.indices, told.points.labels, points.labels)
    findings += [Finding(1, "the true label", str(a), str(b), index) for index, a, b in pairs if a != b]
    return findings


def _record(
    file: CertificateFile, record_file: Path | None, subject: Subject, allow_unrecorded: bool
) -> tuple[list[Finding], list[str]]:
    """Compare the header's training record with the run's own, and the model it was of."""
    header = file.header
    if header.record is None:
        return [], []
    notes = [f"the training record has SHA-256 {header.record_sha256}"]
    findings = []
    if header.record.model_sha256 not in (None, header.model.sha256):
        findings.append(Finding(1, "the training record's model", str(header.record.model_sha256), header.model.sha256))
    own_place = subject.file.parent / "crfl.json"
    place = record_file or (own_place if own_place.exists() else None)
    if place is None:
        where = "no file" if header.record_file is None else f"{header.record_file}, not the run's own"
        told = "nothing to compare with: name the run's own with --record, or say --allow-unrecorded"
        if not allow_unrecorded:
            return [*findings, Finding(1, "the training record", where, told)], notes
        return findings, [*notes, f"the training record was not compared with the run's own ({where})"]
    own = load_record(place)
    names = [field.name for field in fields(TrainingRecord)]
    differ = [name for name in names if getattr(own, name) != getattr(header.record, name)]
    return findings + [
        Finding(1, f"the training record's {name}", _short(getattr(header.record, name)), _short(getattr(own, name)))
        for name in differ
    ], notes


def _data_norm(file: CertificateFile, subject: Subject, data_dir: str | None) -> list[Finding]:
    """Hold the norm that the training record promises of all training inputs against the data set."""
    record = file.header.record
    if record is None:
        return []
    data, network = load_points(file.header.points.dataset, data_dir), subject.network
    first = [layer for layer in network.layers[:1] if layer.kind == "normalise"]  # inputs are as the model sees them
    try:
        for inputs, _ in data.batches("train", torch.arange(len(data.split("train")[1])), 4096):
            record.checked_against(run(first, network.parts, inputs))
    except RecordError as error:
        return [Finding(1, "the training record's data_norm_bound", f"{record.data_norm_bound:g}", _short(str(error)))]
    return []


def _undrawn(file: CertificateFile) -> list[Finding]:
    """Find votes in certificates of a file for which nothing was drawn."""
    settings = file.header.settings
    if not isinstance(settings, ZonotopeSettings) and recipes.vote_settings(file.header).way == "sampled":
        return []
    findings = []
    for number, certificate in enumerate(file.certificates, start=2):
        chosen = certificate.parameters.get("selection_counts", _ABSENT)
        if certificate.counts:
            findings.append(_finding(file, number, certificate, "counts", certificate.counts, "no votes"))
        if chosen is not _ABSENT:
            findings.append(_finding(file, number, certificate, "selection_counts", chosen, "no votes"))
    return findings


def _copied(file: CertificateFile) -> list[Finding]:
    """Find selections that are the counts again: then nothing was drawn apart to choose the class.

    Unanimous votes agree by themselves; a few others by chance, all others of a file never.
    """
    settings = file.header.settings
    if isinstance(settings, ZonotopeSettings):
        return []
    votes = recipes.vote_settings(file.header)
    if votes.bound != "two_stage" or votes.selection_draws != votes.num_draws:
        return []
    split = [c for c in file.certificates if c.counts and max(c.counts) < votes.num_draws]
    same = [c for c in split if c.parameters.get("selection_counts") == c.counts]
    if len(same) < max(_MOST_BY_CHANCE, len(split)):
        return []
    return [Finding(1, "the selection", f"the counts again, for {len(same)} points", "draws of its own")]


def _chosen(file: CertificateFile, sample: int | None, seed: int) -> list[int]:
    """Return the places of the points to recompute, in order."""
    there = sorted({certificate.sample or 0 for certificate in file.certificates})
    if sample is None or sample >= len(there):
        return there
    if sample < 1:
        raise CertificationError(f"a sample has 1 point or more, got {sample}")
    order = torch.randperm(len(there), generator=generator(seed, "verify"))[:sample]
    return sorted(there[i] for i in order.tolist())


def _votes(
    file: CertificateFile, subject: Subject, rows: list[int], device: str | None, on_progress: OnProgress | None
) -> tuple[list[Finding], int]:
    header, settings = file.header, recipes.vote_settings(file.header)
    findings: list[Finding] = []
    if settings.way != "sampled":
        try:
            known = {c.sample: c for c in _made(header, recipes.evidence(header, subject, None), None, None)}
        except HawthornError as error:
            return [Finding(1, "the claim", "made", f"impossible: {error}")], 0
        pairs = [(number, c, known[c.sample]) for number, c in enumerate(file.certificates, start=2)]
        return [f for number, c, again in pairs for f in _compare(file, number, c, again)], len(pairs)
    tell = None if on_progress is None else lambda votes: on_progress(votes.num_draws, settings.num_draws)
    whole: list[tuple[int, Certificate]] = []
    asked, votes = set(rows), dict[int, tuple[int, Certificate, recipes.Drawn]]()
    for number, certificate in enumerate(file.certificates, start=2):
        stored = _stored_counts(header, certificate, subject.network.num_classes)
        if isinstance(stored, str):
            findings.append(_finding(file, number, certificate, "counts", certificate.counts, stored))
            continue
        whole.append((number, certificate))
        # of votes of another number nothing is drawn: that is a finding, and the header may say any number
        same = all(_alike(certificate.parameters.get(n, 0), getattr(settings, n)) for n in _NUMBERS_OF_DRAWS)
        if (row := certificate.sample or 0) in asked and same:
            votes[row] = number, certificate, stored
    if votes:
        drawn = recipes.draw(settings, subject, list(votes), device=device, on_progress=tell)
        for place, (number, certificate, stored) in enumerate(votes.values()):
            findings += _compare_counts(file, number, certificate, stored, drawn.at([place]))
    findings += _from_counts(file, whole)
    return findings, len(votes)


def _from_counts(file: CertificateFile, whole: Sequence[tuple[int, Certificate]]) -> list[Finding]:
    """Make certificates of their own counts and compare; each by itself where one cannot be made."""
    if not whole:
        return []
    header, rows = file.header, [certificate.sample or 0 for _, certificate in whole]
    stored = [certificate for _, certificate in whole]
    counts = np.array([certificate.counts for certificate in stored], dtype=np.int64)
    chosen: Any = [certificate.parameters.get("selection_counts") for certificate in stored]
    selection = None if chosen[0] is None else np.array(chosen, dtype=np.int64)
    drawn = recipes.Drawn(counts, selection)
    try:
        again = _made(header, recipes.evidence(header, None, drawn), drawn, rows)
    except HawthornError as error:
        if len(whole) > 1:
            return [finding for one in whole for finding in _from_counts(file, [one])]
        return [_finding(file, whole[0][0], stored[0], "counts", stored[0].counts, f"no certificate: {error}")]
    pairs = zip(whole, again, strict=True)
    return [finding for (number, c), made in pairs for finding in _compare(file, number, c, made)]


def _made(header: Header, found: Any, drawn: recipes.Drawn | None, rows: Sequence[int] | None) -> list[Certificate]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenAssumption)  # it stands in the certificates, which are compared
        return recipes.from_evidence(header, found, drawn, rows)


def _stored_counts(header: Header, certificate: Certificate, num_classes: int) -> recipes.Drawn | str:
    """Return the votes that a certificate has, or what is wrong with them."""
    settings = recipes.vote_settings(header)
    if len(certificate.counts) != num_classes:
        return f"votes for {num_classes} classes"
    if sum(certificate.counts) > settings.num_draws:
        return f"{settings.num_draws} votes at most"
    chosen: Any = certificate.parameters.get("selection_counts")
    if settings.bound == "two_stage":
        whole = isinstance(chosen, tuple) and len(chosen) == num_classes and all(type(n) is int for n in chosen)
        if not whole:
            return f"selection_counts of {num_classes} classes"
        if min(chosen) < 0 or sum(chosen) > settings.selection_draws:
            return f"selection_counts from 0, {settings.selection_draws} at most"
    elif chosen is not None:
        return "no selection_counts"
    counts = np.array([certificate.counts], dtype=np.int64)
    return recipes.Drawn(counts, None if chosen is None else np.array([chosen], dtype=np.int64))


def _compare_counts(
    file: CertificateFile, number: int, certificate: Certificate, stored: recipes.Drawn, drawn: recipes.Drawn
) -> list[Finding]:
    """Compare the votes of one point with those drawn again, bit by bit."""
    findings = []
    for name in ("counts", "selection"):
        told, again = getattr(stored, name), getattr(drawn, name)
        if told is not None and again is not None and told.tolist() != again.tolist():
            what = name if name == "counts" else "selection_counts"
            findings.append(_finding(file, number, certificate, what, told[0].tolist(), again[0].tolist()))
    return findings


def _zonotopes(
    file: CertificateFile, subject: Subject, rows: list[int], device: str | None, on_progress: OnProgress | None
) -> tuple[list[Finding], int]:
    settings = file.header.settings
    assert isinstance(settings, ZonotopeSettings)
    again: dict[tuple[int, float], Certificate] = {}
    total = len(settings.eps) * len(rows)
    for eps in settings.eps:
        for part in [rows[i : i + 16] for i in range(0, len(rows), 16)]:
            result = recipes.zonotope(settings, subject, part, eps, device=device)
            labels = [int(subject.labels[row]) for row in part]
            again |= {(c.sample or 0, eps): c for c in recipes.from_zonotope(file.header, labels, result, part)}
            if on_progress is not None:
                on_progress(len(again), total)
    findings = []
    recomputed = 0
    for number, certificate in enumerate(file.certificates, start=2):
        found = _consistent(file, number, certificate)
        made = again.get(key_of(file.header, certificate))
        if made is not None:
            found += _compare(file, number, certificate, made, slack=_slack(certificate, made))
            recomputed += 1
        findings += dict.fromkeys(found)  # each once
    return findings, recomputed


def _consistent(file: CertificateFile, number: int, certificate: Certificate) -> list[Finding]:
    """Check what follows from a zonotope certificate's own entries and the header."""
    settings = file.header.settings
    assert isinstance(settings, ZonotopeSettings)
    p, upper = certificate.parameters, certificate.bounds.get("margin_upper", math.inf)
    clean, tolerance = (value if isinstance(value := p.get(k), float) else None for k in ("clean_margin", "tolerance"))
    sure = clean is not None and tolerance is not None and clean > 0 and 0 <= tolerance < -upper
    label = file.true_label(certificate) if sure else None
    wanted: dict[str, Any] = {
        "label": label, "radius": p.get("eps") if sure else 0.0, "closed": True, "level": "input", "unit": "linf",
        "method": f"zonotope/{settings.method}", "seed": None,
    }  # fmt: skip
    pairs = [(name, getattr(certificate, name), value) for name, value in wanted.items()]
    pairs.append(("checked_label", p.get("checked_label"), file.true_label(certificate)))
    pairs.append(("parameter input_range", p.get("input_range"), settings.input_range))
    pairs.append(("parameter dtype", p.get("dtype"), settings.dtype))
    if type(unstable := p.get("unstable")) is not int or unstable < 0:
        pairs.append(("parameter unstable", unstable, "a whole number from 0"))
    told = {a.name: a for a in certificate.assumptions}
    assumed = {a.name: a for a in recipes.input_assumptions(settings)}
    names = sorted(told.keys() | assumed.keys())
    pairs += [(f"assumption {name}", told.get(name, "missing"), assumed.get(name, "missing")) for name in names]
    return [_finding(file, number, certificate, *pair) for pair in pairs if not _alike(*pair[1:])]


def _compare(
    file: CertificateFile, number: int, stored: Certificate, made: Certificate, slack: float = 0.0
) -> list[Finding]:
    """Return every entry in which two certificates differ; `slack` is what bounds of an input may differ by."""
    told, again = _entries(stored), _entries(made)
    findings = []
    for name in sorted(told.keys() | again.keys()):
        one, other = told.get(name, "missing"), again.get(name, "missing")
        if name == "parameter unstable" and slack and type(one) is type(other):
            continue  # counted on bounds in float32; nothing is claimed of it
        if name == "parameter tolerance" and slack:
            same = _tolerances(one, other)
        else:
            same = _same(one, other, slack if name in ("margin_upper", "parameter clean_margin") else 0.0)
        if not same:
            findings.append(_finding(file, number, stored, name, one, other))
    return findings


def _slack(stored: Certificate, made: Certificate) -> float:
    """Return what the bounds of a point may differ by: the tolerance, float32's where one was decided in it."""
    told, again = stored.parameters.get("tolerance"), made.parameters.get("tolerance")
    if not isinstance(told, float) or not isinstance(again, float):
        return 0.0
    return max(told, again) if _tolerances(told, again) else again


def _tolerances(one: object, other: object) -> bool:
    """True for two tolerances of the same terms, each in float32 or float64."""
    if not isinstance(one, float) or not isinstance(other, float):
        return one == other
    return any(math.isclose(one, other * power, rel_tol=0.01) for power in (1.0, _SINGLE, 1 / _SINGLE))


def _entries(certificate: Certificate) -> dict[str, Any]:
    """Return the entries of a certificate by name, those inside mappings by their own names; counts are apart."""
    plain = {
        field.name: getattr(certificate, field.name)
        for field in fields(Certificate)
        if field.name not in ("parameters", "bounds", "assumptions", "counts")
    }
    plain |= dict(certificate.bounds)
    plain |= {f"parameter {n}": v for n, v in certificate.parameters.items() if n != "selection_counts"}
    return plain | {f"assumption {a.name}": a for a in certificate.assumptions}


def _same(one: Any, other: Any, slack: float) -> bool:
    if type(one) is float and type(other) is float:
        if not (math.isfinite(one) and math.isfinite(other)):
            return one == other  # an infinity is near nothing
        return abs(one - other) <= max(slack, _RELATIVE * max(abs(one), abs(other)))
    return _alike(one, other)


def _alike(one: Any, other: Any) -> bool:
    """True for equal values of the same types, also inside tuples: 1, 1.0 and true are three values."""
    if type(one) is not type(other):
        return False
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(_alike, one, other))
    return one == other


def _finding(
    file: CertificateFile, number: int, certificate: Certificate, what: str, stored: Any, found: Any
) -> Finding:
    return Finding(number, what, _short(stored), _short(found), file.index(certificate))


def _short(value: Any) -> str:
    if isinstance(value, Assumption):
        return f"{value.status} ({value.detail})"
    text = f"{value!r}"
    return text if len(text) <= 200 else f"{text[:197]}..."
