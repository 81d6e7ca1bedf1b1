"""Every rule beside a slow and obvious version of itself, and at the edges of its definition."""

import itertools

import numpy as np
import pytest
import scipy.optimize
import scipy.stats
import torch
from torch import Tensor

from strategies.rule import WeightRule
from strategies.rules.geometric_median import geometric_median
from strategies.rules.krum import krum
from strategies.rules.mean import mean
from strategies.rules.median import median
from strategies.rules.multi_krum import multi_krum
from strategies.rules.norm_clipping import norm_clipping
from strategies.rules.trimmed_mean import trimmed_mean
from tasks.errors import AggregationError, ConfigError
from tasks.rng import generator


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "slow"), dtype=dtype)


def slow_krum_scores(updates: Tensor, f: int) -> list[float]:
    rows = updates.double().numpy()
    scores = []
    for i in range(len(rows)):
        distances = sorted(float(np.sum((rows[i] - rows[j]) ** 2)) for j in range(len(rows)) if j != i)
        scores.append(sum(distances[: len(rows) - f - 2]))
    return scores


@pytest.mark.parametrize(("num_clients", "f"), [(3, 0), (5, 1), (10, 3), (21, 9), (30, 0)])
def test_krum_and_multi_krum_are_the_double_loop(num_clients: int, f: int) -> None:
    for seed in range(5):
        updates = 20 + 0.01 * normal(num_clients, 300, seed=seed)
        updates[:f] = 20 + 0.02 * normal(1, 300, seed=seed + 50)
        order = np.argsort(slow_krum_scores(updates, f), kind="stable")
        assert torch.equal(krum(updates, num_byzantine=f), updates[order[0]])
        chosen = multi_krum.weights(updates, num_byzantine=f).nonzero().flatten().tolist()
        assert chosen == sorted(order[: num_clients - f].tolist())
        assert torch.equal(multi_krum(updates, num_byzantine=f, num_selected=1), updates[order[0]])


def test_krum_sums_n_minus_f_minus_2_neighbours() -> None:
    """Two hand-made lines where one neighbour more, n - f - 1, would choose another point."""
    # f = 0: two neighbours give the scores below; three would give 14.41, 6.21, 6.43, 13.81.
    updates = torch.tensor([[0.0], [1.0], [2.1], [3.0]])
    assert slow_krum_scores(updates, 0) == pytest.approx([5.41, 2.21, 2.02, 4.81])
    assert torch.equal(krum(updates, num_byzantine=0), updates[2])
    # f = 1: two neighbours give 34, 13, 5, 10; three would give 70, 22, 30, 46.
    updates = torch.tensor([[0.0], [3.0], [5.0], [6.0], [100.0]])
    assert torch.equal(krum(updates, num_byzantine=1), updates[2])


def test_krum_gives_a_tie_to_the_lowest_index() -> None:
    updates = torch.tensor([[9.0], [1.0], [-1.0], [1.0], [-1.0]])
    assert krum.weights(updates, num_byzantine=1).tolist() == [0, 1, 0, 0, 0]
    assert krum.weights(torch.ones(5, 3), num_byzantine=1).tolist() == [1, 0, 0, 0, 0]
    assert multi_krum.weights(torch.ones(5, 3), num_byzantine=1).tolist() == [0.25] * 4 + [0]


@pytest.mark.parametrize("rule", [krum, multi_krum])
def test_krum_needs_2f_plus_3_clients(rule: WeightRule[...]) -> None:
    rule(normal(11, 5), num_byzantine=4)
    with pytest.raises(AggregationError, match=rf"{rule.__name__} wants n >= 2f \+ 3 = 11, got n = 10 with f = 4"):
        rule(normal(10, 5), num_byzantine=4)
    with pytest.raises(AggregationError, match="= 3, got n = 1 with f = 0"):
        rule(normal(1, 5), num_byzantine=0)


def test_multi_krum_refuses_to_select_what_is_not_there() -> None:
    for wrong in (0, 8):
        with pytest.raises(AggregationError, match=f"n = 7, got {wrong}"):
            multi_krum(normal(7, 5), num_byzantine=2, num_selected=wrong)


@pytest.mark.parametrize("num_clients", [1, 2, 3, 10, 25, 50])
def test_median_is_numpys(num_clients: int) -> None:
    updates = normal(num_clients, 1_000)
    np.testing.assert_allclose(median(updates).numpy(), np.median(updates.numpy(), axis=0), rtol=1e-6)


def test_an_even_median_averages_the_two_in_the_middle() -> None:
    assert median(torch.tensor([[1.0], [2.0], [4.0], [100.0]])).item() == 3.0


@pytest.mark.parametrize(("num_clients", "f"), [(1, 0), (3, 1), (10, 4), (20, 3), (50, 24)])
def test_trimmed_mean_is_scipys(num_clients: int, f: int) -> None:
    updates = normal(num_clients, 700, dtype=torch.float64)
    wanted = scipy.stats.trim_mean(updates.numpy(), f / num_clients + 1e-12, axis=0)
    np.testing.assert_allclose(trimmed_mean(updates, num_byzantine=f).numpy(), wanted, rtol=1e-12, atol=1e-14)


