"""CRFL certificates: a record of the training and evidence of predictions in, one certificate per test point out.

`certificate="sound"` holds for the released model: it raises `CertificationError` where an assumption is known to be
broken. `certificate="paper"` is Corollary 1 of Xie et al., "CRFL" (ICML 2021), with what is broken written into every
certificate.

Statements of the sound certificate, from evidence to the distance in parameters that a prediction survives:

- "margin": exact for softmax regression, no noise, nothing drawn;
- "neyman_pearson": (sigma / 2) (Phi^-1(pA) - Phi^-1(pB)), tight for Gaussian noise;
- "divergence": sigma sqrt(2 eps(pA, pB)), CRFL's Theorem 3 for the released model;
- "marginal": Theorem 3 over trainings, with noise of all rounds from the attacked one on (see `coupled`).

Levels: "feature" certifies the l2 change of each poisoned sample, "sample" how many samples of a batch, "client" how
many clients, the other quantities as recorded.
"""

import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np

from certify.bounds import ABSTAINED, Floats
from certify.crfl import corollary, coupled
from certify.crfl.assumptions import assumptions
from certify.crfl.divergence import divergence_budget_lower, neyman_pearson_shift_lower
from certify.crfl.evidence import Evidence
from certify.crfl.training_record import TrainingRecord
from certify.record import Assumption, Certificate
from tasks.errors import CertificationError

Kind = Literal["sound", "paper"]
TrainingLevel = Literal["feature", "sample", "client"]
Form = Literal["margin", "neyman_pearson", "divergence", "marginal"]
UNITS = {"feature": "l2", "sample": "samples per batch", "client": "clients"}


class BrokenAssumption(UserWarning):
    """A certificate of the paper was made although an assumption is known not to hold."""


def certify_crfl(
    record: TrainingRecord, evidence: Evidence, *, certificate: Kind = "sound", level: TrainingLevel = "feature",
    form: Form | None = None, change_norm: float | None = None, should_stop: Callable[[], bool] | None = None,
) -> list[Certificate]:  # fmt: skip
    """Return one certificate per point of `evidence`.

    `change_norm` is the l2 change of each poisoned sample for the levels "sample" and "client"; None there means that
    a poisoned sample may be any other (sound only). `form` is margin or neyman_pearson, as the evidence has it.
    `should_stop` is asked now and then; `CertificationError` where it says so. Where the recorded attackers poison no
    sample, the levels "feature" and "client" are statements on no poison, so every point is an abstention.
    """
    _check(evidence, certificate, level, form, change_norm)
    chosen = form or ("margin" if evidence.kind == "margins" else "neyman_pearson")
    replaced = level != "feature" and change_norm is None
    if certificate == "paper":
        chosen, statement = "corollary_1", "printed"
    else:
        statement = "marginal" if chosen == "marginal" else "coupled"
    known = assumptions(record, evidence, statement, replaced, client_level=level == "client")
    _act_on(known, certificate)
    if certificate == "paper":
        radius = _paper(record, evidence, level, change_norm)
    else:
        radius = _sound(record, evidence, level, chosen, change_norm, should_stop)
    method = f"crfl/{certificate}/{chosen}/{evidence.method}"
    return _write(record, evidence, level, method, radius, known, change_norm)


def _check(evidence: Evidence, certificate: str, level: str, form: str | None, change_norm: float | None) -> None:
    for name, value, kind in (
        ("certificate", certificate, Kind),
        ("level", level, TrainingLevel),
        ("form", form, Form),
    ):
        if value not in get_args(kind) and not (name == "form" and value is None):
            raise CertificationError(f"{name} must be {' or '.join(get_args(kind))}, got {value!r}")
    if level == "feature" and change_norm is not None:
        raise CertificationError("the feature level certifies the change of a sample, so change_norm must be None")
    if certificate == "paper" and (form is not None or evidence.kind != "votes"):
        raise CertificationError(f"Corollary 1 has one form and wants votes, got {form!r} and {evidence.kind}")
    if form is not None and (form == "margin") != (evidence.kind == "margins"):
        raise CertificationError(f"form {form!r} does not go with {evidence.kind}; margins have their own form, margin")


