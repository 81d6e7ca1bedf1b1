"""How the certificates of a file are made: one way for the commands that make them and for verifying them again.

A certificate from votes is made in two steps, which verification repeats apart: counts from the seed, which are the
same for every choice of points and every interruption, and everything else from counts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from certify.bounds import ABSTAINED, Floats, crfl_top_two, simultaneous, two_stage
from certify.crfl.certificates import certify_crfl
from certify.crfl.divergence import neyman_pearson_shift_lower
from certify.crfl.evidence import Evidence
from certify.files.header import Header
from certify.files.settings import CrflSettings, VoteSettings, ZonotopeSettings
from certify.files.subject import Subject
from certify.record import Assumption, Certificate
from certify.smoothing.sampled import count_votes
from certify.smoothing.votes import Plan, Votes
from certify.zonotope import ZonotopeResult, check
from tasks.errors import CertificationError

STREAM = "votes"
SELECTION = "votes/selection"  # as the certification service names it
# Whoever moves the released model by less than the radius, by what clients sent or by other means.
MODEL_LEVEL, MODEL_UNIT = "model", "l2 of the released model's parameters"

Counts = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Drawn:
    """Votes per class [points, classes], and those of the draws that chose the class (two_stage alone)."""

    counts: Counts
    selection: Counts | None = None

    def at(self, rows: Sequence[int]) -> "Drawn":
        """Return the votes of some points."""
        return Drawn(self.counts[rows], None if self.selection is None else self.selection[rows])


class InterruptedWork(CertificationError):
    """Work was stopped before its end; `votes` is what was counted, if that is what the work is."""

    def __init__(self, message: str, votes: Votes | None = None) -> None:
        super().__init__(message)
        self.votes = votes


def vote_settings(header: Header) -> VoteSettings:
    """Return how the evidence of a file of smooth or crfl certificates is found."""
    settings = header.settings.votes if isinstance(header.settings, CrflSettings) else header.settings
    if not isinstance(settings, VoteSettings):
        raise CertificationError(f"{header.kind} certificates are made without votes")
    return settings


def plan(header: Header) -> Plan:
    """Return what is drawn for the counts of a file."""
    settings, model, points = vote_settings(header), header.model.sha256, header.points.sha256
    return Plan("weights", settings.sigma, settings.seed, STREAM, settings.num_draws, model, points)


def draw(
    settings: VoteSettings, subject: Subject, rows: Sequence[int] | None = None, *, start: Votes | None = None,
    device: str | None = None, on_progress: Callable[[Votes], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Drawn:  # fmt: skip
    """Count the votes of all points or of `rows`; `InterruptedWork` where `should_stop` ended the sampling."""
    inputs = subject.inputs if rows is None else subject.inputs[list(rows)]
    given: dict[str, Any] = {"sigma": settings.sigma, "seed": settings.seed, "device": device}
    selection = None
    if settings.bound == "two_stage":
        number = settings.selection_draws
        selection = count_votes(subject.network, inputs, num_draws=number, stream=SELECTION, **given).counts
    votes = count_votes(
        subject.network, inputs, num_draws=settings.num_draws, stream=STREAM, start=start,
        on_progress=on_progress, should_stop=should_stop, **given,
    )  # fmt: skip
    if not votes.complete:
        raise InterruptedWork(f"stopped after {votes.num_draws} of {votes.plan.num_draws} draws", votes)
    return Drawn(votes.counts, selection)


def evidence(header: Header, subject: Subject | None, drawn: Drawn | None) -> Evidence:
    """Return the evidence of votes, or of `subject` where nothing is drawn; its points are `drawn`'s."""
    settings = vote_settings(header)
    if settings.way == "sampled":
        if drawn is None:
            raise CertificationError("sampled evidence wants counted votes")
        return _sampled(header, settings, drawn)
    if subject is None:
        raise CertificationError(f"{settings.way} evidence wants the model and its points")
    if settings.way == "exact":
        return Evidence.exact(subject.network, subject.inputs, settings.sigma)
    return Evidence.margins(subject.network, subject.inputs)


def from_evidence(
    header: Header, found: Evidence, drawn: Drawn | None = None, rows: Sequence[int] | None = None
) -> list[Certificate]:
    """Return the certificates of evidence, one per point, numbered by `rows` where these are not all points."""
    if isinstance(header.settings, CrflSettings):
        s, record = header.settings, header.record
        assert record is not None
        known: dict[str, Any] = {"certificate": s.certificate, "level": s.level, "form": s.form}
        certificates = certify_crfl(record, found, change_norm=s.change_norm, **known)
    else:
        certificates = _of_model(found)
    places = range(len(certificates)) if rows is None else rows
    selection = None if drawn is None or drawn.selection is None else drawn.selection.tolist()
    own = [{} if selection is None else {"selection_counts": selection[i]} for i in range(len(certificates))]
    return [
        replace(certificate, sample=place, parameters={**certificate.parameters, **extra})
        for certificate, place, extra in zip(certificates, places, own, strict=True)
    ]