def test_trimmed_mean_needs_more_than_2f_clients() -> None:
    assert trimmed_mean(torch.tensor([[1.0], [5.0], [7.0], [90.0], [-9.0]]), num_byzantine=0.4).item() == 5.0
    with pytest.raises(AggregationError, match=r"trimmed_mean wants n >= 2f \+ 1 = 5, got n = 4 with f = 2"):
        trimmed_mean(normal(4, 3), num_byzantine=2)


def objective(point: np.ndarray, rows: np.ndarray) -> float:
    return float(np.sqrt(((rows - point) ** 2).sum(1)).sum())


def gradient(point: np.ndarray, rows: np.ndarray) -> np.ndarray:
    differences = point - rows
    return (differences / np.linalg.norm(differences, axis=1, keepdims=True)).sum(0)


@pytest.mark.parametrize("outlier", [0.0, 10.0, 1e6])
def test_geometric_median_is_the_minimiser(outlier: float) -> None:
    for seed in range(4):
        updates = normal(9, 4, seed=seed, dtype=torch.float64)
        updates[:3] += outlier
        rows = updates.numpy()
        start = np.median(rows, axis=0)
        options = {"gtol": 1e-10}
        found = scipy.optimize.minimize(objective, start, args=(rows,), method="BFGS", jac=gradient, options=options)
        wanted = found.x
        got = geometric_median(updates).numpy()
        assert objective(got, rows) <= objective(wanted, rows) * (1 + 1e-9)
        assert np.linalg.norm(gradient(got, rows)) < 1e-5
        np.testing.assert_allclose(got, wanted, atol=1e-5)


def slow_weiszfeld(updates: Tensor, nu: float = 1e-6) -> Tensor:
    """Weiszfeld's algorithm as it is, on points, until it rests; from the coordinate-wise median, as from the mean
    the outliers' share of the start would have to be worn down first."""
    rows = updates.double()
    point = rows.median(0).values
    for _ in range(50_000):
        weights = 1 / (rows - point).norm(dim=1).clamp(min=nu)
        before, point = point, (weights / weights.sum()) @ rows
        if float((point - before).norm()) <= 1e-13 * float(point.norm()):
            return point
    raise AssertionError("Weiszfeld's algorithm did not come to rest")


def near_breakdown(num_clients: int, f: int, radius: float, size: float, together: bool, seed: int = 1) -> Tensor:
    """Honest updates within `radius` of a common vector twice as long, then f outliers of norm `size` in front."""
    honest = torch.nn.functional.normalize(normal(num_clients, 200, seed=seed)) + 2 * torch.ones(200) / 200**0.5
    outliers = torch.nn.functional.normalize(normal(num_clients, 200, seed=seed + 1000))
    updates = radius * honest
    updates[:f] = size * (outliers[:1] if together else outliers[:f])
    return updates


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize(
    ("num_clients", "f", "radius", "size"),
    [
        (51, 25, 1.0, 9.9e5),
        (51, 25, 0.1, 1e4),
        (50, 24, 1e-3, 9.9e5),
        (20, 9, 1e-2, 1e10),
        (10, 4, 1.0, 1e12),
        (10, 4, 1e-3, 1e30),
        (10, 1, 1.0, 1e30),
        (51, 25, 1.0, 50.0),
        (12, 3, 1.0, 4.0),
        (7, 0, 1.0, 1.0),
    ],
)
def test_geometric_median_is_where_weiszfeld_comes_to_rest(
    num_clients: int, f: int, radius: float, size: float, together: bool
) -> None:
    updates = near_breakdown(num_clients, f, radius, size, together)
    wanted = slow_weiszfeld(updates)
    error = float((geometric_median(updates).double() - wanted).norm())
    assert error <= 1e-5 * radius
    honest = updates[f:].double()
    bound = 2 * (num_clients - f) / (num_clients - 2 * f)
    centre = honest.mean(0)
    assert float((wanted - centre).norm()) <= bound * float((honest - centre).norm(dim=1).max())


@pytest.mark.parametrize("max_iterations", [1, 2, 3])
def test_geometric_median_cut_short_keeps_its_bound(max_iterations: int) -> None:
    for num_clients, f in ((3, 1), (10, 4), (51, 25)):
        for size in (3.0, 1e3, 1e12, 1e30):
            updates = near_breakdown(num_clients, f, 1e-2, size, together=True)
            result = geometric_median(updates, max_iterations=max_iterations).double()
            honest = updates[f:].double()
            bound = 2 * (num_clients - f) / (num_clients - 2 * f)
            for one in honest:
                assert float((result - one).norm()) <= bound * float((honest - one).norm(dim=1).max()) + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_params", [2, 8, 650])
