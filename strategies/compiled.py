"""Compiled kernels for stacks on the CPU: which stacks they take, and the memory they work in.

Numba is imported with the first large stack, as the import costs as much as many small aggregations. Without Numba,
on other devices, for half precision, and for stacks whose rows are not contiguous, the callers use torch instead.
They trust their callers: ranks, counts and lengths are checked before, as machine code reads what it is told to.
What is used depends on the stack and on whether Numba is there: a run that is continued with the same packages on
the same kind of processor gives the same numbers, with and without Numba they differ in the last bits.
The machine code is kept on disk, next to this file or in the user's cache; the first use of a kernel ever compiles it.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strategies.networks import PADDING

LEAST_NUMBERS = 2**20  # smaller stacks are done before the kernels are loaded
SORTED_WIDTH, FEW_ROWS = (128, 256), 32  # columns sorted at once: fewer where they then fit the first cache
MULTIPLIED_WIDTH, MANY_ROWS = (4096, 2048), 64  # columns multiplied at once: fewer for more rows than this
SCALARS = {torch.float32: np.float32(1), torch.float64: np.float64(1)}


def takes(updates: Tensor) -> bool:
    """Whether the kernels work on this stack ``[rows, params]``; gradients are left to torch."""
    fits = updates.device.type == "cpu" and updates.dtype in SCALARS and updates.stride(1) == 1
    large = updates.numel() >= LEAST_NUMBERS and not updates.requires_grad
    return fits and large and kernels() is not None


@functools.cache
def kernels() -> ModuleType | None:
    """Return the module of the kernels; None if Numba is missing or told not to compile."""
    try:
        if importlib.import_module("numba").config.DISABLE_JIT:
            return None
        return importlib.import_module("strategies._kernels")
    except ImportError:
        return None


def middle_means(
    updates: Tensor, chosen: Tensor | None, program: np.ndarray, low: int, high: int, divide_first: bool
) -> Tensor:
    """Return the mean (``[params]``) of rows low to high - 1 of the sorted columns of the `chosen` updates, or of all.

    `divide_first`: values are divided before they are added, for huge numbers.
    """
    return _means(updates, chosen, "middle_means", program, (low, high), high - low, divide_first)


def nearest_means(
    updates: Tensor, chosen: Tensor | None, program: np.ndarray, count: int, divide_first: bool
) -> Tensor:
    """Return the mean (``[params]``) of the `count` values nearest to the median, of the `chosen` updates or all."""
    return _means(updates, chosen, "nearest_means", program, (count,), count, divide_first)


def middle_values(updates: Tensor, columns: slice, program: np.ndarray, low: int, high: int, out: Tensor) -> None:
    """Write rows low to high - 1 of the sorted `columns` to `out` ``[high - low, at least columns]``."""
    one, width = SCALARS[updates.dtype], SORTED_WIDTH[len(updates) > FEW_ROWS]
    work = torch.empty((len(updates) + 1 + PADDING) * width, dtype=updates.dtype)
    place = (out.data_ptr(), out.stride(0), work.data_ptr(), width)
    _run("middle_values", one, _rows(updates), columns.start, columns.stop, program, low, high, *place)


def sign_sums(updates: Tensor) -> Tensor:
    """Return, per column, how many values are positive less how many are negative (``[params]``)."""
    out = torch.empty_like(updates[0])
    _run("sign_sums", SCALARS[updates.dtype], _rows(updates), updates.shape[1], out.data_ptr())
    return out


def gram(updates: Tensor, origin: int | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Return <x_i - x_origin, x_j - x_origin> for i, j in `rows`, multiplied in `dtype` (``[rows, rows]``, float64)."""
    tile, lanes = _constant("TILE"), _constant("LANES")
    padded = -(-len(rows) // tile) * tile
    width = min(MULTIPLIED_WIDTH[len(rows) > MANY_ROWS], -(-updates.shape[1] // lanes) * lanes) + lanes
    work = torch.zeros(padded * width, dtype=dtype)
    total = torch.zeros(padded, padded, dtype=torch.float64)
    addresses = _rows(updates)
    origin_address = 0 if origin is None else int(addresses[origin])
    place = (work.data_ptr(), width, total.data_ptr(), padded)
    ones = SCALARS[updates.dtype], SCALARS[dtype]
    _run("gram", *ones, addresses[rows.numpy()], origin_address, updates.shape[1], *place)
    upper = total[: len(rows), : len(rows)].triu()
    return upper + upper.triu(1).t()


def squares(updates: Tensor) -> Tensor:
    """Return the sum of squares of every row (``[rows]``, float64)."""
    out = np.empty(len(updates))
    _run("squares", SCALARS[updates.dtype], _rows(updates), updates.shape[1], out)
    return torch.from_numpy(out)


def dots(updates: Tensor, vector: Tensor) -> Tensor:
    """Return the inner product of every row with `vector` (``[rows]``, float64)."""
    return _with_vector("dots", updates, vector)


def distances_to(updates: Tensor, vector: Tensor) -> Tensor:
    """Return the squared distance of every row to `vector` (``[rows]``, float64)."""
    return _with_vector("distances_to", updates, vector)


def weighted_sum(weights: Tensor, updates: Tensor) -> Tensor:
    """Return sum_i weights[i] * updates[i] (``[params]``), added up in float64; rows of weight 0 are not read."""
    shares = weights.double().numpy()
    chosen = shares.nonzero()[0]
    out = torch.empty_like(updates[0])
    sums = torch.empty(_constant("SEGMENT"), dtype=torch.float64)
    place = (out.data_ptr(), sums.data_ptr())
    _run("weighted_sum", SCALARS[updates.dtype], _rows(updates)[chosen], shares[chosen], updates.shape[1], *place)
    return out


def _means(
    updates: Tensor,
    chosen: Tensor | None,
    kernel: str,
    program: np.ndarray,
    ranks: tuple[int, ...],
    count: int,
    divide_first: bool,
) -> Tensor:
    one = SCALARS[updates.dtype]
    rows = _rows(updates) if chosen is None else _rows(updates)[chosen.numpy()]
    width = SORTED_WIDTH[len(rows) > FEW_ROWS]
    factor, divisor = (type(one)(1 / count), one) if divide_first else (one, type(one)(count))
    work = torch.empty((len(rows) + 1 + PADDING) * width, dtype=updates.dtype)  # also for sums and medians
    out = torch.empty_like(updates[0])
    _run(kernel, one, rows, updates.shape[1], program, *ranks, factor, divisor, out.data_ptr(), work.data_ptr(), width)
    return out


def _with_vector(kernel: str, updates: Tensor, vector: Tensor) -> Tensor:
    out = np.zeros(len(updates))
    vector = (vector if vector.dtype in SCALARS else vector.double()).contiguous()
    ones = SCALARS[updates.dtype], SCALARS[vector.dtype]
    _run(kernel, *ones, _rows(updates), vector.data_ptr(), updates.shape[1], out)
    return torch.from_numpy(out)


def _run(name: str, *args: Any) -> None:
    """Run a kernel; where its machine code can be neither read nor written, compile it for this process alone."""
    module = kernels()
    assert module is not None
    try:
        getattr(module, name)(*args)
    except Exception:  # files of the cache may hold anything; what is wrong with a kernel itself is raised again below
        module.forget_disk()
        getattr(module, name)(*args)


def _constant(name: str) -> int:
    return getattr(kernels(), name)


def _rows(updates: Tensor) -> np.ndarray:
    """Return the addresses of the rows."""
    step = updates.stride(0) * updates.element_size()
    return updates.data_ptr() + step * np.arange(len(updates), dtype=np.int64)
