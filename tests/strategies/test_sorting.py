"""The sorting network against a sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import sorting
from strategies.sorting import middle_blocks, middle_mean
from tasks.rng import generator


@pytest.mark.parametrize("num_clients", [*range(1, 20), 31, 32, 33, 50, 64, 100])
def test_every_pair_of_ranks(num_clients: int) -> None:
    updates = torch.randn(num_clients, 200, generator=generator(num_clients)).round(decimals=1)  # with ties
    wanted = updates.sort(0).values
    step = max(1, num_clients // 4)
    for low in range(0, num_clients, step):
        for high in range(low + 1, num_clients + 1, step):
            ((_, values),) = middle_blocks(updates, low, high)
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
    updates = torch.randn(5, 200, generator=generator(1))
    parts = [(columns, values.clone()) for columns, values in middle_blocks(updates, 2, 3)]
    assert [columns.stop - columns.start for columns, _ in parts] == [64, 64, 64, 8]
    assert torch.equal(torch.cat([values[0] for _, values in parts]), updates.median(0).values)


def test_a_mean_of_numbers_near_the_largest_does_not_overflow() -> None:
    updates = torch.full((5, 3), 3e38)
    updates[0] = 1.0
    torch.testing.assert_close(middle_mean(updates, 1, 4), torch.full((3,), 3e38))
