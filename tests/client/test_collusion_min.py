"""Min-Max and Min-Sum beside the paper's search, and held to the bounds they claim."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.collusion._perturbation import Perturbation
from client.collusion.min_max import min_max
from client.collusion.min_sum import min_sum
from tasks.rng import generator

PERTURBATIONS = ("unit", "std", "sign")


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


# ---- Min-Max and Min-Sum


def direction_of(known: Tensor, perturbation: Perturbation) -> Tensor:
    means, stds = moments(known)
    mean = torch.tensor(means, dtype=torch.float64)
    if perturbation == "std":
        return -torch.tensor(stds, dtype=torch.float64)
    return -mean / mean.norm() if perturbation == "unit" else -mean.sign()


def farthest(row: Tensor, known: Tensor) -> float:
    return max(float((row - other).norm()) for other in known)


def all_squares(row: Tensor, known: Tensor) -> float:
    return math.fsum(float((row - other).square().sum()) for other in known)


def limits(known: Tensor) -> tuple[float, float]:
    return max(farthest(row, known) for row in known), max(all_squares(row, known) for row in known)


def halved(known: Tensor, direction: Tensor, allowed) -> Tensor:
    """The paper's algorithm 1 as it stands: n x d distances in every step."""
    gamma, step, best, mean = 5000.0, 2500.0, 0.0, known.mean(0)
    while step > 1e-12:
        if allowed(mean + gamma * direction):
            best, gamma = gamma, gamma + step
        else:
            gamma -= step
        step /= 2
    return mean + best * direction


STACKS = {
    "round": lambda: normal(8, 30),
    "shifted": lambda: normal(8, 30) + 2,
    "tight": lambda: 1e-3 * normal(8, 30) + 2,
    "two": lambda: normal(2, 30) + 1,
    "outlier": lambda: torch.cat([normal(6, 30), 20 * normal(1, 30, seed=2)]),
    "line": lambda: torch.linspace(-1, 3, 9, dtype=torch.float64)[:, None] * normal(1, 30),
}


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@pytest.mark.parametrize("stack", STACKS)
def test_min_max_and_min_sum_are_the_limit_of_the_papers_search(stack: str, perturbation: Perturbation) -> None:
    known = STACKS[stack]()
    direction = direction_of(known, perturbation)
    most, most_sum = limits(known)
    slow = halved(known, direction, lambda row: farthest(row, known) <= most)
    fast = min_max(known, 3, len(known) + 3, draw(), perturbation=perturbation)
    torch.testing.assert_close(fast, slow.expand(3, -1), rtol=1e-7, atol=1e-7)
    slow = halved(known, direction, lambda row: all_squares(row, known) <= most_sum)
    fast = min_sum(known, 3, len(known) + 3, draw(), perturbation=perturbation)
    torch.testing.assert_close(fast, slow.expand(3, -1), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("perturbation", PERTURBATIONS)
@given(
    rows=st.integers(2, 9), columns=st.integers(1, 40), seed=st.integers(0, 999), shift=st.sampled_from([0, 0.1, 30])
)
@settings(max_examples=40, deadline=None)
def test_the_bound_is_kept_and_touched(
    perturbation: Perturbation, rows: int, columns: int, seed: int, shift: float
) -> None:
    known = normal(rows, columns, seed=seed, dtype=torch.float32) + shift
    exact, step = known.double(), direction_of(known, perturbation)
    step /= step.norm().clamp(min=1e-300)
    most, most_sum = limits(exact)
    rounding = 1e-6 * float(exact.abs().max()) * math.sqrt(columns)
    row = min_max(known, 1, rows + 1, draw(), perturbation=perturbation)[0].double()
    assert farthest(row, exact) <= most + rounding
    assert farthest(row + (3 * rounding + 1e-4 * most) * step, exact) > most  # no larger gamma is allowed
    row = min_sum(known, 1, rows + 1, draw(), perturbation=perturbation)[0].double()
    assert all_squares(row, exact) <= most_sum * (1 + 1e-6) + 4 * rounding * math.sqrt(rows * most_sum)
    assert all_squares(row + (3 * rounding + 1e-3 * most) * step, exact) > most_sum


def test_min_max_passes_the_searchs_first_guess() -> None:
    """The paper's search cannot pass twice its first guess, whatever the updates' scale; the closed form does."""
    known = 1e6 * normal(8, 30)
    most, _ = limits(known)
    assert farthest(min_max(known, 1, 9, draw())[0], known) == pytest.approx(most, rel=1e-9)
