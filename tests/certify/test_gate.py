"""The gate: the paper's rule on the paper's numbers, what it lets through, and what the hardened one adds."""

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from certify.gate import (
    HARDENED,
    PAPER,
    BoundMetrics,
    GateMetrics,
    GateState,
    decide,
    policy,
)
from tasks.errors import CertificationError, ConfigError


def metrics(
    normal: float = 0.9, pgd: float = 0.8, certified: float = 0.7, loss: float = 0.5, *, margin: Any = ...,
    temperature: Any = ..., relative: float | None = 0.0, protocol: str = "p", eps: float = 0.1,
) -> GateMetrics:  # fmt: skip
    """Return metrics; the probes find what cross-entropy PGD finds unless told otherwise, None is not measured."""
    margin, temperature = (pgd if probe is ... else probe for probe in (margin, temperature))
    bound = BoundMetrics(eps=eps, certified_accuracy=certified, mean_loss=loss, relative_margin=relative)
    return GateMetrics(
        protocol=protocol, normal_accuracy=normal, pgd_accuracy=pgd, bounds=(bound,),
        margin_pgd_accuracy=margin, temperature_pgd_accuracy=temperature,
    )  # fmt: skip


def after(last: GateMetrics, best: GateMetrics | None = None, num_accepted: int = 5) -> GateState:
    return GateState(last_accepted=last, best=best or last, num_accepted=num_accepted)


# The paper's Table 1: normal and PGD accuracy, then certified accuracy and mean loss at each radius (MNIST, CIFAR-10).
TABLE = {
    "mnist": {
        "PGD": (98.78, 92.03, {0.1: (91.4, 0.15), 0.15: (33.4, 2.72), 0.25: (0.0, 32.96)}),
        "Distilled": (97.23, 95.22, {0.1: (0.0, 8.5e3), 0.15: (0.0, 2.0e4), 0.25: (0.0, 4.4e4)}),
        "Backdoor": (98.81, 94.10, {0.1: (0.0, 50.81), 0.15: (0.0, 96.47), 0.25: (0.0, 202.43)}),
    },
    "cifar": {
        "PGD": (72.71, 40.24, {1 / 255: (60.0, 0.13), 4 / 255: (0.0, 596.0), 8 / 255: (0.0, 5.4e3)}),
        "Distilled": (78.35, 44.17, {1 / 255: (0.0, 2.1e6), 4 / 255: (0.0, 9.5e7), 8 / 255: (0.0, 3.7e8)}),
        "Backdoor": (74.70, 32.47, {1 / 255: (41.0, 1.14), 4 / 255: (0.0, 2.3e3), 8 / 255: (0.0, 1.5e4)}),
    },
}


def of_table(data: str, model: str) -> GateMetrics:
    normal, pgd, bounds = TABLE[data][model]
    return GateMetrics(
        protocol=data, normal_accuracy=normal / 100, pgd_accuracy=pgd / 100,
        bounds=tuple(BoundMetrics(eps=e, certified_accuracy=c / 100, mean_loss=m) for e, (c, m) in bounds.items()),
    )  # fmt: skip


@pytest.mark.parametrize("data", TABLE)
@pytest.mark.parametrize("attack", ["Distilled", "Backdoor"])
@pytest.mark.parametrize("rule", [PAPER, HARDENED], ids=lambda rule: rule.name)
def test_the_papers_attacks_are_rejected_after_the_papers_model(data: str, attack: str, rule: Any) -> None:
    decision = decide(of_table(data, attack), after(of_table(data, "PGD")), rule)
    assert not decision.accepted
    assert any("certified accuracy" in reason for reason in decision.reasons)
    assert any("mean loss" in reason for reason in decision.reasons)
    assert decision.state == after(of_table(data, "PGD"))


def test_plain_and_pgd_accuracy_alone_would_let_the_distilled_model_through() -> None:
    decision = decide(of_table("mnist", "Distilled"), after(of_table("mnist", "PGD")), PAPER)
    assert not [reason for reason in decision.reasons if reason.startswith(("normal", "PGD"))]


@pytest.mark.parametrize("rule", [PAPER, HARDENED], ids=lambda rule: rule.name)
def test_the_same_model_again_is_accepted_and_becomes_the_last(rule: Any) -> None:
    decision = decide(metrics(), after(metrics()), rule)
    assert decision.accepted
    assert not decision.reasons
    assert decision.state.num_accepted == 6
    assert decision.state.last_accepted == metrics()


