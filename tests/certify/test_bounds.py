"""Bounds: numbers of the papers, exact rational binomial tails, coverage, order laws, refusals."""

import math
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from certify.bounds import (
    ABSTAINED,
    VoteBounds,
    alpha_share_lower,
    clopper_pearson_lower,
    clopper_pearson_upper,
    crfl_top_two,
    hoeffding_lower,
    hoeffding_margin_upper,
    hoeffding_upper,
    simultaneous,
    two_stage,
)
from tasks.errors import CertificationError

ROOT = Path(__file__).parents[2]
LOWERS = {"clopper_pearson": clopper_pearson_lower, "hoeffding": hoeffding_lower}
UPPERS = {"clopper_pearson": clopper_pearson_upper, "hoeffding": hoeffding_upper}


def tail_from(k: int, draws: int, p: Fraction) -> Fraction:
    """P(X >= k) for X ~ Bin(draws, p), exactly."""
    top, bottom = p.numerator, p.denominator
    rest = bottom - top
    terms = (math.comb(draws, i) * top**i * rest ** (draws - i) for i in range(k, draws + 1))
    return Fraction(sum(terms), bottom**draws)


# ---- numbers


def test_hoeffding_margin_of_crfl() -> None:
    assert hoeffding_margin_upper(1000, 1e-3) == pytest.approx(0.0587697000, abs=5e-11)


@pytest.mark.parametrize(
    ("level", "margin"),
    [(1e-3 / 5000, 0.08782), (1e-3 / 2 / 5000, 0.08977), (1e-3 / 20 / 5000, 0.09597)],
)
def test_hoeffding_margin_jointly_over_5000_points(level: float, margin: float) -> None:
    assert hoeffding_margin_upper(1000, level) == pytest.approx(margin, abs=5e-6)


def test_caps_where_every_vote_agrees() -> None:
    assert clopper_pearson_lower(1000, 1000, 1e-3) == pytest.approx(0.993116, abs=5e-7)
    assert clopper_pearson_lower(1000, 1000, 1e-3 / 20) == pytest.approx(0.990145, abs=5e-7)
    assert hoeffding_lower(1000, 1000, 1e-3) == pytest.approx(0.941230, abs=5e-7)
    assert clopper_pearson_lower(1000, 1000, 1e-3 / 5000) == pytest.approx(0.98469, abs=5e-6)


def test_joint_certificates_spend_alpha_on_every_point() -> None:
    votes = np.array([[1000] + [0] * 9])
    joint = two_stage(votes.copy(), votes, 1000, 1e-3, num_points=5000)
    assert joint.pa_lower[0] == pytest.approx(0.98469, abs=5e-6)
    assert joint.pb_upper[0] == pytest.approx(1 - 0.98469, abs=5e-6)
    all_sides = simultaneous(votes, 1000, 1e-3, num_points=5000, interval="hoeffding")
    assert all_sides.pa_lower[0] == pytest.approx(1 - 0.09597, abs=5e-6)
    printed = crfl_top_two(votes, 1000, 1e-3, num_points=5000)
    assert printed.pa_lower[0] == pytest.approx(1 - 0.08782, abs=5e-6)
    assert printed.pb_upper[0] == pytest.approx(0.08782, abs=5e-6)


def test_crfl_clamp_is_off_unless_asked_for() -> None:
    assert hoeffding_lower(0, 1000, 1e-3) == 0.0
    assert hoeffding_upper(1000, 1000, 1e-3) == 1.0
    assert hoeffding_lower(0, 1000, 1e-3, clamp=1e-8) == 1e-8
    assert hoeffding_upper(1000, 1000, 1e-3, clamp=1e-8) == 1 - 1e-8
    bounds = crfl_top_two([[0, 1000]], 1000, 1e-3, clamp=1e-8)
    assert bounds.pa_lower[0] == pytest.approx(1 - 0.0587697, abs=1e-9)
    assert bounds.pb_upper[0] == pytest.approx(0.0587697, abs=1e-9)


# ---- the safe side, in exact arithmetic


