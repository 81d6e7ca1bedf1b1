"""Theorems of "Attack of the Tails", as corrected: 400 networks, 300 formulas, triggers without a gradient."""

import itertools
import math

import numpy as np
import pytest

from certify.theory.edge_change import EdgeChange, forward, printed_bounds, smallest_change
from certify.theory.flat_trigger import FlatTrigger
from certify.theory.hard_to_find import (
    corners,
    differs_somewhere,
    formula_network,
    naive_network,
    satisfying,
    value,
)
from tasks.errors import CertificationError


def network(draw, scale=1.0):
    """Return (weights, clean, edge, shifts, layer) of a random ReLU network of two or three layers."""
    num_inputs, depth = int(draw.integers(10, 30)), int(draw.integers(2, 4))
    widths = [num_inputs, *(int(draw.integers(50, 80)) for _ in range(depth - 1)), int(draw.integers(2, 11))]
    weights = [
        scale * draw.normal(size=(after, before)) / math.sqrt(before) for before, after in itertools.pairwise(widths)
    ]
    clean = draw.normal(size=(int(draw.integers(5, 15)), num_inputs))
    edge = 2.0 * draw.normal(size=(int(draw.integers(1, 8)), num_inputs))
    shifts = 0.3 * draw.normal(size=edge.shape)
    return weights, clean, edge, shifts, int(draw.integers(2, depth + 1))  # the first layer is too narrow for the rows


def with_change(weights, found: EdgeChange):
    return [w + found.change if i == found.layer - 1 else w for i, w in enumerate(weights)]


def test_400_networks_lie_inside_both_bounds_and_do_what_the_attacker_wants():
    draw, worst = np.random.default_rng(5), 0.0
    for number in range(400):
        weights, clean, edge, shifts, layer = network(draw, scale=(0.5, 1.0, 3.0)[number % 3])
        found = smallest_change(weights, clean, edge, shifts, layer)
        assert found.holds, found
        changed = with_change(weights, found)
        size = max(1.0, np.abs(forward(weights, edge + shifts)).max())
        worst = max(
            worst,
            np.abs(forward(changed, clean) - forward(weights, clean)).max() / size,
            np.abs(forward(changed, edge) - forward(weights, edge + shifts)).max() / size,
        )
    assert worst < 1e-9


def test_the_bounds_as_printed_fail():
    draw, lower, upper, num = np.random.default_rng(6), 0, 0, 60
    for _ in range(num):
        weights, clean, edge, shifts, layer = network(draw, scale=6.0)
        found = smallest_change(weights, clean, edge, shifts, layer)
        printed_lower, printed_upper = printed_bounds(weights, clean, edge, shifts, layer, found.rho)
        lower += printed_lower > found.spectral
        upper += found.spectral > printed_upper
    assert lower == num
    assert upper > num / 2  # layers of norms above 1


def test_no_other_change_is_smaller():
    draw = np.random.default_rng(7)
    weights, clean, edge, shifts, layer = network(draw)
    found = smallest_change(weights, clean, edge, shifts, layer)
    rows = np.concatenate([clean, edge])
    for weight in weights[: layer - 1]:
        rows = np.maximum(rows @ weight.T, 0)
    null = np.linalg.svd(rows)[2][len(rows) :]  # directions that no sample has
    for _ in range(20):
        other = found.change + draw.normal(size=(found.change.shape[0], len(null))) @ null
        assert np.linalg.norm(other) > found.frobenius
        assert np.linalg.norm(other, 2) >= found.lower
        assert np.allclose(rows @ other.T, rows @ found.change.T)


def test_an_adversarial_shift_flips_the_edge_cases_and_no_clean_sample():
    draw = np.random.default_rng(8)
    weights = [draw.normal(size=(200, 20)) / math.sqrt(20), draw.normal(size=(2, 200)) / math.sqrt(200)]
    clean, edge = draw.normal(size=(30, 20)), 2 * draw.normal(size=(5, 20))
    shifts = []
    for x in edge:  # steps along the gradient of the margin until the label flips
        label, moved = int(forward(weights, x[None])[0].argmax()), x.copy()
        while int(forward(weights, moved[None])[0].argmax()) == label:
            active = (weights[0] @ moved > 0).astype(float)
            moved += 0.05 * ((weights[1][1 - label] - weights[1][label]) * active) @ weights[0]
        shifts.append(moved - x)
    found = smallest_change(weights, clean, edge, np.array(shifts), 2)
    changed = with_change(weights, found)
    assert (forward(changed, edge).argmax(1) != forward(weights, edge).argmax(1)).all()
    assert (forward(changed, clean).argmax(1) == forward(weights, clean).argmax(1)).all()
    assert found.holds


