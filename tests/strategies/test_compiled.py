"""When the compiled kernels are used, and that they are never in the way; test_sorting checks what they compute."""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch

from strategies import compiled, networks
from tasks.rng import generator


def test_small_stacks_do_not_load_the_compiler() -> None:
    code = "import sys, torch; from strategies import sorting, distances; x = torch.ones(9, 1000)\n"
    code += "sorting.middle_mean(x, 1, 3); distances.squared_distances(x); assert 'numba' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_or_broken_cache_costs_time_alone() -> None:
    pytest.importorskip("numba")
    code = """
import torch
from numba.core import caching
from strategies import compiled, sorting
def refuse(*_):
    raise OSError(28, "No space left on device")
caching.IndexDataCacheFile.save = refuse
caching.IndexDataCacheFile.load = refuse
compiled.LEAST_NUMBERS = 0
assert sorting.sign_sums(torch.ones(9, 1000)).tolist() == [9.0] * 1000
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_any_place_for_the_cache_kernels_are_compiled_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("strategies._kernels")

    def njit(function: Callable[..., int], cache: bool = False, **options: object) -> Callable[..., int]:
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return function

    monkeypatch.setattr(kernels, "njit", njit)
    assert kernels.kernel(lambda: 3)() == 3


def test_what_is_used_depends_on_the_stack_alone() -> None:
    pytest.importorskip("numba")
    large = torch.empty(4, compiled.LEAST_NUMBERS // 4)
    assert compiled.takes(large)
    assert compiled.takes(large.double())
    assert compiled.takes(large.repeat(2, 1)[::2])
    assert not compiled.takes(large[:3])
    assert not compiled.takes(large.half())
    assert not compiled.takes(large.t().contiguous().t())
    assert not compiled.takes(large.to("meta"))
    assert not compiled.takes(large.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("num_clients", [1, 2, 7, 8, 9, 17])
def test_weighted_sum(num_clients: int, dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    updates = torch.randn(num_clients, 20_001, generator=generator(1), dtype=dtype)
    weights = torch.randn(num_clients, generator=generator(2), dtype=torch.float64)
    before = updates.clone()
    tolerance = 1e-7 if dtype == torch.float32 else 1e-14
    wanted = (weights @ updates.double()).to(dtype)
    torch.testing.assert_close(compiled.weighted_sum(weights, updates), wanted, rtol=tolerance, atol=tolerance)
    view = updates[:, 5:19_000]
    torch.testing.assert_close(compiled.weighted_sum(weights, view), wanted[5:19_000], rtol=tolerance, atol=tolerance)
    assert torch.equal(updates, before)


def test_weighted_sum_reads_no_row_of_weight_0() -> None:
    pytest.importorskip("numba")
    updates = torch.ones(3, 50)
    updates[1] = torch.nan
    weights = torch.tensor([0.25, 0.0, 0.5], dtype=torch.float64)
    assert torch.equal(compiled.weighted_sum(weights, updates), torch.full((50,), 0.75))
    assert not compiled.weighted_sum(torch.zeros(3, dtype=torch.float64), updates).any()


def run(program: np.ndarray, values: list[float]) -> list[float]:
    """Do what a program says, one step at a time."""
    steps = iter(program.tolist())
    values = [*values, *[0.0] * networks.PADDING, float("inf")]
    for step in steps:
        if step >= networks.SORT:
            rows = [next(steps) for _ in range(networks.SIZES[step - networks.SORT])]
            for row, value in zip(rows, sorted(values[row] for row in rows)):
                values[row] = value
        else:
            i, j = next(steps), next(steps)
            low, high = sorted((values[i], values[j]))
            values[i] = low if step & networks.LOWER else float("nan")
            values[j] = high if step & networks.UPPER else float("nan")
    return values


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 7, 13, 14, 28, 29, 31, 33, 50, 57, 64, 113, 200])
def test_programs_bring_the_wanted_values_and_forget_no_others_too_early(num_rows: int) -> None:
    draws = generator(num_rows)
    middle = ((num_rows - 1) // 2, num_rows // 2 + 1)
    for low, high in {(0, 1), (num_rows - 1, num_rows), middle, (num_rows // 5, num_rows - num_rows // 5)}:
        for ordered in (True, False):
            program = networks.program(num_rows, networks.ends_of_ranks(num_rows, low, high, ordered), low, high)
            for _ in range(5):
                values = torch.randn(num_rows, generator=draws).tolist()
                got = run(program, values)[low:high]
                assert (got if ordered else sorted(got)) == sorted(values)[low:high]
    for count in {1, num_rows, max(1, num_rows - num_rows // 5), max(1, num_rows // 2)}:
        program = networks.program(num_rows, networks.ends_of_nearest(num_rows, count), 0, num_rows)
        values = torch.randn(num_rows, generator=draws).tolist()
        got = run(program, values)[:num_rows]
        spare = num_rows - count
        ranks = [*range(min(spare, num_rows)), *middle[:1], *range(max(count, 0), num_rows)]
        assert all(got[rank] == sorted(values)[rank] for rank in ranks)
        assert sorted(got) == sorted(values)


def test_a_minimum_needs_no_sort() -> None:
    program = networks.program(40, networks.ends_of_ranks(40, 0, 1, False), 0, 1)
    assert len(program) == 3 * 39
    assert set(program[::3].tolist()) == {networks.LOWER}