@pytest.mark.parametrize(("draws", "alpha"), [(1, 0.3), (2, 1e-3), (9, 0.05), (24, 1e-3), (40, 5e-5), (40, 1e-12)])
def test_clopper_pearson_against_exact_tails(draws: int, alpha: float) -> None:
    counts = np.arange(draws + 1)
    lower, upper = clopper_pearson_lower(counts, draws, alpha), clopper_pearson_upper(counts, draws, alpha)
    assert lower[0] == 0.0
    assert upper[-1] == 1.0
    for k in range(1, draws + 1):
        assert tail_from(k, draws, Fraction(lower[k])) <= Fraction(alpha)
        assert tail_from(k, draws, Fraction(lower[k] + 2e-9)) > Fraction(alpha), "the lower bound is loose"
    for k in range(draws):
        assert 1 - tail_from(k + 1, draws, Fraction(upper[k])) <= Fraction(alpha)
        assert 1 - tail_from(k + 1, draws, Fraction(upper[k] - 2e-9)) > Fraction(alpha), "the upper bound is loose"


@pytest.mark.parametrize(("k", "alpha"), [(1, 1e-3), (501, 1e-3), (730, 5e-5), (999, 2e-7), (1000, 1e-3)])
def test_clopper_pearson_against_exact_tails_of_a_thousand_draws(k: int, alpha: float) -> None:
    lower = Fraction(float(clopper_pearson_lower(k, 1000, alpha)))
    upper = Fraction(float(clopper_pearson_upper(1000 - k, 1000, alpha)))
    assert tail_from(k, 1000, lower) <= Fraction(alpha) < tail_from(k, 1000, lower + Fraction(1, 10**9))
    assert tail_from(k, 1000, 1 - upper) <= Fraction(alpha) < tail_from(k, 1000, 1 - upper + Fraction(1, 10**9))


