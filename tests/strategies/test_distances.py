"""Distances against exact float64 differences, on stacks made to break a Gram matrix; in torch and compiled."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from strategies import compiled, distances
from strategies.distances import dots, gram, majority_gram, norms, squared_distances, squared_distances_to
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


def exact(updates: Tensor) -> Tensor:
    rows = updates.double()
    return torch.stack([(rows - row).square().sum(1) for row in rows])


def check(updates: Tensor) -> None:
    before = updates.clone()
    got = squared_distances(updates)
    assert got.dtype == torch.float64
    assert got.isfinite().all()
    assert bool((got >= 0).all())
    assert torch.equal(got, got.t())
    assert not got.diagonal().any()
    torch.testing.assert_close(got, exact(updates), rtol=1e-4, atol=0)
    assert torch.equal(updates, before)


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "distances"), dtype=dtype)


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (5, 20_000), (70, 3_001), (140, 300)])
def test_plain(shape: tuple[int, int]) -> None:
    check(normal(*shape))


def test_near_identical_rows_on_a_large_offset() -> None:
    offset = 30 * normal(1, 10_000, seed=2)
    for spread in (1e-2, 1e-3, 1e-5):
        check(offset + spread * normal(12, 10_000))


def test_constant_rows_whose_rounding_errors_all_point_one_way() -> None:
    check((torch.rand(20, generator=generator(3)) + 0.5)[:, None].expand(20, 50_000).contiguous())


@pytest.mark.parametrize("size", [1e3, 1e6, 1e12, 1e30, 3e38])
@pytest.mark.parametrize("where", [[0, 1, 2], [3, 7, 9]])
def test_huge_outliers_do_not_spoil_the_others(size: float, where: list[int]) -> None:
    updates = 5.0 + 1e-2 * normal(10, 4_000)
    updates[where] = size
    updates[where[0]] = -size
    check(updates)


def test_outliers_on_every_scale() -> None:
    updates = 1 + 1e-3 * normal(24, 2_000)
    for i in range(12):
        updates[i] += 10.0 ** (i * 3 - 6)
    check(updates)


def test_tight_clusters_within_clusters() -> None:
    centres = normal(3, 1, 1, 2_000)
    updates = centres + 1e-2 * normal(1, 4, 1, 2_000, seed=2) + 1e-5 * normal(3, 4, 5, 2_000, seed=3)
    check(updates.reshape(60, 2_000))


def test_identical_rows_have_distance_zero() -> None:
    updates = normal(9, 1_000)
    updates[[2, 5, 8]] = updates[2].clone()
    check(updates)
    assert not squared_distances(updates[[2, 5, 8]]).any()


@pytest.mark.parametrize("scale", [1e-30, 1e-22, 1e-18, 1e18])
def test_rows_whose_squares_leave_float32(scale: float) -> None:
    check(scale * normal(8, 500))


def test_outliers_hidden_from_the_sample_of_columns() -> None:
    """The origin is chosen on a sample; an attacker who avoids it can cost time, never accuracy."""
    updates = 1e-3 * normal(9, 5_120)
    updates[:, :: 5_120 // distances.SAMPLE_COLUMNS] = 0
    updates[0, 1] = updates[1, 3] = 1e12
    check(updates)
    products = majority_gram(updates)
    differences = (updates[2:, None].double() - updates[None, 2:].double()).square().sum(-1)
    squares = products.diagonal()[2:]
    got = squares[:, None] + squares[None, :] - 2 * products[2:, 2:]
    torch.testing.assert_close(got.fill_diagonal_(0), differences, rtol=1e-3, atol=0)


def test_float64_is_exact() -> None:
    updates = normal(7, 900, dtype=torch.float64)
    torch.testing.assert_close(squared_distances(updates), exact(updates), rtol=1e-12, atol=0)


def test_float64_rows_beyond_every_square_are_infinitely_far_and_never_nan() -> None:
    updates = normal(6, 50, dtype=torch.float64)
    updates[0], updates[1], updates[2] = 1e200, -1e200, 1e200
    got = squared_distances(updates)
    assert not got.isnan().any()
    assert got[0, 1] == torch.inf
    assert got[0, 2] == 0
    assert got[0, 4] == torch.inf
    torch.testing.assert_close(got[3:, 3:], exact(updates)[3:, 3:], rtol=1e-12, atol=0)


def test_float64_rows_whose_difference_overflows_end_and_are_infinitely_far() -> None:
    updates = normal(5, 30, dtype=torch.float64)
    updates[0], updates[1] = 1.7e308, -1.7e308
    got = squared_distances(updates)
    assert got[0, 1] == torch.inf
    assert bool((got[:2, 2:] == torch.inf).all())
    check(updates[2:])
    both = squared_distances(updates[:2])
    assert torch.equal(both, torch.tensor([[0.0, torch.inf], [torch.inf, 0.0]], dtype=torch.float64))


@settings(deadline=None, max_examples=60)
@given(
    st.integers(2, 9), st.integers(1, 60), st.integers(0, 2**31), st.lists(st.integers(-12, 30), min_size=9, max_size=9)
)
def test_any_mix_of_scales(num_clients: int, num_params: int, seed: int, exponents: list[int]) -> None:
    scales = torch.tensor([10.0**e for e in exponents[:num_clients]], dtype=torch.float64)
    updates = (normal(num_clients, num_params, seed=seed, dtype=torch.float64) * scales[:, None] + 1.0).float()
    check(updates)


def test_gram_is_around_its_origin() -> None:
    updates = normal(6, 10_000)
    rows = torch.tensor([1, 3, 4])
    centred = (updates - updates[3]).double()[rows]
    torch.testing.assert_close(gram(updates, 3, rows), centred @ centred.t(), rtol=1e-5, atol=1e-2)
    assert not gram(updates, 3, rows)[1].any()


def test_norms() -> None:
    updates = normal(8, 70_000)
    updates[1], updates[2], updates[3] = 0, 1e30, 1e-30
    torch.testing.assert_close(norms(updates), updates.double().norm(dim=1), rtol=1e-5, atol=0)
    wide = updates.double()
    torch.testing.assert_close(norms(wide), wide.norm(dim=1), rtol=1e-13, atol=0)


def test_gram_around_0_and_around_a_row_that_is_not_among_them() -> None:
    updates = normal(9, 5_001)
    rows = torch.tensor([8, 2, 5])
    wide = updates.double()
    torch.testing.assert_close(gram(updates, None, rows), wide[rows] @ wide[rows].t(), rtol=1e-5, atol=1e-2)
    centred = (updates - updates[0]).double()[rows]
    torch.testing.assert_close(gram(updates, 0, rows), centred @ centred.t(), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("num_clients", range(1, 13))
def test_gram_of_any_number_of_rows_and_columns(num_clients: int) -> None:
    everyone = torch.arange(num_clients)
    for num_params in (1, 15, 16, 17, 63, 4_113):
        for dtype in (torch.float32, torch.float64):
            updates = normal(num_clients, num_params, dtype=dtype)
            wide = updates.double()
            got = gram(updates, None, everyone)
            torch.testing.assert_close(got, wide @ wide.t(), rtol=1e-5, atol=1e-5 * num_params)
            assert torch.equal(got, got.t())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_views_of_a_larger_tensor(dtype: torch.dtype) -> None:
    whole = normal(12, 3_000).to(dtype)
    for updates in (whole[2:9, 100:2_500], whole[::3], whole[:, ::2], whole.t().contiguous().t()):
        check(updates)
        torch.testing.assert_close(norms(updates), updates.double().norm(dim=1), rtol=1e-5, atol=0)
        vector = updates[1].clone()
        torch.testing.assert_close(dots(updates, vector), updates.double() @ vector.double(), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dots_and_distances_to_a_vector(dtype: torch.dtype) -> None:
    offset = 30 * normal(1, 40_000, seed=2)
    updates = (offset + 1e-3 * normal(6, 40_000)).to(dtype)
    updates[1], updates[2], updates[3] = 1e30, 1e-30, 0
    vector = (offset[0].double() + 1e-4 * normal(40_000, seed=3).double()).to(dtype)
    before = updates.clone(), vector.clone()
    wide = vector.double()
    squares = (updates.double() - wide).square().sum(1)
    torch.testing.assert_close(squared_distances_to(updates, vector), squares, rtol=1e-12, atol=0)
    torch.testing.assert_close(dots(updates, vector), updates.double() @ wide, rtol=1e-9, atol=0)
    assert torch.equal(updates, before[0])
    assert torch.equal(vector, before[1])


def test_a_float64_vector_is_not_rounded_to_the_precision_of_the_updates() -> None:
    updates = 30 * normal(5, 3_000)
    vector = updates[0].double() + 1e-7
    got = squared_distances_to(updates, vector)
    assert got[0].item() == pytest.approx(3_000 * 1e-14, rel=1e-6)
    strided = vector.repeat_interleave(2)[::2]
    assert torch.equal(squared_distances_to(updates, strided), got)


def test_a_vector_of_another_length_is_refused() -> None:
    for function in (dots, squared_distances_to):
        with pytest.raises(AggregationError, match="8 parameters"):
            function(torch.ones(3, 8), torch.ones(7))


def test_everything_repeats_to_the_bit() -> None:
    updates = 3 + normal(17, 20_000)
    assert torch.equal(squared_distances(updates), squared_distances(updates))
    assert torch.equal(norms(updates), norms(updates))
    assert torch.equal(dots(updates, updates[0]), dots(updates, updates[0]))
