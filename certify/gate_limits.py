"""What a policy allows every metric of a candidate after a state: the numbers behind a decision, for records and plots.

`decide` in `certify.gate` is what counts; a candidate with finite metrics inside all of these limits is accepted, one
with a metric outside of them (beyond the last bits) is not.
"""

import math
from collections.abc import Iterator

from certify.gate import GateMetrics, GateState, Policy, below_floor, in_warmup, judged

Limits = dict[str, tuple[float | None, float | None]]  # metric -> (least, most); None: free on that side


def limits(metrics: GateMetrics, state: GateState, policy: Policy) -> Limits:
    """Return the range that each metric of the candidate had to lie in; metrics that nothing limits are left out."""
    least: dict[str, float] = {}
    most: dict[str, float] = {}
    probes = [a for a in (metrics.margin_pgd_accuracy, metrics.temperature_pgd_accuracy) if a is not None]
    if probes and math.isfinite(policy.max_masking_gap):
        most["PGD accuracy"] = min(probes) + policy.max_masking_gap
    prior = state.last_accepted
    if prior is None or in_warmup(state, policy):
        if prior is not None and not below_floor(prior, policy):
            for name, _ in judged(prior, policy):
                if not name.startswith("certified"):
                    least[name] = policy.accuracy_floor
    else:
        for name, value in judged(prior, policy):
            least[name] = policy.accuracy_share * value
        for name, most_, least_ in _changes(prior, policy):
            most[name] = most_
            if policy.two_sided and name.startswith("mean loss"):
                least[name] = least_
        if state.best is not None:
            _anchor(state.best, policy, least, most)
    names = [name for name, _ in metrics.everything()]
    return {name: (least.get(name), most.get(name)) for name in names if name in least or name in most}


def _changes(prior: GateMetrics, policy: Policy) -> Iterator[tuple[str, float, float]]:
    """Yield (metric, most, least) of losses and relative margins."""
    for name, value in prior.losses():
        change = policy.loss_share * value + policy.loss_floor
        yield name, value + change, value - change
    for name, value in prior.relative_margins():
        if math.isfinite(policy.margin_slack):
            yield name, value + policy.margin_slack * max(1.0, abs(value)), -math.inf


def _anchor(best: GateMetrics, policy: Policy, least: dict[str, float], most: dict[str, float]) -> None:
    for name, value in judged(best, policy):
        least[name] = max(least.get(name, 0.0), policy.anchor_share * value)
    highest = {}
    if math.isfinite(policy.anchor_loss_share):
        for name, value in best.losses():
            highest[name] = value + policy.anchor_loss_share * value + policy.anchor_loss_floor
    if math.isfinite(policy.anchor_margin_slack):
        for name, value in best.relative_margins():
            highest[name] = value + policy.anchor_margin_slack * max(1.0, abs(value))
    for name, value in highest.items():
        most[name] = min(most.get(name, math.inf), value)
