"""The trigger-recovery radius: no error inside it breaks its claim, one just outside does; the counts that follow."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from certify.flip.counts import compare, count
from certify.flip.radius import printed_norm_radius, recovery_radius, worst_errors
from tasks.errors import CertificationError


def least(change, x, target, moved=None):
    """Whether the target is an argmin of dW x + db, in exact arithmetic."""
    offsets = [0.0] * len(change) if moved is None else list(moved)
    shifts = [
        sum((Fraction(float(a)) * Fraction(b) for a, b in zip(row, x)), Fraction(float(o)))
        for row, o in zip(change, offsets)
    ]
    return shifts[target] == min(shifts)


def vertices(x, radius):
    """All corners of the l-infinity ball around x, as exact fractions."""
    x, radius = [Fraction(float(v)) for v in x], Fraction(float(radius))
    for signs in itertools.product((-1, 1), repeat=len(x)):
        yield [v + s * radius for v, s in zip(x, signs)]


def drawn(seed, classes=4, features=5, samples=40):
    """Models and samples most of which have a radius: the target's row lies below the others' on the samples."""
    draw = np.random.default_rng(seed)
    change, inputs = draw.normal(size=(classes, features)), draw.uniform(0, 1, (samples, features))
    change[1] -= 1.0
    return change, inputs


@pytest.mark.parametrize("seed", range(4))
def test_no_vertex_inside_breaks_it_and_one_just_outside_does(seed):
    change, inputs = drawn(seed)
    found = recovery_radius(change, inputs, 1)
    assert found.certified.sum() > 10
    for x, radius in zip(inputs[found.certified][:8], found.radius[found.certified][:8]):
        assert all(least(change, corner, 1) for corner in vertices(x, radius))  # a linear claim: corners are enough
    outside = inputs - worst_errors(change, found, 1.01 * found.radius)
    for x in outside[found.certified]:
        assert not least(change, [Fraction(float(v)) for v in x], 1)


def test_a_bias_and_a_support_count():
    change, inputs = drawn(9)
    moved, support = np.array([0.5, -0.5, 0.5, 0.5]), np.array([True, True, False, False, True])
    plain, with_bias = recovery_radius(change, inputs, 1), recovery_radius(change, inputs, 1, bias_change=moved)
    assert (with_bias.radius >= plain.radius).all()
    found = recovery_radius(change, inputs, 1, bias_change=moved, support=support)
    assert (found.radius >= with_bias.radius).all()
    for x, radius in zip(inputs[found.certified][:6], found.radius[found.certified]):
        for corner in vertices(x, radius):
            held = [c if s else Fraction(float(v)) for c, s, v in zip(corner, support, x)]
            assert least(change, held, 1, moved)
    outside = inputs - worst_errors(change, found, 1.01 * found.radius, support=support)
    assert (outside[:, ~support] == inputs[:, ~support]).all()
    for x in outside[found.certified]:
        assert not least(change, [Fraction(float(v)) for v in x], 1, moved)


values = st.floats(-4, 4, allow_subnormal=True)


@settings(max_examples=200, deadline=None)
@given(st.lists(values, min_size=9, max_size=9), st.lists(values, min_size=3, max_size=3), st.integers(0, 2))
def test_the_radius_is_never_above_the_exact_one(weights, x, target):
    change = np.array(weights).reshape(3, 3)
    found = recovery_radius(change, [x], target).radius[0]
    for j in {0, 1, 2} - {target}:
        row = [Fraction(a) - Fraction(b) for a, b in zip(change[j].tolist(), change[target].tolist())]
        lead, norm = sum(a * Fraction(b) for a, b in zip(row, x)), sum(map(abs, row))
        if norm > 0:
            assert found == 0 or Fraction(found) <= lead / norm


def test_the_papers_denominator_gives_a_smaller_radius():
    change, inputs = drawn(2, features=30)
    ours, printed = recovery_radius(change, inputs, 1), printed_norm_radius(change, inputs, 1)
    assert (printed.radius <= ours.radius).all()
    assert (printed.radius[ours.certified] < ours.radius[ours.certified]).all()


def test_rows_that_are_equal_leave_nothing_to_recover():
    inputs = np.array([[0.25, 0.5], [1.0, 0.0]])
    same = recovery_radius(np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0]]), inputs, 0)
    assert np.isinf(same.radius).all()
    rises = recovery_radius(np.ones((2, 2)), inputs, 0, bias_change=[0.0, 1.0])
    falls = recovery_radius(np.ones((2, 2)), inputs, 0, bias_change=[0.0, -1.0])
    assert np.isinf(rises.radius).all()
    assert falls.radius.tolist() == [0.0, 0.0]
    one_of_two = recovery_radius(np.array([[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]), inputs, 0)
    assert one_of_two.radius == pytest.approx([0.375, 0.5])
    assert one_of_two.limiting.tolist() == [2, 2]
    assert one_of_two.radius[0] < 0.375  # rounded down


def test_a_target_that_is_not_least_has_no_certificate():
    found = recovery_radius(np.array([[1.0], [0.0]]), np.array([[1.0], [-1.0], [0.0]]), 0)
    assert found.radius.tolist()[0::2] == [0.0, 0.0]
    assert found.certified.tolist() == [False, True, False]


def test_each_sample_may_have_its_own_target():
    change, inputs = drawn(5)
    targets = np.arange(len(inputs)) % 4
    mixed = recovery_radius(change, inputs, targets)
    for target in range(4):
        alone = recovery_radius(change, inputs, target)
        assert (mixed.radius[targets == target] == alone.radius[targets == target]).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((np.full((2, 2), np.nan), np.zeros((1, 2)), 0), "change must be finite"),
        ((np.zeros((2, 2)), np.array([[np.inf, 0]]), 0), "recovered must be finite"),
        ((np.zeros((2, 2)), np.zeros((1, 3)), 0), "recovered must have 2 columns"),
        ((np.zeros((2, 2)), np.zeros((1, 2)), 7), "whole numbers from 0 to 1"),
    ],
)
def test_nonsense_is_refused(arguments, says):
    with pytest.raises(CertificationError, match=says):
        recovery_radius(*arguments)


def test_a_support_of_another_shape_is_refused():
    with pytest.raises(CertificationError, match="support must be 2 truth values"):
        recovery_radius(np.zeros((2, 2)), np.zeros((1, 2)), 0, support=[1.0, 0.0])


# ---- Corollary 1


def random_models(seed, samples=60_000, classes=10):
    """Logits without and with a defence; in all samples the target, class 2, is the least of the differences."""
    draw = np.random.default_rng(seed)
    before = draw.normal(size=(samples, classes)) * draw.uniform(0.2, 3, (samples, 1))
    change = draw.normal(size=(samples, classes)) * draw.uniform(0.1, 4, (samples, 1))
    change[:, 2] = change.min(axis=1) - draw.exponential(0.2, samples)
    return before, before + change


@pytest.mark.parametrize("tau", [0.0, 0.3, 0.4, 0.7])
def test_no_covered_sample_becomes_an_accepted_attack(tau):
    found = compare(*random_models(4), 2, tau)
    assert found.covered == 60_000
    assert (found.new_attacks, found.new_attacks_covered, found.newly_above) == (0, 0, 0)
    assert found.after.accepted_wanted <= found.before.accepted_wanted
    assert found.after.wanted_below >= found.before.wanted_below


def test_the_corollary_as_printed_fails():
    """Fewer samples are rejected after the defence than before, though Theorem 2's condition holds for all of them."""
    found = compare(*random_models(4), 2, 0.3)
    assert found.covered == found.before.samples
    assert found.after.rejected < found.before.rejected / 2
    assert found.newly_accepted > 1000


