"""When the compiled kernels are used, and that they are never in the way; test_sorting checks what they compute."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from strategies import compiled


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
