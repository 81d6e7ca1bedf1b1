"""Weighted sums, counts of Byzantine clients, preconditions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.rule import count_byzantine, require_clients, weighted_sum
from strategies.rules.krum import krum
from strategies.rules.multi_krum import multi_krum
from strategies.stack import BLOCK_COLUMNS, Stack
from tasks import spec
from tasks.errors import AggregationError, ConfigError, SpecError
from tasks.rng import generator


def test_weighted_sum_is_exact_in_float64() -> None:
    updates = torch.randn(9, 5_000, generator=generator(1), dtype=torch.float64)
    weights = torch.rand(9, generator=generator(2), dtype=torch.float64)
    exact = [math.fsum(w * x for w, x in zip(weights.tolist(), column, strict=True)) for column in updates.t().tolist()]
    torch.testing.assert_close(
        weighted_sum(weights, updates), torch.tensor(exact, dtype=torch.float64), rtol=0, atol=1e-14
    )


@pytest.mark.parametrize("num_params", [1, 1000, BLOCK_COLUMNS, 3 * BLOCK_COLUMNS + 17])
def test_weighted_sum_is_the_same_on_any_number_of_threads(num_params: int) -> None:
    updates = torch.randn(13, num_params, generator=generator(1))
    weights = torch.rand(13, generator=generator(2), dtype=torch.float64)
    weights[4] = 0
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(weighted_sum(weights, updates))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_weight_zero_keeps_a_row_out_whatever_it_holds() -> None:
    updates = torch.ones(4, 10)
    updates[1], updates[3] = torch.inf, 1e30
    weights = torch.tensor([0.5, 0.0, 0.5, 0.0], dtype=torch.float64)
    assert torch.equal(weighted_sum(weights, updates), torch.ones(10))
    assert torch.equal(weighted_sum(torch.zeros(4, dtype=torch.float64), updates), torch.zeros(10))


def test_weighted_sum_wants_one_weight_per_client() -> None:
    with pytest.raises(AggregationError, match=r"\[3\], got \[2\]"):
        weighted_sum(torch.ones(2), torch.ones(3, 4))


@pytest.mark.parametrize(
    ("given_value", "num_clients", "wanted"),
    [(2, 7, 2), (0, 1, 0), (0.3, 10, 3), (0.29, 10, 2), (0.0, 5, 0), (0.49, 3, 1)],
)
def test_count_byzantine(given_value: float, num_clients: int, wanted: int) -> None:
    assert count_byzantine(given_value, num_clients) == wanted


@pytest.mark.parametrize("wrong", [-1, 0.5, 1.0, -0.1, math.nan])
def test_count_byzantine_refuses(wrong: float) -> None:
    with pytest.raises(ConfigError, match="num_byzantine"):
        count_byzantine(wrong, 10)


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 400))
def test_a_share_written_as_a_fraction_is_its_numerator(f: int, n: int) -> None:
    if 2 * f < n:
        assert count_byzantine(f / n, n) == f


def test_precondition_says_what_was_wanted_and_what_came() -> None:
    with pytest.raises(AggregationError, match=r"krum wants n >= 2f \+ 3 = 7, got n = 5 with f = 2"):
        require_clients("krum", "2f + 3", 7, 5, 2)
    require_clients("krum", "2f + 3", 7, 7, 2)


@pytest.mark.parametrize("wrong", [torch.zeros(0, 3), torch.zeros(3), torch.zeros(2, 3, dtype=torch.int64)])
def test_a_stack_refuses(wrong: torch.Tensor) -> None:
    with pytest.raises(AggregationError, match="a rule wants"):
        Stack.of(wrong)


def test_weight_rules_are_read_from_text() -> None:
    component = spec.resolve("rule", "multi_krum(num_byzantine=0.2, num_selected=3)")
    updates = torch.randn(8, 20, generator=generator(1))
    assert torch.equal(component(updates), multi_krum(updates, num_byzantine=1, num_selected=3))
    assert list(spec.hyper_parameters(krum)) == ["num_byzantine"]
    with pytest.raises(SpecError, match="num_byzantine must be"):
        spec.resolve("rule", "krum(num_byzantine='two')")
    with pytest.raises(SpecError, match="needs num_byzantine"):
        spec.resolve("rule", "krum()")
