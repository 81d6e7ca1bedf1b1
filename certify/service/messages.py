"""Messages to the library's values and back; a value that no request can have is refused with INVALID_ARGUMENT."""

import json
from dataclasses import dataclass
from typing import Any, get_args

from certify import gate
from certify.bounds import Interval
from certify.crfl.certificates import Form, Kind, TrainingLevel
from certify.crfl.training_record import TrainingRecord
from certify.service import certify_pb2 as pb
from certify.service.measure import GateSettings
from certify.service.status import invalid
from certify.zonotope import check
from tasks.errors import RecordError

DTYPES = ("float32", "float64")
METHODS = get_args(check.__annotations__["method"])
FORMS = tuple(form for form in ("", *get_args(Form)) if form != "margin")  # margins are of no votes
BOUNDS = ("two_stage", "simultaneous", "crfl_top_two")
_MAX_TEXT = 200
_MAX = 1e30  # of any size in input or parameter units: beyond it float32 sums overflow
_MAX_RECORD = 3 * 2**20  # bytes of a training record; one message may have 4 MiB


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What is to be certified with votes: arguments of `certify_crfl` and of the bounds before it."""

    record: TrainingRecord
    certificate: str
    level: str
    form: str | None
    change_norm: float | None
    bounds: str
    interval: str
    alpha: float
    num_points: int
    selection_draws: int


def smoothing(request: pb.CertifySmoothingRequest) -> dict[str, Any]:
    """Return sigma, num_draws, seed and stream of a smoothing request."""
    if not 0 < request.sigma <= _MAX:
        raise invalid(f"sigma is the standard deviation of the noise, above 0 and up to {_MAX}, got {request.sigma!r}")
    if request.num_draws < 1:
        raise invalid("num_draws must be 1 or more, got 0")
    if request.seed >= 2**63:
        raise invalid(f"seed must be below 2^63, got {request.seed}")
    stream = request.stream or "votes"
    if len(stream) > _MAX_TEXT or not stream.isprintable():
        raise invalid(f"stream must be a name of at most {_MAX_TEXT} printable letters")
    return {"sigma": request.sigma, "num_draws": request.num_draws, "seed": request.seed, "stream": stream}


def claim(message: pb.Claim) -> Claim:
    """Return what is to be certified; everything about it that needs no votes is checked here."""
    for name, options in (
        ("certificate", get_args(Kind)),
        ("level", get_args(TrainingLevel)),
        ("form", FORMS),
        ("bounds", BOUNDS),
        ("interval", ("", *get_args(Interval))),
    ):
        if getattr(message, name) not in options:
            there_are = ", ".join(option for option in options if option)
            raise invalid(f"unknown {name} {getattr(message, name)[:60]!r}; there are: {there_are}")
    if not 1e-100 <= message.alpha < 1:
        raise invalid(f"alpha must be inside (0, 1) and at least 1e-100, got {message.alpha!r}")
    if (message.bounds == "two_stage") != (message.selection_draws > 0):
        raise invalid(
            "two_stage wants selection_draws, independent draws that choose the class, and no other bounds do; "
            f"got {message.bounds} with {message.selection_draws}"
        )
    if message.bounds == "crfl_top_two" and message.interval == "clopper_pearson":
        raise invalid("crfl_top_two has Hoeffding's interval; leave interval empty or name hoeffding")
    change_norm = _optional(message, "change_norm")
    if change_norm is not None and not 0 < change_norm <= _MAX:
        raise invalid(f"change_norm must be above 0 and up to {_MAX}, got {change_norm!r}")
    return Claim(
        record=_record(message.training_record),
        certificate=message.certificate,
        level=message.level,
        form=message.form or None,
        change_norm=change_norm,
        bounds=message.bounds,
        interval=message.interval or "clopper_pearson",
        alpha=message.alpha,
        num_points=message.num_points or 1,
        selection_draws=message.selection_draws,
    )


def _record(text: str) -> TrainingRecord:
    """Read a training record that came from outside."""
    if len(text) > _MAX_RECORD:
        raise invalid(f"a training record may have {_MAX_RECORD} letters, got {len(text)}")
    try:
        return TrainingRecord.from_json(text)
    except RecordError:
        raise
    except Exception as error:  # of types that its checks do not foresee: the record is wrong all the same
        raise invalid(f"the training record cannot be read: {error!r:.200}") from None


def zonotope(request: pb.CheckZonotopeRequest) -> dict[str, Any]:
    """Return eps and input_range of a zonotope request, method and dtype where it names them."""
    asked: dict[str, Any] = {"eps": _radius("eps", request.eps), "input_range": _input_range(request)}
    if request.method:
        if request.method not in METHODS:
            raise invalid(f"unknown method {request.method[:60]!r}; there are: {', '.join(METHODS)}")
        asked["method"] = request.method
    if request.dtype:
        if request.dtype not in DTYPES:
            raise invalid(f"dtype must be {' or '.join(DTYPES)}, got {request.dtype[:60]!r}")
        asked["dtype"] = request.dtype
    return asked


def settings(request: pb.GateRequest) -> GateSettings:
    """Return how a gate request wants its model measured."""
    radii = tuple(_radius("eps", eps) for eps in request.eps)
    if list(radii) != sorted(set(radii)):
        raise invalid(f"the radii eps must be ascending, each once, got {list(radii)}")
    if request.attack_steps < 1:
        raise invalid("attack_steps must be 1 or more, got 0")
    if request.seed >= 2**63:
        raise invalid(f"seed must be below 2^63, got {request.seed}")
    for name in ("attack_step_size", "temperature"):
        if not 0 <= getattr(request, name) <= _MAX:
            raise invalid(f"{name} must be 0 (the default) or above and up to {_MAX}, got {getattr(request, name)!r}")
    given: dict[str, Any] = {"temperature": request.temperature} if request.temperature else {}
    return GateSettings(
        eps=radii,
        attack_eps=_radius("attack_eps", request.attack_eps),
        attack_steps=request.attack_steps,
        attack_step_size=request.attack_step_size or None,
        probes=request.probes,
        seed=request.seed,
        input_range=_input_range(request),
        **given,
    )


def policy(message: pb.GatePolicy) -> gate.Policy:
    """Return the policy of a gate request; its options are a JSON object of settings."""
    if len(message.options) > 10_000:
        raise invalid("the options of a policy are a JSON object of settings, got too much text")
    try:
        options = json.loads(message.options or "{}")
    except (ValueError, RecursionError):
        raise invalid(f"the options of a policy are a JSON object of settings, got {message.options[:60]!r}") from None
    if not isinstance(options, dict):
        raise invalid(f"the options of a policy are a JSON object of settings, got {message.options[:60]!r}")
    return gate.policy(message.name, **options)


def state(message: pb.GateState) -> gate.GateState:
    """Return what earlier rounds left."""
    return gate.GateState(
        last_accepted=metrics(message.last_accepted) if message.HasField("last_accepted") else None,
        best=metrics(message.best) if message.HasField("best") else None,
        num_accepted=message.num_accepted,
    )


def write_state(state: gate.GateState) -> pb.GateState:
    """Return `state` as a message."""
    message = pb.GateState(num_accepted=state.num_accepted)
    if state.last_accepted is not None:
        message.last_accepted.CopyFrom(write_metrics(state.last_accepted))
    if state.best is not None:
        message.best.CopyFrom(write_metrics(state.best))
    return message


def metrics(message: pb.GateMetrics) -> gate.GateMetrics:
    """Return the metrics of a message."""
    return gate.GateMetrics(
        protocol=message.protocol,
        normal_accuracy=message.normal_accuracy,
        pgd_accuracy=message.pgd_accuracy,
        bounds=tuple(
            gate.BoundMetrics(
                eps=bound.eps,
                certified_accuracy=bound.certified_accuracy,
                mean_loss=bound.mean_loss,
                relative_margin=_optional(bound, "relative_margin"),
            )
            for bound in message.bounds
        ),
        margin_pgd_accuracy=_optional(message, "margin_pgd_accuracy"),
        temperature_pgd_accuracy=_optional(message, "temperature_pgd_accuracy"),
    )


def write_metrics(metrics: gate.GateMetrics) -> pb.GateMetrics:
    """Return `metrics` as a message; what was not measured stays absent."""
    return pb.GateMetrics(
        protocol=metrics.protocol,
        normal_accuracy=metrics.normal_accuracy,
        pgd_accuracy=metrics.pgd_accuracy,
        bounds=[
            pb.GateBound(
                eps=bound.eps,
                certified_accuracy=bound.certified_accuracy,
                mean_loss=bound.mean_loss,
                relative_margin=bound.relative_margin,
            )
            for bound in metrics.bounds
        ],
        margin_pgd_accuracy=metrics.margin_pgd_accuracy,
        temperature_pgd_accuracy=metrics.temperature_pgd_accuracy,
    )


def decision(message: pb.GateDecision) -> gate.GateDecision:
    """Return the decision of a message."""
    return gate.GateDecision(
        accepted=message.accepted,
        reasons=tuple(message.reasons),
        notes=tuple(message.notes),
        metrics=metrics(message.metrics),
        state=state(message.state),
    )


def write_decision(decision: gate.GateDecision) -> pb.GateDecision:
    """Return `decision` as a message."""
    return pb.GateDecision(
        accepted=decision.accepted,
        reasons=decision.reasons,
        notes=decision.notes,
        metrics=write_metrics(decision.metrics),
        state=write_state(decision.state),
    )


def _radius(name: str, value: float) -> float:
    if not 0 <= value <= _MAX:
        raise invalid(f"{name} is a radius from 0 to {_MAX}, got {value!r}")
    return value + 0.0  # -0.0 is 0.0, also in the hash of the question


def _input_range(request: pb.CheckZonotopeRequest | pb.GateRequest) -> tuple[float, float]:
    if not request.HasField("input_range"):
        return 0.0, 1.0
    low, high = request.input_range.low, request.input_range.high
    if not -_MAX <= low < high <= _MAX:
        raise invalid(f"input_range must be two ascending numbers within {_MAX}, got {low!r} and {high!r}")
    return low, high


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None
