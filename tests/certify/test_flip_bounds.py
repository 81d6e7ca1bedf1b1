"""FLIP's Theorem 1: the bounds of a loss change hold to the last bit, are attained, and nonsense is refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mpmath import mp, mpf

from certify.flip.bounds import exact_loss_change, linear_change, linear_loss_bounds, loss_bounds
from tasks.errors import CertificationError


def exact(before, after, label):
    """L' - L of one sample; independent of everything under test. So many digits that 1 + 5e-324 is not 1."""
    with mp.workdps(380):
        loss = [mp.log(mp.fsum(mp.exp(mpf(float(z)) - mpf(float(row[label]))) for z in row)) for row in (before, after)]
        return loss[1] - loss[0]


def cases(count, seed):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        classes, scale = draw.integers(2, 12), 10.0 ** draw.uniform(-3, 2.5)
        before = draw.normal(size=(1, classes)) * 10.0 ** draw.uniform(-2, 2)
        yield before, before + draw.normal(size=(1, classes)) * scale, int(draw.integers(classes))


def test_every_bound_holds_against_many_digits():
    for before, after, label in cases(300, 1):
        found, truth = loss_bounds(before, after, label), exact(before[0], after[0], label)
        lower, upper = float(found.lower[0]), float(found.upper[0])
        below, above = float(found.tight_lower[0]), float(found.tight_upper[0])
        assert lower <= below <= truth <= above <= upper
        assert lower <= 0 <= upper
        assert exact_loss_change(before, after, label)[0] == pytest.approx(float(truth), rel=1e-11, abs=1e-13)


numbers = st.one_of(
    st.floats(-1e3, 1e3),
    st.sampled_from([0.0, -0.0, 1.0, 1e-300, 5e-324, 1e15, -1e15, 700.0, -800.0, 1.0 + 2**-52]),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 5).flatmap(lambda c: st.lists(st.tuples(numbers, numbers), min_size=c, max_size=c)), st.data())
def test_bounds_hold_for_any_logits(pairs, data):
    before, after = (np.array([row]) for row in zip(*pairs))
    label = data.draw(st.integers(0, len(pairs) - 1))
    found, truth = loss_bounds(before, after, label), exact(before[0], after[0], label)
    assert float(found.lower[0]) <= float(found.tight_lower[0]) <= truth
    assert truth <= float(found.tight_upper[0]) <= float(found.upper[0])


def test_the_linear_form_bounds_the_exact_products():
    draw = np.random.default_rng(3)
    for _ in range(60):
        classes, features = draw.integers(2, 6), draw.integers(1, 20)
        weight, change = draw.normal(size=(2, classes, features)) * 10.0 ** draw.uniform(-3, 1, (2, 1, 1))
        moved, inputs = draw.normal(size=classes), draw.uniform(-1, 1, (4, features))
        found = linear_loss_bounds(change, inputs, 1, bias_change=moved)
        with mp.workdps(60):
            for at, x in enumerate(inputs):
                shifts = [
                    mp.fsum(mpf(a) * mpf(b) for a, b in zip(row.tolist(), x.tolist())) + mpf(o)
                    for row, o in zip(change, moved.tolist())
                ]
                logits = [mp.fsum(mpf(a) * mpf(b) for a, b in zip(row.tolist(), x.tolist())) for row in weight]
                losses = [
                    mp.log(mp.fsum(mp.exp(z - zs[1]) for z in zs))
                    for zs in (logits, [z + a for z, a in zip(logits, shifts)])
                ]
                assert float(found.lower[at]) <= min(shifts) - shifts[1] <= losses[1] - losses[0]
                assert losses[1] - losses[0] <= max(shifts) - shifts[1] <= float(found.upper[at])


def test_the_lower_bound_is_zero_where_the_label_is_surely_least_and_then_the_loss_rises():
    before = np.array([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0]])
    found = loss_bounds(before, before + np.array([[0.0, 1.0, 2.0], [0.0, -1.0, 2.0]]), 0)
    assert found.target_least.tolist() == [True, False]
    assert found.lower.tolist()[0] == 0.0
    assert -1.0000001 < found.lower[1] < -1.0
    assert found.sum_lower <= found.lower.sum() < found.sum_tight_lower


