"""The sorting network against a sort, and what is computed from sorted columns; in torch and compiled."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies import compiled, sorting
from strategies.sorting import middle_blocks, middle_mean, nearest_mean, sign_sums
from tasks.errors import AggregationError
from tasks.rng import generator


@pytest.fixture(params=["torch", "compiled"], autouse=True, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run every test of this file twice, whatever the size of its stacks."""
    if request.param == "compiled" and compiled.kernels() is None:
        pytest.skip("numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "LEAST_NUMBERS", 0 if request.param == "compiled" else 2**60)
        yield request.param


@pytest.mark.parametrize("num_clients", [*range(1, 20), 31, 32, 33, 50, 64, 100])
def test_every_pair_of_ranks(num_clients: int) -> None:
    updates = torch.randn(num_clients, 200, generator=generator(num_clients)).round(decimals=1)  # with ties
    wanted = updates.sort(0).values
    step = max(1, num_clients // 4)
    for low in range(0, num_clients, step):
        for high in range(low + 1, num_clients + 1, step):
            ((_, values),) = middle_blocks(updates, low, high)
            values = values.clone()
            assert torch.equal(values.sort(0).values, wanted[low:high])
            ((_, values),) = middle_blocks(updates, low, high, ordered=True)
            assert torch.equal(values, wanted[low:high])


@pytest.mark.parametrize("num_clients", range(1, 11))
def test_network_sorts_every_input_of_zeros_and_ones(num_clients: int) -> None:
    """The zero-one principle: a network that sorts all of these sorts everything."""
    codes = torch.arange(2**num_clients)
    updates = ((codes[None, :] >> torch.arange(num_clients)[:, None]) & 1).float()
    ((_, values),) = middle_blocks(updates, 0, num_clients, ordered=True)
    assert torch.equal(values, updates.sort(0).values)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 40), st.data())
def test_middle_mean(num_clients: int, data: st.DataObject) -> None:
    low = data.draw(st.integers(0, num_clients - 1))
    high = data.draw(st.integers(low + 1, num_clients))
    updates = torch.randn(num_clients, 33, generator=generator(num_clients, low, high), dtype=torch.float64)
    wanted = updates.sort(0).values[low:high].mean(0)
    torch.testing.assert_close(middle_mean(updates, low, high), wanted, rtol=0, atol=1e-14)


def test_blocks_cover_the_columns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sorting, "CPU_COLUMNS", (1, 64))
    monkeypatch.setattr(sorting, "COMPILED_COLUMNS", 64)
    updates = torch.randn(5, 200, generator=generator(1))
    parts = [(columns, values.clone()) for columns, values in middle_blocks(updates, 2, 3)]
    assert [columns.stop - columns.start for columns, _ in parts] == [64, 64, 64, 8]
    assert torch.equal(torch.cat([values[0] for _, values in parts]), updates.median(0).values)


def test_a_mean_of_numbers_near_the_largest_does_not_overflow() -> None:
    updates = torch.full((5, 3), 3e38)
    updates[0] = 1.0
    torch.testing.assert_close(middle_mean(updates, 1, 4), torch.full((3,), 3e38))
    torch.testing.assert_close(nearest_mean(updates, 4), torch.full((3,), 3e38))


def nearest_by_sorting(updates: Tensor, count: int) -> Tensor:
    """The slow, obvious version: sort by distance to the median, the lower value first where distances are equal."""
    values = updates.sort(0).values
    median = values[(len(values) - 1) // 2] / 2 + values[len(values) // 2] / 2
    nearest = (values - median).abs().sort(dim=0, stable=True).indices[:count]
    return values.gather(0, nearest).mean(0)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.booleans(), st.data())
def test_nearest_mean(num_clients: int, with_ties: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_clients))
    updates = torch.randn(num_clients, 70, generator=generator(num_clients, count), dtype=torch.float64)
    if with_ties:
        updates = updates.mul(2).round()
    torch.testing.assert_close(nearest_mean(updates, count), nearest_by_sorting(updates, count), rtol=0, atol=1e-14)