def test_the_first_candidate_has_no_baseline_and_is_recorded() -> None:
    decision = decide(metrics(), GateState(), PAPER)
    assert decision.accepted
    assert decision.notes
    assert decision.state == GateState(last_accepted=metrics(), best=metrics(), num_accepted=1)


# ---- the paper's rule


@pytest.mark.parametrize("before", [0.1, 0.3, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("name", ["normal", "pgd", "certified"])
def test_nine_tenths_of_an_accuracy_are_enough_and_less_is_not(name: str, before: float) -> None:
    last = after(metrics(**{name: before}))
    assert decide(metrics(**{name: 0.9 * before}), last, PAPER).accepted
    assert decide(metrics(**{name: round(0.9 * before, 12)}), last, PAPER).accepted
    refused = decide(metrics(**{name: 0.9 * before - 1e-9}), last, PAPER)
    assert not refused.accepted
    assert len(refused.reasons) == 1


@pytest.mark.parametrize("before", [0.15, 1.0, 3.0, 4.4e4])
def test_the_papers_loss_may_vary_by_a_tenth_either_way(before: float) -> None:
    last = after(metrics(loss=before))
    for share in (0.9, 1.1):
        assert decide(metrics(loss=share * before), last, PAPER).accepted
    for share in (0.8999, 1.1001):
        assert not decide(metrics(loss=share * before), last, PAPER).accepted


def test_a_falling_loss_is_refused_by_the_paper_and_welcome_when_hardened() -> None:
    last = after(metrics(loss=10.0))
    assert not decide(metrics(loss=5.0), last, PAPER).accepted
    assert decide(metrics(loss=5.0), last, HARDENED).accepted


def test_a_loss_of_zero_freezes_the_papers_gate_but_not_one_with_a_floor() -> None:
    last = after(metrics(loss=0.0))
    assert not decide(metrics(loss=1e-6), last, PAPER).accepted
    assert decide(metrics(loss=0.01), last, HARDENED).accepted
    assert not decide(metrics(loss=0.0101), last, HARDENED).accepted


@pytest.mark.parametrize("rule", [PAPER, HARDENED], ids=lambda rule: rule.name)
@pytest.mark.parametrize("state", [GateState(), after(metrics())], ids=["first", "later"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["normal", "pgd", "certified", "loss"])
def test_what_is_not_finite_is_rejected(name: str, value: float, state: GateState, rule: Any) -> None:
    if name == "loss" and value < 0:
        with pytest.raises(CertificationError, match="0 or more"):
            metrics(loss=value)
        return
    decision = decide(metrics(**{name: value}), state, rule)
    assert not decision.accepted
    assert decision.state == state


def test_an_accuracy_of_zero_is_said_to_show_nothing() -> None:
    decision = decide(metrics(certified=0.0), after(metrics(certified=0.0)), PAPER)
    assert decision.accepted
    assert "uninformative: certified accuracy at 0.1 of the last accepted model is 0, so any value passes" in (
        decision.notes
    )
    assert any("nothing is certified at 0.1" in note for note in decision.notes)
    frozen = decide(metrics(loss=0.1), after(metrics(loss=0.0)), PAPER)
    assert not frozen.accepted
    assert any("mean loss at 0.1 of the last accepted model is 0" in note for note in frozen.notes)
    blind = decide(replace(metrics(margin=None, temperature=None), bounds=()), GateState(), PAPER)
    assert blind.accepted
    assert any("no radius" in note for note in blind.notes)
    assert any("no probe" in note for note in blind.notes)


def test_the_paper_does_not_judge_probes_and_says_so() -> None:
    decision = decide(metrics(margin=0.0, temperature=0.0), after(metrics()), PAPER)
    assert decision.accepted
    assert any(note.startswith("not judged by paper: margin-loss") for note in decision.notes)


# ---- what hardening adds


def test_small_allowed_steps_end_at_the_anchor() -> None:
    def rounds(rule: Any) -> int:
        state, accuracy, accepted = after(metrics(normal=0.9)), 0.9, 0
        for _ in range(30):
            accuracy *= 0.91
            decision = decide(metrics(normal=accuracy), state, rule)
            state, accepted = decision.state, accepted + decision.accepted
        return accepted

    assert rounds(PAPER) == 30  # from 0.9 to 0.05, each step allowed
    assert rounds(HARDENED) == 2  # 0.91^3 is below 0.8


def test_the_best_is_kept_metric_by_metric() -> None:
    state = after(metrics(normal=0.9, pgd=0.7))
    state = decide(metrics(normal=0.85, pgd=0.8, loss=0.4), state, HARDENED).state
    assert state.best == metrics(normal=0.9, pgd=0.8, loss=0.4)
    assert state.last_accepted == metrics(normal=0.85, pgd=0.8, loss=0.4)


def test_a_rejected_round_leaves_the_anchor_alone() -> None:
    state = after(metrics(normal=0.5))
    assert decide(metrics(normal=1.0, pgd=0.1), state, HARDENED).state == state


def test_the_warm_up_accepts_and_then_the_gate_closes() -> None:
    rule, state = policy("hardened", warmup_rounds=2), GateState()
    for normal in (0.9, 0.5):
        decision = decide(metrics(normal=normal), state, rule)
        assert decision.accepted
        state = decision.state
    assert state.best == metrics(normal=0.5)  # what the warm-up began with is no anchor
    assert not decide(metrics(normal=0.35), state, rule).accepted


def test_bad_models_of_the_warm_up_never_become_the_anchor() -> None:
    state = GateState()
    for normal, pgd in ((0.1, 0.1), (0.1, 0.0), (0.09, 0.0), (0.9, 0.2)):
        decision = decide(metrics(normal, pgd, 0.0), state, HARDENED)
        assert decision.accepted
        assert any("below the floor 0.3" in note for note in decision.notes)
        state = decision.state
        assert state.best is None
    state = decide(metrics(0.6, 0.4, 0.0), state, HARDENED).state
    assert state.best == metrics(0.6, 0.4, 0.0)
    assert not decide(metrics(0.1, 0.1, 0.0), state, HARDENED).accepted


def test_the_warm_up_does_not_fall_back_below_the_floor() -> None:
    state = decide(metrics(), GateState(), HARDENED).state
    decision = decide(metrics(normal=0.2), state, HARDENED)
    assert not decision.accepted
    assert decision.reasons == (
        "warm-up: normal accuracy 0.2 is below the floor 0.3, which the last accepted had reached",
    )


@pytest.mark.parametrize("drift", ["loss", "relative"])
def test_losses_and_relative_margins_cannot_drift_where_nothing_is_certified(drift: str) -> None:
    values, state, accepted = {"loss": 1.0, "relative": -0.5}, GateState(), 0
    for _ in range(40):
        decision = decide(metrics(certified=0.0, **values), state, HARDENED)
        if not decision.accepted:
            break
        state, accepted = decision.state, accepted + 1
        step = 0.1 * values["loss"] + 0.009 if drift == "loss" else 0.24 * max(1, abs(values["relative"]))
        values[drift] += step
    assert decision.reasons
    assert all(reason.startswith("drift: ") for reason in decision.reasons)
    assert accepted < 10
    assert state.last_accepted is not None
    assert state.last_accepted.bounds[0].mean_loss <= 1.6 * 1.2
    assert (state.last_accepted.bounds[0].relative_margin or 0.0) <= 0.5


@pytest.mark.parametrize(
    ("candidate", "missing"),
    [
        (metrics(margin=None), "margin-loss PGD"),
        (metrics(temperature=None), "temperature PGD"),
        (metrics(relative=None), "relative margin at 0.1"),
        (replace(metrics(), bounds=()), "bounds at a radius above 0"),
        (metrics(eps=0.0), "bounds at a radius above 0"),
    ],
)
@pytest.mark.parametrize("later", [False, True])
def test_hardened_rejects_what_was_not_measured(candidate: GateMetrics, missing: str, later: bool) -> None:
    decision = decide(candidate, after(candidate) if later else GateState(), HARDENED)
    assert not decision.accepted
    assert any(reason.startswith("not measured") and missing in reason for reason in decision.reasons)
    assert decide(candidate, GateState(), PAPER).accepted


# Accuracies of a replica of the paper's MNIST network under PGD at 0.25: cross-entropy at 1 and 100, margin loss.
@pytest.mark.parametrize("state", [GateState(), after(metrics(0.9, 0.8, margin=0.7, temperature=0.7, relative=0.0))])
def test_distillation_is_seen_by_either_probe_even_in_the_first_round(state: GateState) -> None:
    distilled = metrics(0.952, 0.894, margin=0.0, temperature=0.0, relative=0.0)
    decision = decide(distilled, state, HARDENED)
    assert not decision.accepted
    assert sum(reason.startswith("masked gradients") for reason in decision.reasons) == 2
    assert decide(metrics(0.976, 0.768, margin=0.774, temperature=0.852), GateState(), HARDENED).accepted


def test_the_relative_margin_is_gated_where_logits_were_scaled_down_to_fit() -> None:
    last = after(metrics(relative=-0.45))
    assert not decide(metrics(relative=1.54), last, HARDENED).accepted
    assert decide(metrics(relative=-0.3), last, HARDENED).accepted
    assert decide(metrics(relative=8.8), after(metrics(relative=8.3)), HARDENED).accepted


# ---- laws


share = st.floats(0, 1)
loss = st.floats(0, 1e6)


@given(share, share, share, loss, share, share, share, loss)
def test_the_papers_rule_is_the_papers_sentence(
    n0: Any, p0: Any, c0: Any, l0: Any, n1: Any, p1: Any, c1: Any, l1: Any
) -> None:
    close = [abs(now - 0.9 * then) < 1e-9 for now, then in ((n1, n0), (p1, p0), (c1, c0))]
    assume(not any(close) and abs(abs(l1 - l0) - 0.1 * l0) > 1e-9 * (1 + l0))
    wanted = n1 >= 0.9 * n0 and p1 >= 0.9 * p0 and c1 >= 0.9 * c0 and abs(l1 - l0) <= 0.1 * l0
    assert decide(metrics(n1, p1, c1, l1), after(metrics(n0, p0, c0, l0)), PAPER).accepted == wanted


@given(share, share, share, loss, share, share, share, loss, share, share, loss)
def test_a_better_candidate_is_never_worse_off(
    n0: Any, p0: Any, c0: Any, l0: Any, n1: Any, p1: Any, c1: Any, l1: Any, dn: Any, dc: Any, dl: Any
) -> None:
    state = after(metrics(n0, p0, c0, l0))
    better = metrics(min(1.0, n1 + dn), p1, min(1.0, c1 + dc), max(0.0, l1 - dl))
    if decide(metrics(n1, p1, c1, l1), state, HARDENED).accepted:
        assert decide(better, state, HARDENED).accepted


@given(st.tuples(share, share, share, loss, share, share, share, loss))
def test_accepting_and_giving_reasons_exclude_each_other(values: tuple[float, ...]) -> None:
    state = after(metrics(*values[:4]))
    decision = decide(metrics(*values[4:]), state, HARDENED)
    assert decision.accepted == (not decision.reasons)
    assert decision.accepted or decision.state == state
    assert decide(metrics(*values[4:]), state, HARDENED) == decision


# ---- what cannot be decided


def test_models_measured_differently_are_not_compared() -> None:
    for other in (metrics(protocol="q"), metrics(eps=0.2), metrics(margin=None)):
        with pytest.raises(CertificationError, match="same"):
            decide(other, after(metrics()), PAPER)


def test_what_no_measurement_gives_is_refused() -> None:
    with pytest.raises(CertificationError, match="from 0 to 1"):
        metrics(normal=1.5)
    bound = metrics().bounds[0]
    with pytest.raises(CertificationError, match="ascending"):
        replace(metrics(), bounds=(bound, bound))
    with pytest.raises(CertificationError, match="where one was accepted"):
        GateState(num_accepted=3)
    with pytest.raises(CertificationError, match="no gate accepts"):
        after(metrics(normal=math.nan))


def test_policies_are_found_by_name_and_their_settings_checked() -> None:
    assert policy("paper") == PAPER
    assert policy("hardened", loss_share=0.2).loss_share == 0.2
    for name, options in [
        ("strict", {}),
        ("paper", {"nothing": 1}),
        ("paper", {"loss_share": -1.0}),
        ("paper", {"loss_share": math.nan}),
        ("paper", {"loss_share": "0.1"}),
        ("paper", {"loss_share": True}),
        ("paper", {"accuracy_share": 1.5}),
        ("paper", {"two_sided": 1}),
        ("paper", {"warmup_rounds": 1.0}),
        ("paper", {"name": "mine"}),
        ("hardened", {"accuracy_share": 10**400}),
        ("hardened", {"anchor_loss_share": 10**400}),
        ("hardened", {"warmup_rounds": 10**9}),
        ("hardened", {"probes": 1}),
        ("hardened", {"accuracy_floor": 1.1}),
    ]:
        with pytest.raises(ConfigError):
            policy(name, **options)