def test_equal_shifts_change_nothing_and_sums_are_rounded_outwards():
    before = np.array([[1.0, 2.0, 4.0]])
    found = loss_bounds(before, before + 8.0, 1)  # exact in float64
    assert abs(found.lower[0]) < 1e-14
    assert abs(found.upper[0]) < 1e-14
    assert found.sum_lower <= found.lower[0] <= 0 <= found.upper[0] <= found.sum_upper
    many = loss_bounds(np.zeros((1000, 2)), np.tile([[0.0, 0.1]], (1000, 1)), 0)
    with mp.workdps(60):
        assert many.sum_upper >= mp.fsum(mpf(float(x)) for x in many.upper)
        assert many.sum_lower <= mp.fsum(mpf(float(x)) for x in many.lower)


def test_the_bounds_are_attained():
    """All mass on one class: the loss changes by exactly that class's difference."""
    before = np.array([[600.0, 0.0, 0.0]])
    after = before + np.array([[3.0, 0.0, -1.0]])
    assert loss_bounds(before, after, 1).upper[0] == pytest.approx(3.0, abs=1e-12)
    assert exact_loss_change(before, after, 1)[0] == pytest.approx(3.0, abs=1e-12)
    assert exact_loss_change(-before, -after, 1)[0] == pytest.approx(np.log((1 + np.e) / 2), abs=1e-12)


def test_a_network_is_bounded_by_its_logits():
    draw = torch.Generator().manual_seed(1)
    inputs, first = torch.randn(64, 6, generator=draw).double(), torch.randn(5, 6, generator=draw).double()
    second, labels = first + torch.randn(5, 6, generator=draw) / 3, torch.randint(0, 5, (64,), generator=draw)
    before, after = torch.tanh(inputs @ first.T) * 4, torch.tanh(inputs @ second.T) * 4
    loss = torch.nn.functional.cross_entropy
    truth = loss(after, labels, reduction="none") - loss(before, labels, reduction="none")
    found = loss_bounds(before, after, labels)
    assert (torch.from_numpy(found.tight_lower) <= truth + 1e-12).all()
    assert (truth <= torch.from_numpy(found.tight_upper) + 1e-12).all()
    assert (found.tight_upper - found.tight_lower < 0.8 * (found.upper - found.lower)).mean() > 0.5


@pytest.mark.parametrize(
    ("before", "after", "label", "says"),
    [
        ([[1.0, np.nan]], [[1.0, 0.0]], 0, "before must be finite"),
        ([[1.0, 0.0]], [[np.inf, 0.0]], 0, "after must be finite"),
        ([[1.0, 0.0]], [[1e200, 0.0]], 0, "after must be finite"),
        ([[1.0]], [[1.0]], 0, "2 classes or more"),
        ([[1.0, 0.0]], [[1.0, 0.0, 0.0]], 0, r"must have shape \(1, 2\)"),
        ([[1.0, 0.0]], [[1.0, 0.0]], 2, "whole numbers from 0 to 1"),
        ([[1.0, 0.0]], [[1.0, 0.0]], [0, 1], "labels must be 1 whole"),
        ([[1.0, 0.0]], [[1.0, 0.0]], [0.5], "labels must be 1 whole"),
        (np.zeros((0, 2)), np.zeros((0, 2)), 0, "at least one sample"),
        ([1.0, 0.0], [1.0, 0.0], 0, "2 dimensions"),
        ([["a", "b"]], [[1.0, 0.0]], 0, "numbers in 2 dimensions"),
    ],
)
def test_nonsense_is_refused(before, after, label, says):
    with pytest.raises(CertificationError, match=says):
        loss_bounds(before, after, label)


def test_the_linear_form_refuses_what_does_not_fit():
    with pytest.raises(CertificationError, match="inputs must have 3 columns"):
        linear_loss_bounds(np.zeros((2, 3)), np.zeros((1, 4)), 0)
    with pytest.raises(CertificationError, match="bias_change must be 2 numbers"):
        linear_change(np.zeros((2, 3)), np.zeros((1, 3)), np.zeros(3))
    with pytest.raises(CertificationError, match="2 classes or more"):
        linear_change(np.zeros((1, 3)), np.zeros((1, 3)))