def test_of_two_values_as_far_from_the_median_the_lower_one_is_nearer() -> None:
    updates = torch.tensor([3.0, 1.0, 2.0, 2.0])[:, None]
    assert nearest_mean(updates, 3).item() == pytest.approx(5 / 3)
    assert nearest_mean(torch.tensor([0.0, 4.0])[:, None], 1).item() == 0.0


def test_some_rows_alone() -> None:
    updates = torch.randn(12, 300, generator=generator(2))
    rows = torch.tensor([7, 0, 11, 3, 4])
    assert torch.equal(middle_mean(updates, 2, 3, rows), updates[rows].median(0).values)
    torch.testing.assert_close(nearest_mean(updates, 3, rows), nearest_by_sorting(updates[rows], 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_infinite_values_lie_at_the_ends(dtype: torch.dtype) -> None:
    updates = torch.randn(9, 100, generator=generator(3), dtype=dtype)
    wanted = updates[2:7].median(0).values
    updates[:2], updates[7:] = -torch.inf, torch.inf
    assert torch.equal(middle_mean(updates, 4, 5), wanted)
    assert torch.equal(nearest_mean(updates, 1), wanted)
    assert bool((middle_mean(updates, 5, 9) == torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precisions_and_views(dtype: torch.dtype) -> None:
    whole = torch.randn(7, 300, generator=generator(4)).to(dtype)
    for updates in (whole, whole[1:6, 10:250], whole[::2], whole[:, ::3], whole.t().contiguous().t()):
        before = updates.clone()
        num_rows = len(updates)
        wanted = updates.sort(0).values[num_rows // 2]
        assert torch.equal(middle_mean(updates, num_rows // 2, num_rows // 2 + 1), wanted)
        assert torch.equal(sign_sums(updates), updates.sign().sum(0))
        torch.testing.assert_close(nearest_mean(updates, num_rows), middle_mean(updates, 0, num_rows))
        assert torch.equal(updates, before)


def test_sign_sums() -> None:
    updates = torch.tensor([[1.0, -2.0, 0.0, -0.0], [3.0, 5.0, -1e-30, torch.inf], [1e30, -1.0, 0.0, 1.0]])
    assert sign_sums(updates).tolist() == [3.0, -1.0, -1.0, 2.0]
    large = torch.randn(11, 70_000, generator=generator(5)).round()
    assert torch.equal(sign_sums(large), large.sign().sum(0))


def test_both_ways_agree_and_repeat_to_the_bit(way: str) -> None:
    updates = torch.randn(23, 5_000, generator=generator(6))
    first = [middle_mean(updates, 11, 12), middle_mean(updates, 4, 19), nearest_mean(updates, 15)]
    again = [middle_mean(updates, 11, 12), middle_mean(updates, 4, 19), nearest_mean(updates, 15)]
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "LEAST_NUMBERS", 2**60)
        in_torch = [middle_mean(updates, 11, 12), middle_mean(updates, 4, 19), nearest_mean(updates, 15)]
    assert torch.equal(first[0], in_torch[0])
    torch.testing.assert_close(first, in_torch, rtol=1e-6, atol=1e-6)


def test_without_numba_large_stacks_are_sorted_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "kernels", lambda: None)
    updates = torch.randn(5, 100, generator=generator(7))
    assert torch.equal(middle_mean(updates, 2, 3), updates.median(0).values)


def test_ranks_that_do_not_exist_are_refused() -> None:
    updates = torch.ones(4, 50)
    for low, high in ((-1, 2), (2, 2), (3, 5)):
        with pytest.raises(AggregationError, match="ranks"):
            middle_mean(updates, low, high)
    with pytest.raises(AggregationError, match="ranks"):
        list(middle_blocks(updates, 0, 5))
    for count in (0, 5):
        with pytest.raises(AggregationError, match="1 to 4"):
            nearest_mean(updates, count)
    with pytest.raises(AggregationError, match="1 to 2"):
        nearest_mean(updates, 3, torch.tensor([0, 1]))
