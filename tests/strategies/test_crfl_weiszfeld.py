"""Few Weiszfeld steps as RFA's code takes them: against a loop over vectors, and where they fall short."""

import pytest
import torch
from torch import Tensor

from strategies.rules.geometric_median import geometric_median
from strategies.rules.weiszfeld import weiszfeld
from tasks.errors import ConfigError
from tasks.rng import generator


def updates(num_clients: int = 9, seed: int = 1, outlier: float = 1.0) -> Tensor:
    rows = torch.randn(num_clients, 50, generator=generator(seed, "weiszfeld")) + 1
    rows[0] *= outlier
    return rows


def slow(rows: Tensor, iterations: int, nu: float, tolerance: float) -> Tensor:
    rows = rows.double()
    weights = torch.full((len(rows),), 1 / len(rows), dtype=torch.float64)
    median = weights @ rows
    objective = sum(float((row - median).norm()) for row in rows)
    for _ in range(iterations):
        pulls = torch.tensor([1 / max(nu, float((row - median).norm())) for row in rows], dtype=torch.float64)
        weights = pulls / pulls.sum()
        median = weights @ rows
        before, objective = objective, sum(float((row - median).norm()) for row in rows)
        if abs(before - objective) < tolerance * objective:
            break
    return weights


@pytest.mark.parametrize("outlier", [0.0, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_the_steps_are_weiszfelds(outlier: float, iterations: int) -> None:
    rows = updates(outlier=outlier)
    wanted = slow(rows, iterations, 1e-5, 1e-6)
    torch.testing.assert_close(weiszfeld.weights(rows, iterations=iterations), wanted, rtol=1e-5, atol=1e-9)


def test_they_stop_where_the_objective_rests() -> None:
    rows = updates(outlier=10.0)
    early = weiszfeld.weights(rows, tolerance=1e-2)
    torch.testing.assert_close(early, slow(rows, 10, 1e-5, 1e-2), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(early, weiszfeld.weights(rows, tolerance=0.0), rtol=1e-4)


def test_a_scaled_update_weighs_about_its_inverse_length_and_enough_steps_are_the_geometric_median() -> None:
    """Weight times factor hardly depends on the factor, which is why the paper's radius under RFA is so large."""
    pulls = [float(weiszfeld.weights(updates(outlier=factor))[0]) * factor for factor in (10.0, 100.0)]
    assert pulls[0] == pytest.approx(pulls[1], rel=0.1)
    rows = updates(outlier=10.0)
    torch.testing.assert_close(
        weiszfeld(rows, iterations=300, tolerance=0.0), geometric_median(rows), atol=1e-5, rtol=0
    )


def test_a_far_outlier_outlasts_ten_steps() -> None:
    rows = updates(outlier=1e12)
    assert float(weiszfeld(rows).norm()) > 100 * float(geometric_median(rows).norm())


def test_equal_updates_and_one_alone() -> None:
    row = updates()[0]
    torch.testing.assert_close(weiszfeld(row.expand(4, -1)), row)
    torch.testing.assert_close(weiszfeld(row[None]), row)
    assert not weiszfeld(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("wrong", [{"iterations": 0}, {"nu": 0.0}, {"tolerance": -1.0}])
def test_wrong_arguments(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="weiszfeld wants iterations >= 1"):
        weiszfeld(updates(), **wrong)  # type: ignore[arg-type]