@pytest.mark.parametrize("alpha", [0.9, 0.05, 1e-3, 1e-3 / 20, 2e-7, 1e-90])
@pytest.mark.parametrize("draws", [1, 3, 100, 1000, 10**6])
def test_closed_forms_and_hoeffding_are_rounded_outwards(draws: int, alpha: float) -> None:
    with localcontext(prec=60):
        log_alpha = Decimal(alpha).ln()
        root, margin = (log_alpha / draws).exp(), (-log_alpha / (2 * draws)).sqrt()
        assert 0 <= root - Decimal(float(clopper_pearson_lower(draws, draws, alpha))) <= Decimal("1e-12")
        assert 0 <= Decimal(float(clopper_pearson_upper(0, draws, alpha))) - (1 - root) <= Decimal("1e-14")
        assert 0 <= Decimal(hoeffding_margin_upper(draws, alpha)) - margin <= margin * Decimal("3e-15")
        for k in {0, draws // 3, draws // 2, draws - 1, draws}:
            exact = Decimal(k) / draws
            below = max(Decimal(0), exact - margin) - Decimal(float(hoeffding_lower(k, draws, alpha)))
            above = Decimal(float(hoeffding_upper(k, draws, alpha))) - min(Decimal(1), exact + margin)
            assert 0 <= below <= Decimal("3e-15")
            assert 0 <= above <= Decimal("3e-15")


@given(st.floats(1e-60, 0.999), st.integers(1, 10**6))
def test_a_share_of_alpha_never_sums_to_more_than_alpha(alpha: float, num_claims: int) -> None:
    share = Fraction(alpha_share_lower(alpha, num_claims))
    assert Fraction(alpha) * (1 - Fraction(1, 10**15)) <= share * num_claims <= Fraction(alpha)


@given(st.integers(0, 500), st.sampled_from([0.3, 1e-3]))
def test_the_others_and_the_top_fill_one(votes: int, alpha: float) -> None:
    counts = np.array([votes, 500 - votes])
    bounds = two_stage(np.array([1, 0]), counts, 500, alpha)
    total = Fraction(float(bounds.pa_lower)) + Fraction(float(bounds.pb_upper))
    assert 1 <= total <= 1 + Fraction(1, 10**15) or bounds.pb_upper == 1.0


@pytest.mark.parametrize("shift", [1e-4, math.nan], ids=["too_tight", "nan"])
def test_a_wrong_start_of_the_inversion_is_walked_back(monkeypatch: pytest.MonkeyPatch, shift: float) -> None:
    inverse, complement = special.betaincinv, special.betainccinv
    monkeypatch.setattr(special, "betaincinv", lambda a, b, y: inverse(a, b, y) + shift)
    monkeypatch.setattr(special, "betainccinv", lambda a, b, y: complement(a, b, y) - shift)
    lower, upper = clopper_pearson_lower([3, 20], 30, 1e-3), clopper_pearson_upper([3, 20], 30, 1e-3)
    for k, low, high in zip([3, 20], lower, upper, strict=True):
        assert tail_from(k, 30, Fraction(low)) <= Fraction(1e-3)
        assert 1 - tail_from(k + 1, 30, Fraction(high)) <= Fraction(1e-3)


# ---- coverage


def failures_allowed(trials: int, alpha: float) -> int:
    """A correct level-alpha bound fails more often than this with probability 1e-6."""
    return int(stats.binom.ppf(1 - 1e-6, trials, alpha))


@pytest.mark.parametrize("name", LOWERS)
@pytest.mark.parametrize("p", [0.003, 0.2, 0.5, 0.77, 0.995])
def test_one_sided_coverage(name: str, p: float) -> None:
    draws, alpha, trials = 150, 0.05, 20_000
    counts = np.random.Generator(np.random.PCG64(11)).binomial(draws, p, size=trials)
    allowed = failures_allowed(trials, alpha)
    assert (LOWERS[name](counts, draws, alpha) > p).sum() <= allowed
    assert (UPPERS[name](counts, draws, alpha) < p).sum() <= allowed
    if 0.1 < p < 0.9:  # the same check refuses a bound that is one percent of the draws too tight
        assert (clopper_pearson_lower(counts, draws, alpha) + 0.01 > p).sum() > allowed
        assert (clopper_pearson_upper(counts, draws, alpha) - 0.01 < p).sum() > allowed


@pytest.mark.parametrize("name", LOWERS)
@pytest.mark.parametrize("draws", [1, 7, 60])
def test_exact_failure_probability_on_a_grid(name: str, draws: int) -> None:
    counts, alpha = np.arange(draws + 1), 0.05
    lower, upper = LOWERS[name](counts, draws, alpha), UPPERS[name](counts, draws, alpha)
    steps = np.concatenate([lower, upper])  # the failure probability jumps next to the bounds themselves
    grid = np.unique(np.clip(np.concatenate([np.linspace(0, 1, 301), steps, np.nextafter(steps, 0)]), 0, 1))
    for p in grid:
        chance = stats.binom.pmf(counts, draws, p)
        assert chance[lower > p].sum() <= alpha * (1 + 1e-9)
        assert chance[upper < p].sum() <= alpha * (1 + 1e-9)


def false_claims(bounds: VoteBounds, p: np.ndarray) -> np.ndarray:
    """Points whose pair is wrong about the true class probabilities, for the class it claims."""
    label = np.where(bounds.label == ABSTAINED, 0, bounds.label)
    others = np.array([np.delete(p, c).max() for c in range(len(p))])
    return (bounds.label != ABSTAINED) & ((bounds.pa_lower > p[label]) | (bounds.pb_upper < others[label]))


Certify = Callable[[np.ndarray, np.ndarray, int, float], VoteBounds]
CERTIFY: dict[str, Certify] = {
    "two_stage": lambda first, votes, draws, alpha: two_stage(first, votes, draws, alpha),
    "two_stage_hoeffding": lambda first, votes, draws, alpha: two_stage(
        first, votes, draws, alpha, interval="hoeffding"
    ),
    "simultaneous": lambda _, votes, draws, alpha: simultaneous(votes, draws, alpha),
    "simultaneous_hoeffding": lambda _, votes, draws, alpha: simultaneous(votes, draws, alpha, interval="hoeffding"),
}
PROBABILITIES = [[0.5, 0.5], [0.34, 0.33, 0.33], [0.7, 0.1, 0.1, 0.1], [0.1] * 10, [0.55, 0.45, 0.0]]


@pytest.mark.parametrize("name", CERTIFY)
@pytest.mark.parametrize("p", PROBABILITIES, ids=str)
def test_certificates_are_wrong_with_at_most_alpha(name: str, p: list[float]) -> None:
    draws, alpha, trials = 200, 0.05, 10_000
    random = np.random.Generator(np.random.PCG64(12))
    first, votes = random.multinomial(20, p, size=trials), random.multinomial(draws, p, size=trials)
    bounds = CERTIFY[name](first, votes, draws, alpha)
    assert false_claims(bounds, np.array(p)).sum() <= failures_allowed(trials, alpha)


def test_the_coverage_check_catches_bounds_from_the_draws_that_chose_the_class() -> None:
    draws, alpha, trials, p = 200, 0.05, 10_000, np.array([0.5, 0.5])
    votes = np.random.Generator(np.random.PCG64(12)).multinomial(draws, p, size=trials)
    assert false_claims(two_stage(votes.copy(), votes, draws, alpha), p).sum() > failures_allowed(trials, alpha)


def test_clear_votes_are_certified_and_close_ones_abstain() -> None:
    votes = np.array([[0, 180, 20], [101, 99, 0], [100, 100, 0], [0, 0, 0]])
    alike = [simultaneous(votes, 200, 0.01, interval=name) for name in ("clopper_pearson", "hoeffding")]
    for bounds in (*alike, crfl_top_two(votes, 200, 0.01)):
        assert bounds.label.tolist() == [1, ABSTAINED, ABSTAINED, ABSTAINED]
        assert ((bounds.pa_lower > bounds.pb_upper) == (bounds.label != ABSTAINED)).all()
    staged = two_stage(np.array([[0, 9, 1], [9, 1, 0], [1, 9, 0], [0, 1, 9]]), votes, 200, 0.01)
    assert staged.label.tolist() == [1, ABSTAINED, ABSTAINED, ABSTAINED]


def test_two_stage_keeps_a_badly_chosen_class_and_abstains() -> None:
    bounds = two_stage([1, 9], [190, 10], 200, 0.01)
    assert int(bounds.label) == ABSTAINED
    assert bounds.pa_lower == clopper_pearson_lower(10, 200, alpha_share_lower(0.01, 1))


def test_all_certificates_of_a_joint_claim_hold_together() -> None:
    points, draws, alpha, trials, p = 30, 100, 0.05, 1500, np.array([0.5, 0.5])
    random = np.random.Generator(np.random.PCG64(13))
    first = random.multinomial(10, p, size=(trials, points))
    votes = random.multinomial(draws, p, size=(trials, points))
    allowed = failures_allowed(trials, alpha)
    joint = two_stage(first, votes, draws, alpha, num_points=points)
    assert false_claims(joint, p).any(axis=1).sum() <= allowed
    separate = two_stage(first, votes, draws, alpha)
    assert false_claims(separate, p).any(axis=1).sum() > allowed, "without the share the joint claim fails more often"


def test_simultaneous_pb_covers_every_other_class() -> None:
    votes, draws, alpha = np.array([500, 300, 150, 50]), 1000, 1e-3
    bounds = simultaneous(votes, draws, alpha)
    level = alpha_share_lower(alpha, 8)
    assert bounds.pa_lower == clopper_pearson_lower(500, draws, level)
    assert bounds.pb_upper == clopper_pearson_upper(300, draws, level)
    only_rest = simultaneous([990, 10], draws, alpha)
    assert only_rest.pb_upper == min(1 - float(only_rest.pa_lower), float(clopper_pearson_upper(10, draws, level * 2)))


# ---- order laws


@settings(deadline=None)
@given(st.data(), st.sampled_from([*LOWERS]), st.integers(1, 3000), st.floats(1e-12, 0.5))
def test_bounds_enclose_the_share_and_follow_the_counts(
    data: st.DataObject, name: str, draws: int, alpha: float
) -> None:
    k = data.draw(st.integers(0, draws))
    pair = np.array([k, min(k + 1, draws)])
    lower, upper = LOWERS[name](pair, draws, alpha), UPPERS[name](pair, draws, alpha)
    assert (lower >= 0).all()
    assert (upper <= 1).all()
    assert (lower <= pair / draws).all()
    assert (pair / draws <= upper).all()
    assert lower[0] <= lower[1]
    assert upper[0] <= upper[1]


@settings(deadline=None)
@given(st.data(), st.sampled_from([*LOWERS]), st.integers(1, 3000), st.floats(1e-12, 0.3), st.floats(1.001, 3.0))
def test_a_larger_alpha_is_tighter(data: st.DataObject, name: str, draws: int, alpha: float, factor: float) -> None:
    k = data.draw(st.integers(0, draws))
    assert LOWERS[name](k, draws, alpha) <= LOWERS[name](k, draws, alpha * factor)
    assert UPPERS[name](k, draws, alpha) >= UPPERS[name](k, draws, alpha * factor)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 400), st.floats(1e-9, 0.5))
