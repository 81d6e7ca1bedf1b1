"""ALIE, inner product manipulation and mimic beside slow and obvious versions, and the distances attackers measure."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from client.collusion._geometry import Known
from client.collusion.a_little_is_enough import a_little_is_enough, largest_z
from client.collusion.inner_product_manipulation import inner_product_manipulation
from client.collusion.mimic import mimic
from client.collusion.min_max import min_max
from client.collusion.min_sum import min_sum
from tasks.errors import AggregationError
from tasks.rng import generator


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "formulas"), dtype=dtype)


def draw() -> torch.Generator:
    return generator(7, "attack")


def moments(known: Tensor) -> tuple[list[float], list[float]]:
    means, stds = [], []
    for column in known.double().t().tolist():
        mean = math.fsum(column) / len(column)
        means.append(mean)
        stds.append(math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column)))
    return means, stds


# ---- A Little Is Enough


@pytest.mark.parametrize(
    ("n", "f", "share", "z"),
    [
        (50, 24, 24 / 26, 1.4260769),  # s = 26 - 24 = 2
        (50, 10, 24 / 40, 0.2533471),  # s = 16
        (51, 12, 25 / 39, 0.3612016),  # s = 14
        (20, 9, 9 / 11, 0.9084579),  # s = 2
        (10, 1, 4 / 9, -0.1397103),  # s = 5: fewer than half lie farther out
    ],
)
def test_z_is_the_papers(n: int, f: int, share: float, z: float) -> None:
    found = largest_z(n, f)
    assert found == pytest.approx(z, abs=1e-6)
    assert 0.5 * (1 + math.erf(found / math.sqrt(2))) == pytest.approx(share, abs=1e-12)


@pytest.mark.parametrize(("n", "f"), [(10, 6), (50, 26), (4, 3), (2, 1)])
def test_z_is_not_made_up_where_there_is_none(n: int, f: int) -> None:
    with pytest.raises(AggregationError, match="no finite z"):
        a_little_is_enough(normal(n - f, 3), f, n, draw())
    assert torch.isfinite(a_little_is_enough(normal(n - f, 3), f, n, draw(), z=1.5)).all()


def test_a_little_is_enough_is_mean_and_deviations() -> None:
    known = normal(26, 30) * 3 + 100
    means, stds = moments(known)
    plus = a_little_is_enough(known, 24, 50, draw())
    minus = a_little_is_enough(known, 24, 50, draw(), direction="minus", z=0.5)
    for j, (mean, std) in enumerate(zip(means, stds)):
        assert plus[:, j].tolist() == pytest.approx([mean + 1.4260769 * std] * 24, rel=1e-8)
        assert minus[:, j].tolist() == pytest.approx([mean - 0.5 * std] * 24, rel=1e-12)


def test_one_known_update_has_no_spread_to_hide_in() -> None:
    known = normal(1, 30)
    for attack in (a_little_is_enough, min_max, min_sum):
        torch.testing.assert_close(attack(known, 4, 9, draw()), known.expand(4, -1))


# ---- inner product manipulation


def test_inner_product_manipulation_turns_the_inner_product() -> None:
    known = normal(6, 30) + 1
    means, _ = moments(known)
    sent = inner_product_manipulation(known, 4, 10, draw(), epsilon=0.7)
    for j, mean in enumerate(means):
        assert sent[:, j].tolist() == pytest.approx([-0.7 * mean] * 4)
    for epsilon, turned in ((1.4, False), (1.6, True)):  # (n - f) / f = 1.5
        everyone = torch.cat([known, inner_product_manipulation(known, 4, 10, draw(), epsilon=epsilon)])
        assert bool(everyone.mean(0) @ known.mean(0) < 0) == turned


# ---- mimic


@pytest.mark.parametrize("seed", range(20))
def test_mimic_copies_the_row_farthest_along_the_largest_variance(seed: int) -> None:
    known = normal(7, 12, seed=seed) * torch.linspace(3, 0.1, 12) + normal(12, seed=seed + 100)
    rows = known.numpy()
    _, vectors = np.linalg.eigh(np.cov(rows, rowvar=False, bias=True))  # d x d, where the attack works k x k
    expected = int(np.abs(rows @ vectors[:, -1]).argmax())
    assert torch.equal(mimic(known, 3, 10, draw()), known[expected].expand(3, -1))


def test_mimic_is_bitwise_one_of_the_known_and_its_choice_matters() -> None:
    known = torch.cat([normal(5, 40, dtype=torch.float32) * 0.1, 5 + torch.zeros(1, 40)])
    assert torch.equal(mimic(known, 2, 8, draw()), known[5].expand(2, -1))
    assert torch.equal(mimic(known[:1].expand(4, -1), 2, 6, draw()), known[:1].expand(2, -1))


# ---- distances


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_distances_are_the_double_loop(scale: float) -> None:
    known = ((10 + 1e-3 * normal(9, 300)) * scale).float()
    known[4] *= 1e4  # one of another magnitude must not spoil the others
    found = Known.of("test", known, 1, 10).squared_distances()
    for i, j in itertools.product(range(9), range(9)):
        expected = float((known[i].double() - known[j].double()).square().sum())
        assert float(found[i, j]) == pytest.approx(expected, rel=1e-9)