def test_geometric_median_leaves_equal_updates_that_are_not_it(num_params: int, dtype: torch.dtype) -> None:
    """Equal updates are often the best of all updates without being the median, and rounding tells them apart."""
    cases = itertools.product(((5, 2), (11, 5), (51, 25), (50, 24)), (1.0, 10.0), range(8))
    for (num_clients, f), length, seed in cases:
        updates = (normal(num_clients, num_params, seed=seed, dtype=dtype) + 2) * length / num_params**0.5
        equal = torch.randperm(num_clients, generator=generator(seed, "equal"))[:f]
        direction = torch.nn.functional.normalize(normal(1, num_params, seed=seed + 100, dtype=dtype))
        updates[equal] = length**1.5 * direction
        rows = updates.double()
        point = geometric_median.weights(updates) @ rows
        differences = rows - point
        pull = (differences / differences.norm(dim=1, keepdim=True).clamp(min=1e-6)).sum(0)
        assert float(pull.norm()) < 1e-4


def test_geometric_median_stays_at_an_update_that_is_it() -> None:
    """Vardi and Zhang's condition: the unit vectors from an update to the others sum to less than its multiplicity."""
    updates = normal(8, 30)
    updates[5:] = 0
    updates += 1
    away = torch.nn.functional.normalize(updates[:5] - updates[5])
    assert float(away.sum(0).norm()) < 3
    torch.testing.assert_close(geometric_median(updates), updates[5], rtol=0, atol=3e-6)
    updates[0] = 1e30
    torch.testing.assert_close(geometric_median(updates), updates[5], rtol=0, atol=3e-6)


def test_geometric_median_shares_a_tie() -> None:
    two = normal(2, 50)
    assert geometric_median.weights(two).tolist() == [0.5, 0.5]
    line = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
    assert geometric_median(line).item() == pytest.approx(2.0)


def test_geometric_median_resolves_a_tight_majority_far_from_the_rest() -> None:
    updates = 50 * normal(9, 3_000)
    updates[2:8] = 7 + 1e-3 * normal(6, 3_000, seed=2)
    got = geometric_median(updates).double()
    assert float((got - updates[2:8].double().mean(0)).norm()) < 0.1


def test_geometric_median_at_the_edges() -> None:
    one = normal(1, 10)
    assert torch.equal(geometric_median(one), one[0])
    torch.testing.assert_close(geometric_median(one.expand(6, -1)), one[0])
    assert not geometric_median(torch.zeros(4, 3)).any()
    on_a_point = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    assert float(geometric_median(on_a_point).norm()) < 1e-6
    huge = normal(7, 20, dtype=torch.float64)
    for size in (1e149, 1e152, 1e200, 1.7e308):
        huge[:2] = size
        huge[1] *= -1
        torch.testing.assert_close(geometric_median(huge), slow_weiszfeld(huge[2:]), rtol=0, atol=1.0)


@pytest.mark.parametrize("wrong", [{"nu": 0.0}, {"max_iterations": 0}, {"tolerance": -1.0}])
def test_geometric_median_refuses(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="geometric_median wants nu > 0"):
        geometric_median(normal(3, 3), **wrong)  # type: ignore[arg-type]


def slow_clipping(updates: Tensor, limit: float) -> Tensor:
    rows = []
    for update in updates.double():
        norm = float(update.norm())
        rows.append(update / max(1.0, norm / limit))
    return torch.stack(rows).mean(0)


def test_norm_clipping() -> None:
    updates = normal(8, 100) * torch.arange(1, 9)[:, None]
    updates[3] = 0
    lengths = updates.double().norm(dim=1)
    for given, limit in [
        ({"max_norm": 2.0}, 2.0),
        ({"max_norm": 1e9}, 1e9),
        ({}, float(np.median(lengths.numpy()))),
        ({"adaptive": "mean"}, float(lengths.mean())),
    ]:
        got = norm_clipping(updates, **given)  # type: ignore[arg-type]
        torch.testing.assert_close(got.double(), slow_clipping(updates, limit), rtol=1e-5, atol=1e-6)


def test_the_median_norm_holds_where_the_mean_norm_does_not() -> None:
    updates = normal(9, 50)
    updates[0] = 1e12
    assert float(norm_clipping(updates).norm()) < 20
    assert float(norm_clipping(updates, adaptive="mean").norm()) > 1e10


def test_norm_clipping_at_the_edges() -> None:
    assert not norm_clipping(torch.zeros(3, 4)).any()
    mostly_zero = torch.zeros(5, 4)
    mostly_zero[0] = 3.0
    assert not norm_clipping(mostly_zero).any()  # the median norm is 0: nothing longer is let through
    one = normal(1, 6)
    torch.testing.assert_close(norm_clipping(one), one[0])
    for wrong in (0.0, -1.0):
        with pytest.raises(ConfigError, match="max_norm > 0"):
            norm_clipping(one, max_norm=wrong)


def test_mean() -> None:
    updates = normal(7, 40_000)
    torch.testing.assert_close(mean(updates).double(), updates.double().mean(0), rtol=1e-5, atol=1e-6)
    assert mean.weights(updates).tolist() == [1 / 7] * 7
    assert torch.equal(mean(updates[:1]), updates[0])