def test_a_rising_loss_alone_is_not_enough_below_one_half():
    before = np.log([[0.34, 0.33, 0.33]])
    after = np.log([[0.335, 0.3325, 0.3325]])  # p_0 falls, but class 0 was the argmax before: nothing new
    assert compare(before, after, 0, 0.3).new_attacks == 0
    before, after = np.log([[0.36, 0.04, 0.6]]), np.log([[0.35, 0.33, 0.32]])
    found = compare(before, after, 0, 0.3)
    assert (found.new_attacks, found.covered, found.new_attacks_covered) == (1, 0, 0)


def test_counts_of_one_model_by_hand():
    p = np.array([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.4, 0.35, 0.25], [0.05, 0.9, 0.05]])
    found = count(np.log(p), 1, 0.55)
    assert (found.samples, found.accepted_wanted, found.rejected, found.wanted_below) == (4, 2, 2, 2)
    assert count(np.log(p), [0, 1, 0, 0], 0.0).accepted_wanted == 3
    assert count(np.zeros((2, 4)), 0, 0.25).rejected == 0  # a confidence of exactly tau is accepted


@pytest.mark.parametrize("tau", [-0.1, 1.5, float("nan"), True])
def test_tau_is_a_confidence(tau):
    with pytest.raises(CertificationError, match="tau must be from 0 to 1"):
        count(np.zeros((1, 2)), 0, tau)
