"""The gate: whether the model of a round may replace the last accepted one, decided on measured metrics alone.

Source: the certified federated adversarial training paper ("CFAT", NFFL 2021), section 4: each round the aggregated
candidate is evaluated on held-out data; it is accepted if every accuracy (normal, under PGD, certified at each
radius) is at least 0.9 times that of the prior round and the mean certifiable loss at each radius "has varied by a
maximum of 10%"; otherwise the round is skipped and the old model stays.

`paper` is that rule and judges what it names: probes that were measured do not count. Where the paper is silent: the
prior round is the last accepted one (a skipped round changes nothing), the first candidate has no baseline and is
accepted, both comparisons are inclusive, and NaN or infinity in any metric rejects, as no comparison holds for it.

`hardened` deviates where the paper's rule can be walked around or punishes progress:

- the loss may fall freely and may rise by 10% plus a floor (a loss near zero would otherwise freeze the model);
- 0.9 per round allows 0.9^k over k rounds, so every accuracy, loss and relative margin is also held against the best
  accepted one;
- the first `warmup_rounds` accepted models are not compared, as early training moves every metric, and the warm-up
  goes on until a model has reached `accuracy_floor` in every accuracy that is not certified: a worse one never becomes
  what later ones are held against, and after one that reached the floor none below it is accepted;
- a candidate measured without a radius, or without the probes, is rejected: what is not looked at is not gated;
- accuracies under PGD on the margin loss and on logits divided by a temperature are gated as well, and cross-entropy
  PGD may not look better than either by more than `max_masking_gap`: that is what distillation does to gradients;
- the mean certifiable loss scales with the logits; the relative margin (upper bound over the clean margin) does not.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from tasks.errors import CertificationError, ConfigError

_PROBES = ("margin-loss PGD accuracy", "temperature PGD accuracy")
# A metric exactly at its limit passes, so the product's rounding must not decide.
_ULPS = 8 * 2.0**-52
MAX_WARMUP = 1000  # accepted models; more would be a gate that never closes


@dataclass(frozen=True, kw_only=True)
class BoundMetrics:
    """What bounds over a ball of radius `eps` say of a model, on average over the certification set."""

    eps: float
    certified_accuracy: float
    mean_loss: float  # mean of max(0, largest upper bound of z_q - z_y): CFAT's mean certifiable loss
    relative_margin: float | None = None  # median of largest upper bound / |clean margin|; None where not measured


@dataclass(frozen=True, kw_only=True)
class GateMetrics:
    """What the gate judges a model by; `protocol` names data and settings, as only equals can be compared."""

    protocol: str
    normal_accuracy: float
    pgd_accuracy: float
    bounds: tuple[BoundMetrics, ...] = ()
    margin_pgd_accuracy: float | None = None
    temperature_pgd_accuracy: float | None = None

    def __post_init__(self) -> None:
        for name, value in self.accuracies():
            if math.isfinite(value) and not 0 <= value <= 1:  # NaN is a measurement, to be rejected by the policy
                raise CertificationError(f"{name} must be from 0 to 1, got {value!r}")
        radii = [bound.eps for bound in self.bounds]
        if not all(eps >= 0 and math.isfinite(eps) for eps in radii) or sorted(set(radii)) != radii:
            raise CertificationError(f"the radii must be finite, at least 0 and ascending, got {radii}")
        for bound in self.bounds:
            if bound.mean_loss < 0:
                raise CertificationError(f"the mean loss must be 0 or more, got {bound.mean_loss!r}")

    def accuracies(self) -> Iterator[tuple[str, float]]:
        """Yield name and value of every accuracy that was measured."""
        yield "normal accuracy", self.normal_accuracy
        yield "PGD accuracy", self.pgd_accuracy
        if self.margin_pgd_accuracy is not None:
            yield "margin-loss PGD accuracy", self.margin_pgd_accuracy
        if self.temperature_pgd_accuracy is not None:
            yield "temperature PGD accuracy", self.temperature_pgd_accuracy
        for bound in self.bounds:
            yield f"certified accuracy at {bound.eps:g}", bound.certified_accuracy

    def missing(self) -> list[str]:
        """Return what a hardened policy wants measured and was not."""
        probes = {"margin-loss PGD": self.margin_pgd_accuracy, "temperature PGD": self.temperature_pgd_accuracy}
        probes |= {f"relative margin at {bound.eps:g}": bound.relative_margin for bound in self.bounds}
        radius = [] if any(bound.eps > 0 for bound in self.bounds) else ["bounds at a radius above 0"]
        return radius + [name for name, value in probes.items() if value is None]

    def losses(self) -> Iterator[tuple[str, float]]:
        """Yield name and value of the mean certifiable loss at every radius."""
        for bound in self.bounds:
            yield f"mean loss at {bound.eps:g}", bound.mean_loss

    def relative_margins(self) -> Iterator[tuple[str, float]]:
        """Yield name and value of every relative margin that was measured."""
        for bound in self.bounds:
            if bound.relative_margin is not None:
                yield f"relative margin at {bound.eps:g}", bound.relative_margin

    def everything(self) -> Iterator[tuple[str, float]]:
        """Yield name and value of every metric."""
        yield from self.accuracies()
        yield from self.losses()
        yield from self.relative_margins()


@dataclass(frozen=True, kw_only=True)
class GateState:
    """What earlier rounds left: metrics of the last accepted model, the best of every metric, how many were accepted.

    `best` counts from the model that ends the warm-up on; None until then.
    """

    last_accepted: GateMetrics | None = None
    best: GateMetrics | None = None
    num_accepted: int = 0

    def __post_init__(self) -> None:
        if self.num_accepted < 0 or (self.num_accepted > 0) != (self.last_accepted is not None):
            raise CertificationError(
                f"a state has metrics of the last accepted model where one was accepted, got {self.num_accepted} "
                f"accepted and {'no ' if self.last_accepted is None else ''}metrics"
            )
        for metrics in (self.last_accepted, self.best):
            if metrics is not None and (odd := [name for name, value in metrics.everything() if _odd(value)]):
                raise CertificationError(f"no gate accepts a model with NaN or infinity, the state has it in {odd[0]}")


def _setting(value: object) -> bool:
    """True for a number from 0, infinity included; for no integer that a float cannot hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return value >= 0 and (isinstance(value, float) or value <= 2**53)  # NaN is not


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How much a candidate may be worse than the last accepted model; make one with `policy`."""

    name: str
    accuracy_share: float = 0.9  # of the last accepted accuracy
    loss_share: float = 0.1  # of the last accepted loss
    loss_floor: float = 0.0  # added to what the loss may change
    two_sided: bool = True  # a falling loss counts as a change, too
    warmup_rounds: int = 0  # accepted models before the first comparison
    accuracy_floor: float = 0.0  # of every accuracy that is not certified; the warm-up lasts until it is reached
    probes: bool = False  # whether the probes and a radius must be measured and the probes' accuracies count
    anchor_share: float = 0.0  # of the best accepted accuracy
    anchor_loss_share: float = math.inf  # by how much the loss may exceed the least accepted one, as a share of it
    anchor_loss_floor: float = 0.0  # added to that
    anchor_margin_slack: float = math.inf  # as margin_slack, against the least accepted relative margin
    max_masking_gap: float = math.inf  # by how much cross-entropy PGD may look better than the probes
    margin_slack: float = math.inf  # by how much the relative margin may rise, absolute or as a share, the larger

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is float and not _setting(value):
                raise ConfigError(f"{field.name} of a gate policy must be a number from 0, got {value!r:.60}")
            if field.type is bool and type(value) is not bool:
                raise ConfigError(f"{field.name} of a gate policy must be True or False, got {value!r:.60}")
        if type(self.warmup_rounds) is not int or not 0 <= self.warmup_rounds <= MAX_WARMUP:
            wanted = f"a whole number from 0 to {MAX_WARMUP}"
            raise ConfigError(f"warmup_rounds of a gate policy must be {wanted}, got {self.warmup_rounds!r:.60}")
        for name in ("accuracy_share", "anchor_share", "accuracy_floor"):
            if getattr(self, name) > 1:
                raise ConfigError(f"{name} of a gate policy must be from 0 to 1, got {getattr(self, name)!r}")


PAPER = Policy(name="paper")
HARDENED = Policy(
    name="hardened",
    loss_floor=0.01,
    two_sided=False,
    warmup_rounds=2,
    accuracy_floor=0.3,
    probes=True,
    anchor_share=0.8,
    anchor_loss_share=0.5,
    anchor_loss_floor=0.05,
    anchor_margin_slack=0.5,
    max_masking_gap=0.1,
    margin_slack=0.25,
)


@dataclass(frozen=True, kw_only=True)
class GateDecision:
    """Whether the candidate is accepted, why not, what the comparison does not show, and the state that follows."""

    accepted: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    metrics: GateMetrics
    state: GateState


def policy(name: str, /, **options: Any) -> Policy:
    """Return the policy `name` with settings changed; `ConfigError` for an unknown name or setting."""
    known = {"paper": PAPER, "hardened": HARDENED}
    if name not in known:
        raise ConfigError(f"unknown gate policy {name!r}; there are: {', '.join(known)}")
    settings = [field.name for field in fields(Policy) if field.name != "name"]
    if unknown := sorted(set(options) - set(settings)):
        raise ConfigError(f"a gate policy has no setting {', '.join(unknown)}; there are: {', '.join(settings)}")
    return replace(known[name], **options)


def decide(metrics: GateMetrics, state: GateState, policy: Policy) -> GateDecision:
    """Return the decision on a candidate with `metrics` after `state`; the old state stays where it is rejected."""
    notes: list[str] = []
    reasons = [f"{name} is {value}, not a finite number" for name, value in metrics.everything() if _odd(value)]
    if policy.probes and (missing := metrics.missing()):
        reasons.append(f"not measured: {', '.join(missing)}; {policy.name} decides on nothing less")
    reasons += _masking(metrics, policy)
    prior = state.last_accepted
    if prior is not None:
        _comparable(metrics, prior)
    if state.best is not None:
        _comparable(metrics, state.best)
    notes += _blind(metrics, policy)
    if prior is None or in_warmup(state, policy):
        notes += _uncompared(metrics, state, policy)
        reasons += _fallen(metrics, prior, policy)
    else:
        reasons += _worse_than_prior(metrics, prior, policy)
        notes += _uninformative(prior, policy)
        if state.best is not None:
            reasons += _below_anchor(metrics, state.best, policy)
    accepted = not reasons
    after = _accept(metrics, state, policy) if accepted else state
    return GateDecision(accepted=accepted, reasons=tuple(reasons), notes=tuple(notes), metrics=metrics, state=after)


def _odd(value: float) -> bool:
    return not math.isfinite(value)


def in_warmup(state: GateState, policy: Policy) -> bool:
    """Whether candidates after `state` are not compared yet."""
    return state.num_accepted < policy.warmup_rounds or (policy.accuracy_floor > 0 and state.best is None)


def judged(metrics: GateMetrics, policy: Policy) -> list[tuple[str, float]]:
    """Return the accuracies that count."""
    return [pair for pair in metrics.accuracies() if policy.probes or pair[0] not in _PROBES]


def below_floor(metrics: GateMetrics, policy: Policy) -> list[tuple[str, float]]:
    """Return the accuracies below the floor; certified ones may be 0 for long, at large radii for ever."""
    found = [pair for pair in judged(metrics, policy) if not pair[0].startswith("certified")]
    return [(name, value) for name, value in found if not value >= policy.accuracy_floor - _ULPS]


def _uncompared(metrics: GateMetrics, state: GateState, policy: Policy) -> list[str]:
    """Return why a candidate is not compared, and why it will not be what others are held against."""
    notes = []
    if state.last_accepted is None:
        notes.append("no model was accepted before: nothing to compare with")
    elif state.num_accepted < policy.warmup_rounds:
        notes.append(f"warm-up: {state.num_accepted} of {policy.warmup_rounds} models accepted, not compared")
    else:
        notes.append(f"warm-up: no accepted model reached {policy.accuracy_floor:g} yet, not compared")
    low = ", ".join(f"{name} {value:g}" for name, value in below_floor(metrics, policy))
    if low:
        notes.append(f"warm-up goes on: {low} below the floor {policy.accuracy_floor:g}, no anchor for later models")
    return notes


def _fallen(metrics: GateMetrics, prior: GateMetrics | None, policy: Policy) -> list[str]:
    """Return a reason for every accuracy below the floor where the last accepted model had reached it."""
    if prior is None or below_floor(prior, policy):
        return []
    return [
        f"warm-up: {name} {value:g} is below the floor {policy.accuracy_floor:g}, which the last accepted had reached"
        for name, value in below_floor(metrics, policy)
    ]


def _blind(metrics: GateMetrics, policy: Policy) -> list[str]:
    """Return notes on what the policy cannot see of a candidate."""
    notes = []
    if not metrics.bounds:
        notes.append("uninformative: no radius was measured, so nothing certified is judged")
    for bound in metrics.bounds:
        if bound.certified_accuracy == 0:
            notes.append(
                f"uninformative: nothing is certified at {bound.eps:g}; the mean loss alone is judged there, "
                "which scales with the logits"
            )
    probed = [name for name, _ in metrics.accuracies() if name in _PROBES]
    if probed and not policy.probes:
        notes.append(f"not judged by {policy.name}: {', '.join(probed)}")
    elif not probed:
        notes.append("no probe was measured: masked gradients, which flatter the PGD accuracy, cannot be seen")
    return notes


def _masking(metrics: GateMetrics, policy: Policy) -> list[str]:
    """Return a reason for every probe that succeeds where cross-entropy PGD fails: gradients are masked."""
    probes = {"margin-loss": metrics.margin_pgd_accuracy, "temperature": metrics.temperature_pgd_accuracy}
    return [
        f"masked gradients: accuracy {metrics.pgd_accuracy:g} under PGD but {accuracy:g} under {name} PGD, "
        f"more than {policy.max_masking_gap:g} apart"
        for name, accuracy in probes.items()
        if accuracy is not None and metrics.pgd_accuracy - accuracy > policy.max_masking_gap + _ULPS
    ]


def _comparable(metrics: GateMetrics, other: GateMetrics) -> None:
    """Raise `CertificationError` where two models were not measured on the same data with the same settings."""
    same = [name for name, _ in metrics.everything()] == [name for name, _ in other.everything()]
    if metrics.protocol != other.protocol or not same:
        raise CertificationError(
            "metrics can be compared where data, radii and attacks are the same; the last accepted model was measured "
            f"with protocol {other.protocol[:16]!r}, this one with {metrics.protocol[:16]!r}: start from an empty state"
        )


def _worse_than_prior(metrics: GateMetrics, prior: GateMetrics, policy: Policy) -> list[str]:
    reasons = []
    for (name, now), (_, before) in zip(judged(metrics, policy), judged(prior, policy), strict=True):
        if not now >= policy.accuracy_share * before - _ULPS:
            reasons.append(f"{name} {now:g} is below {policy.accuracy_share:g} of the last accepted {before:g}")
    for (name, now), (_, before) in zip(metrics.losses(), prior.losses(), strict=True):
        allowed = (policy.loss_share * before + policy.loss_floor) * (1 + _ULPS) + before * _ULPS
        if not (abs(now - before) if policy.two_sided else now - before) <= allowed:
            change = "changed" if policy.two_sided else "rose"
            reasons.append(f"{name} {change} from {before:g} to {now:g}, by more than {allowed:g}")
    for (name, now), (_, before) in zip(metrics.relative_margins(), prior.relative_margins(), strict=True):
        slack = policy.margin_slack * max(1.0, abs(before))
        if not now - before <= slack + _ULPS:
            reasons.append(f"{name} rose from {before:g} to {now:g}, by more than {slack:g}")
    return reasons


def _below_anchor(metrics: GateMetrics, best: GateMetrics, policy: Policy) -> list[str]:
    """Return a reason for every metric that many allowed steps have led too far from the best accepted one."""
    reasons = [
        f"drift: {name} {now:g} is below {policy.anchor_share:g} of the best accepted {before:g}"
        for (name, now), (_, before) in zip(judged(metrics, policy), judged(best, policy), strict=True)
        if not now >= policy.anchor_share * before - _ULPS
    ]
    losses = [
        (name, now, before, policy.anchor_loss_share * before + policy.anchor_loss_floor)
        for (name, now), (_, before) in zip(metrics.losses(), best.losses(), strict=True)
        if math.isfinite(policy.anchor_loss_share)
    ]
    margins = [
        (name, now, before, policy.anchor_margin_slack * max(1.0, abs(before)))
        for (name, now), (_, before) in zip(metrics.relative_margins(), best.relative_margins(), strict=True)
    ]
    return reasons + [
        f"drift: {name} {now:g} is above the least accepted {before:g} by more than {allowed:g}"
        for name, now, before, allowed in (*losses, *margins)
        if not now - before <= allowed * (1 + _ULPS) + abs(before) * _ULPS
    ]


def _uninformative(prior: GateMetrics, policy: Policy) -> list[str]:
    """Return notes on metrics of the last accepted model that bind nothing, or everything."""
    notes = [
        f"uninformative: {name} of the last accepted model is 0, so any value passes"
        for (name, before) in judged(prior, policy)
        if before == 0
    ]
    if policy.two_sided and policy.loss_floor == 0:
        notes += [
            f"uninformative: {name} of the last accepted model is 0, so any other value is rejected"
            for name, before in prior.losses()
            if before == 0
        ]
    return notes


def _accept(metrics: GateMetrics, state: GateState, policy: Policy) -> GateState:
    """Return the state after acceptance; the best of every metric counts from the model that ends the warm-up."""
    accepted = state.num_accepted + 1
    best = state.best
    if best is not None or (accepted >= policy.warmup_rounds and not below_floor(metrics, policy)):
        best = metrics if best is None else _best_of(best, metrics)
    return GateState(last_accepted=metrics, best=best, num_accepted=accepted)


def _best_of(best: GateMetrics, now: GateMetrics) -> GateMetrics:
    """Return metric by metric the better of two models: no single model need have been that good."""
    bounds = tuple(
        BoundMetrics(
            eps=a.eps,
            certified_accuracy=max(a.certified_accuracy, b.certified_accuracy),
            mean_loss=min(a.mean_loss, b.mean_loss),
            relative_margin=_better(min, a.relative_margin, b.relative_margin),
        )
        for a, b in zip(best.bounds, now.bounds, strict=True)
    )
    return GateMetrics(
        protocol=now.protocol,
        normal_accuracy=max(best.normal_accuracy, now.normal_accuracy),
        pgd_accuracy=max(best.pgd_accuracy, now.pgd_accuracy),
        bounds=bounds,
        margin_pgd_accuracy=_better(max, best.margin_pgd_accuracy, now.margin_pgd_accuracy),
        temperature_pgd_accuracy=_better(max, best.temperature_pgd_accuracy, now.temperature_pgd_accuracy),
    )


def _better(choose: Any, first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else choose(first, second)