def test_upper_mirrors_lower(draws: int, k: int, alpha: float) -> None:
    k = min(k, draws)
    for name in LOWERS:
        assert UPPERS[name](k, draws, alpha) == pytest.approx(1 - LOWERS[name](draws - k, draws, alpha), abs=1e-9)


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=3, max_size=3), st.sampled_from(["simultaneous", "simultaneous_hoeffding"])
)
def test_a_class_order_and_a_batch_change_nothing(votes: list[int], name: str) -> None:
    row = np.array(votes)
    batch = CERTIFY[name](row, np.stack([row[[0, 1, 2]], row[[2, 0, 1]], np.array([120, 0, 0])]), 120, 0.05)
    alone = CERTIFY[name](row, row, 120, 0.05)
    assert batch.pa_lower[0] == batch.pa_lower[1] == alone.pa_lower
    assert batch.pb_upper[0] == batch.pb_upper[1] == alone.pb_upper
    back = {ABSTAINED: ABSTAINED, 0: 2, 1: 0, 2: 1}
    assert batch.label[0] == alone.label == back[int(batch.label[1])]


# ---- inputs


def test_torch_and_numpy_counts_agree_and_stay_untouched() -> None:
    votes = torch.tensor([[900, 100], [500, 500]])
    kept = votes.clone()
    for same in (votes, votes.to(torch.int32), votes.numpy(), votes.tolist(), votes.double()):
        bounds = simultaneous(same, 1000, 1e-3)
        assert bounds.label.tolist() == [0, ABSTAINED]
        assert bounds.pa_lower.dtype == np.float64
        assert bounds.pa_lower.tolist() == simultaneous(votes, 1000, 1e-3).pa_lower.tolist()
    assert torch.equal(votes, kept)
    assert simultaneous(np.zeros((0, 3), dtype=np.int64), 10, 0.1).label.shape == (0,)