def _act_on(known: tuple[Assumption, ...], certificate: Kind) -> None:
    broken = [f"{a.name} ({a.detail})" for a in known if a.status == "violated"]
    if broken and certificate == "sound":
        advice = 'certificate="paper" computes the published radius all the same, marked as broken'
        raise CertificationError(f"no sound certificate: {'; '.join(broken)}. {advice}")
    if broken:
        warnings.warn(f"Corollary 1 does not apply: {'; '.join(broken)}", BrokenAssumption, stacklevel=3)


def shift_lower(record: TrainingRecord, evidence: Evidence, form: Form) -> Floats:
    """Return the distance between final models, recorded and attacked, that each prediction survives."""
    if form == "margin":
        return evidence.bounds["shift_lower"]
    pair = evidence.bounds["pa_lower"], evidence.bounds["pb_upper"]
    if form == "neyman_pearson":
        return evidence.sigma * neyman_pearson_shift_lower(*pair) * (1 - 1e-15)
    budget = divergence_budget_lower(*pair)
    if form == "divergence":
        return evidence.sigma * np.sqrt(2 * budget) * (1 - 1e-15)
    return coupled.amplified_shift_lower(record, budget)


def _sound(
    record: TrainingRecord, evidence: Evidence, level: TrainingLevel, form: Any, change_norm: float | None,
    should_stop: Callable[[], bool] | None,
) -> Floats:  # fmt: skip
    shift, marginal = shift_lower(record, evidence, form), form == "marginal"
    if not marginal:
        shift = coupled.survived_lower(record, shift)
    start = coupled.marginal_start_norm(record) if marginal else record.start_norm
    if start is None:
        raise CertificationError("a sound certificate wants start_norm in the record")
    if level == "feature":
        return coupled.feature_radius(record, shift, start, marginal)
    largest = coupled.sample_radius if level == "sample" else coupled.client_radius
    return largest(record, shift, start, change_norm, marginal, should_stop).astype(np.float64)


def _paper(record: TrainingRecord, evidence: Evidence, level: TrainingLevel, change_norm: float | None) -> Floats:
    divergence = divergence_budget_lower(evidence.bounds["pa_lower"], evidence.bounds["pb_upper"])
    if level == "feature":
        return corollary.feature_radius(record, divergence)
    if change_norm is None:
        raise CertificationError(f"Corollary 1 at the {level} level wants change_norm, the change of each sample")
    largest = corollary.sample_radius if level == "sample" else corollary.client_radius
    return largest(record, divergence, change_norm).astype(np.float64)


def _write(
    record: TrainingRecord, evidence: Evidence, level: TrainingLevel, method: str, radius: Floats,
    known: tuple[Assumption, ...], change_norm: float | None,
) -> list[Certificate]:  # fmt: skip
    certified = (evidence.label != ABSTAINED) & (radius > 0)
    labels, radii = evidence.label.tolist(), np.where(certified, radius, 0.0).tolist()
    counts = [()] * len(labels) if evidence.counts is None else evidence.counts.tolist()
    bounds = list(zip(*(values.tolist() for values in evidence.bounds.values())))
    shared: dict[str, Any] = {
        "level": level, "method": method, "unit": UNITS[level], "closed": level != "feature", "seed": evidence.seed,
        "model_sha256": evidence.model_sha256, "data_sha256": evidence.data_sha256, "assumptions": known,
        "parameters": _parameters(record, evidence, change_norm),
    }  # fmt: skip
    return [
        Certificate(
            label=labels[i] if sure else None, radius=radii[i], sample=i, counts=tuple(counts[i]),
            bounds=dict(zip(evidence.bounds, bounds[i])), **shared,
        )
        for i, sure in enumerate(certified.tolist())
    ]  # fmt: skip


def _parameters(record: TrainingRecord, evidence: Evidence, change_norm: float | None) -> dict[str, Any]:
    return {
        "sigma": evidence.sigma, "alpha": evidence.alpha, "num_points": evidence.num_points,
        "change_norm": change_norm, "attack_round": record.attack_round, "num_rounds": record.num_rounds,
        "attackers": list(record.attackers), "num_clients": record.num_clients, "rule": record.rule,
        "data_norm_bound": record.data_norm_bound, "label_flips": record.label_flips,
        "poisoned": [max(work.poisoned) for work in record.attacking], "scale": [w.scale for w in record.attacking],
        **evidence.parameters,
    }  # fmt: skip