def _sampled(header: Header, settings: VoteSettings, drawn: Drawn) -> Evidence:
    draws, alpha, interval = settings.num_draws, settings.alpha, settings.interval
    shared: Any = {"num_points": header.num_points if settings.joint else 1}
    if settings.bound == "two_stage":
        bounds = two_stage(drawn.selection, drawn.counts, draws, alpha, interval=interval, **shared)
    elif settings.bound == "simultaneous":
        bounds = simultaneous(drawn.counts, draws, alpha, interval=interval, **shared)
    else:
        bounds = crfl_top_two(drawn.counts, draws, alpha, **shared)
    found = Evidence.from_votes(Votes(plan(header), drawn.counts, draws), bounds)
    extra = {"selection_draws": settings.selection_draws} if drawn.selection is not None else {}
    return replace(found, parameters={**found.parameters, **extra})


def _of_model(found: Evidence) -> list[Certificate]:
    """Return how far the released model may be moved before each prediction changes."""
    shift = _shift_lower(found)
    certified = (found.label != ABSTAINED) & (shift > 0)
    bounds = list(zip(*(values.tolist() for values in found.bounds.values())))
    parameters = {"sigma": found.sigma, "alpha": found.alpha, "num_points": found.num_points, **found.parameters}
    known = _model_assumptions(found)
    counts = None if found.counts is None else found.counts.tolist()
    return [
        Certificate(
            level=MODEL_LEVEL, method=f"smooth/{found.method}", unit=MODEL_UNIT, seed=found.seed, sample=i,
            label=int(found.label[i]) if sure else None, radius=float(shift[i]) if sure else 0.0,
            model_sha256=found.model_sha256, data_sha256=found.data_sha256, assumptions=known, parameters=parameters,
            counts=() if counts is None else tuple(counts[i]), bounds=dict(zip(found.bounds, bounds[i])),
        )
        for i, sure in enumerate(certified.tolist())
    ]  # fmt: skip


def _shift_lower(found: Evidence) -> Floats:
    """Return the l2 distance in parameters that each prediction survives, rounded down."""
    if found.kind == "margins":
        return found.bounds["shift_lower"]
    shift = neyman_pearson_shift_lower(found.bounds["pa_lower"], found.bounds["pb_upper"])
    return found.sigma * shift * (1 - 1e-15)


def _model_assumptions(found: Evidence) -> tuple[Assumption, ...]:
    real = Assumption("real_arithmetic", "stated", "the model is taken as exact; its float32 rounding is not modelled")
    if found.kind == "margins":
        return (Assumption("classifier", "stated", "the claim is of the model itself, without noise"), real)
    detail = (
        f"the claim is of the vote under N(0, {found.sigma:g}^2) on every parameter, not of the model without noise"
    )
    smoothed = Assumption("classifier", "stated", detail)
    if found.counts is None:
        return (smoothed, real)
    share = "each point" if found.num_points == 1 else f"all {found.num_points} points together"
    detail = f"{found.method} fails with probability {found.alpha:g} at most, for {share}"
    printed = found.method.startswith("crfl_top_two")
    if printed:
        detail = f"{found.method} is not a bound at level {found.alpha:g}: the printed pair fails with more than alpha"
    return (smoothed, Assumption("confidence", "violated" if printed else "checked", detail))


def zonotope(
    settings: ZonotopeSettings, subject: Subject, rows: Sequence[int], eps: float, *, device: str | None = None,
    on_progress: Callable[[int, int], None] | None = None, should_stop: Callable[[], bool] | None = None,
) -> ZonotopeResult:  # fmt: skip
    """Return the bounds of some points in the ball of radius `eps`."""
    low, high = settings.input_range
    return check(
        subject.network, subject.inputs[list(rows)], subject.labels[list(rows)], eps=eps, method=settings.method,
        input_range=(low, high), dtype=getattr(torch, settings.dtype), device=device,
        on_progress=on_progress, should_stop=should_stop,
    )  # fmt: skip


def from_zonotope(
    header: Header, labels: Sequence[int], result: ZonotopeResult, rows: Sequence[int]
) -> list[Certificate]:
    """Return the certificates of bounds on the points `rows`, whose true labels are `labels`."""
    settings = header.settings
    assert isinstance(settings, ZonotopeSettings)
    known = input_assumptions(settings)
    worst, clean = result.margins_upper.amax(1), result.clean_margin
    shared: dict[str, Any] = {
        "level": "input", "method": f"zonotope/{result.method}", "unit": "linf", "closed": True,
        "model_sha256": header.model.sha256, "data_sha256": header.points.sha256, "assumptions": known,
    }  # fmt: skip
    asked = {"eps": result.eps, "input_range": list(settings.input_range), "dtype": settings.dtype}
    return [
        Certificate(
            label=label if bool(result.certified[i]) else None, radius=result.eps if bool(result.certified[i]) else 0.0,
            sample=row, bounds={"margin_upper": worst[i].item()}, **shared,
            parameters={
                **asked, "checked_label": label, "clean_margin": _finite(clean[i]),
                "tolerance": _finite(result.tolerance[i]), "unstable": int(result.unstable[i]),
            },
        )
        for i, (row, label) in enumerate(zip(rows, labels, strict=True))
    ]  # fmt: skip


def input_assumptions(settings: ZonotopeSettings) -> tuple[Assumption, ...]:
    """Return what all bounds on inputs of a file take for granted."""
    low, high = settings.input_range
    detail = f"the attacker keeps every number of the input in [{low:g}, {high:g}], as the point itself does"
    return (
        Assumption("input_range", "stated", detail),
        Assumption("rounding", "stated", f"bounds in {settings.dtype} hold by a tolerance far above observed rounding"),
    )


def _finite(number: Tensor) -> float | None:
    value = number.item()
    return value if math.isfinite(value) else None