NAN = float("nan")
REFUSED: dict[str, Callable[[], object]] = {
    "from 0 to 10": lambda: clopper_pearson_lower([-1], 10, 0.1),
    "from 0 to 10 draws": lambda: clopper_pearson_upper([11], 10, 0.1),
    "NaN": lambda: hoeffding_lower([NAN], 10, 0.1),
    "infinity": lambda: hoeffding_upper([math.inf], 10, 0.1),
    "fraction": lambda: clopper_pearson_lower([1.5], 10, 0.1),
    "array of bool": lambda: clopper_pearson_lower([True], 10, 0.1),
    "array of <U1": lambda: clopper_pearson_lower(["3"], 10, 0.1),
    "sum to 11": lambda: simultaneous([[6, 5]], 10, 0.1),
    "2 classes": lambda: simultaneous([[6]], 10, 0.1),
    "got shape": lambda: simultaneous(6, 10, 0.1),
    "alpha .* got 0": lambda: hoeffding_lower([1], 10, 0.0),
    "alpha .* got 1": lambda: clopper_pearson_lower([1], 10, 1.0),
    "alpha .* got nan": lambda: clopper_pearson_upper([1], 10, NAN),
    "alpha .* got -0.1": lambda: hoeffding_margin_upper(10, -0.1),
    "at least 1e-100": lambda: alpha_share_lower(1e-99, 100),
    "num_draws .* got 0": lambda: hoeffding_lower([0], 0, 0.1),
    "num_draws .* got 1e3": lambda: hoeffding_lower([0], "1e3", 0.1),  # type: ignore[arg-type]
    "num_draws .* got 10.0": lambda: hoeffding_lower([0], 10.0, 0.1),  # type: ignore[arg-type]
    "num_points .* got 0": lambda: simultaneous([6, 4], 10, 0.1, num_points=0),
    "num_claims .* got 0": lambda: two_stage([6, 4], [6, 4], 10, 0.1, num_points=0),
    "unknown interval": lambda: simultaneous([6, 4], 10, 0.1, interval="wald"),  # type: ignore[arg-type]
    "clamp": lambda: hoeffding_lower([1], 10, 0.1, clamp=-1e-8),
    "one selection draw": lambda: two_stage([0, 0], [6, 4], 10, 0.1),
    "shape of the counts": lambda: two_stage([[6, 4]], [6, 4], 10, 0.1),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_say_what_was_wanted(message: str) -> None:
    with pytest.raises(CertificationError, match=message.replace("1e3", "'1e3'")):
        REFUSED[message]()


def test_the_draws_that_chose_the_class_must_not_bound_it() -> None:
    numpy_votes, torch_votes = np.array([[180, 20]]), torch.tensor([[180, 20]], dtype=torch.int32)
    for votes in (numpy_votes, torch_votes):
        with pytest.raises(CertificationError, match="fresh draws"):
            two_stage(votes, votes, 200, 0.01)


def test_bounds_and_record_need_neither_torch_nor_flower() -> None:
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'flwr', 'ray', 'sklearn']))"
    code = f"{block}; import certify.bounds, certify.record; print(certify.bounds.simultaneous([9, 1], 10, 0.5).label)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0"), done.stderr