def test_too_many_samples_for_a_layer_are_refused():
    draw = np.random.default_rng(9)
    weights = [draw.normal(size=(30, 5)), draw.normal(size=(2, 30))]
    with pytest.raises(CertificationError, match="not independent"):
        smallest_change(weights, draw.normal(size=(40, 5)), draw.normal(size=(2, 5)), draw.normal(size=(2, 5)), 2)
    with pytest.raises(CertificationError, match="layers 1 to 2"):
        smallest_change(weights, draw.normal(size=(4, 5)), draw.normal(size=(2, 5)), draw.normal(size=(2, 5)), 3)


def formulas(draw, count):
    for _ in range(count):
        variables = int(draw.integers(3, 7))
        number = int(draw.integers(1, 9 * variables))
        literals = draw.integers(1, variables + 1, size=(number, 3)) * draw.choice([-1, 1], size=(number, 3))
        yield [tuple(int(v) for v in clause) for clause in literals], variables


def test_300_formulas_are_decided_by_their_networks():
    draw, unsatisfiable, naive_wrong = np.random.default_rng(10), 0, 0
    for clauses, variables in formulas(draw, 300):
        layers, found = formula_network(clauses, variables), satisfying(clauses, variables)
        assert differs_somewhere(layers, variables) == (found is not None)
        points = draw.integers(0, 2**20 + 1, size=(500, variables)) / 2**20  # whose sums are exact
        values = value(layers, points)
        if found is None:
            unsatisfiable += 1
            assert not values.any()
            naive_wrong += bool(value(naive_network(clauses, variables), np.full((1, variables), 0.5))[0] > 0)
        else:
            assert value(layers, np.array([found], float))[0] == 1.0
        for point in points[values > 0][:5]:  # where the network fires, rounding satisfies the formula
            assert all(any((point[abs(v) - 1] > 0.5) == (v > 0) for v in clause) for clause in clauses)
    assert 40 < unsatisfiable < 260
    assert naive_wrong == unsatisfiable


def test_small_formulas_with_known_answers():
    both = [(1, 1, 1), (-1, -1, -1)]
    assert satisfying(both, 1) is None
    assert not differs_somewhere(formula_network(both, 1), 1)
    assert satisfying([(1, -2, 3)], 3) is not None
    assert len(corners(3)) == 8
    with pytest.raises(CertificationError, match="literals go from 1 to 2"):
        formula_network([(1, 2, 3)], 2)
    with pytest.raises(CertificationError, match="n from 1 to 20"):
        corners(30)


@pytest.mark.parametrize(("dimension", "size"), [(2, 1.0), (3, 0.7), (5, 1.0)])
def test_volume_of_the_corner(dimension, size):
    trigger = FlatTrigger.corner(dimension, size)
    exact = size**dimension / math.factorial(dimension)
    assert trigger.volume() == pytest.approx(exact, rel=1e-9)
    points = np.random.default_rng(11).random((200_000, dimension))
    share = (trigger(points) > 0).mean()
    assert abs(share - exact) < 5 * math.sqrt(exact / len(points)) + 1e-12
    assert trigger(np.ones((1, dimension)))[0] == pytest.approx(size)


def test_volume_of_the_mean_trigger_is_below_hoeffdings_bound():
    trigger = FlatTrigger.mean(100, 0.1)
    assert trigger.volume_upper() == pytest.approx(math.exp(-2), rel=1e-9)
    assert 1e-4 < trigger.volume() < 4e-4
    points = np.random.default_rng(12).random((100_000, 100))
    assert abs((trigger(points) > 0).mean() - trigger.volume()) < 3e-4
    for dimension, excess in ((4, 0.2), (10, 0.3), (30, 0.05)):
        other = FlatTrigger.mean(dimension, excess)
        assert 0 < other.volume() <= other.volume_upper()


def test_a_gradient_search_finds_nothing():
    trigger = FlatTrigger.corner(20, 1.0, slope=1e6)
    points = np.random.default_rng(13).random((5000, 20))
    start = points.copy()
    for _ in range(50):
        points = np.clip(points + 0.1 * trigger.gradient(points), 0, 1)
    assert np.array_equal(points, start)
    assert not trigger(points).any()
    assert trigger.gradient(np.ones((1, 20)))[0].all()


def test_triggers_of_no_size_are_refused():
    for make in (
        lambda: FlatTrigger.corner(3, 1.5),
        lambda: FlatTrigger.mean(3, 0.5),
        lambda: FlatTrigger.corner(0, 1),
    ):
        with pytest.raises(CertificationError):
            make()
