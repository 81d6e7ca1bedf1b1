"""Order statistics of every parameter over the clients, by a pruned sorting network.

Sorting n numbers a million times is slow; exchanging two rows of a million numbers is two vectorised
operations, `minimum` and `maximum`; `strategies.networks` says which rows to exchange. Columns are taken in
blocks that stay in the cache.

Large stacks on the CPU are sorted by `strategies.compiled`. For others there is a version in torch, in which exchanges
at a regular distance run as one operation. A row has a place in each of two buffers: an exchange writes its minimum to
the other buffer and its maximum in place, so that nothing is copied back.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from strategies import compiled
from strategies.networks import ends_of_nearest, ends_of_ranks, merge_exchange, program, pruned
from tasks.errors import AggregationError

CPU_WORKSPACE = 2**21  # numbers per buffer: 8 MiB of float32, so that both stay in the last cache
DEVICE_WORKSPACE = 2**27
CPU_COLUMNS = (1024, 32768)  # fewer do not pay for the call of an operation, more do not fit the inner caches
COMPILED_COLUMNS = 8192


@dataclass(frozen=True)
class Exchanges:
    """Exchanges (i, i + distance) for `repeats` runs of `length` rows, the runs `step` apart, from row `first`."""

    first: int
    length: int
    repeats: int
    step: int
    distance: int
    sides: tuple[int, int]  # the buffers that hold the first and the second row of every pair

    def rows(self, buffer: Tensor, first: int) -> Tensor:
        width = buffer.shape[1]
        return buffer.as_strided((self.repeats, self.length, width), (self.step * width, width, 1), first * width)


def middle_blocks(updates: Tensor, low: int, high: int, ordered: bool = False) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, values ``[high - low, columns]``): of each column the values of ranks low to high - 1.

    Ranks count from 0, the smallest. The values come in ascending order only if `ordered`. They lie in a
    workspace that the next block overwrites; the caller may change them.
    """
    if not 0 <= low <= high <= len(updates):
        raise AggregationError(f"wanted ranks 0 <= low <= high <= {len(updates)}, got {low} and {high}")
    if compiled.takes(updates):
        yield from _compiled_blocks(updates, low, high, ordered)
        return
    num_clients, num_params = updates.shape
    device = updates.device
    width = _width(num_clients, num_params, device)
    buffers = [torch.empty(num_clients, width, dtype=updates.dtype, device=device) for _ in range(2)]
    network, sides = _network(num_clients, low, high, ordered)
    exchanges = [
        (e.rows(buffers[e.sides[0]], e.first), e.rows(buffers[e.sides[1]], e.first + e.distance),
         e.rows(buffers[1 - e.sides[0]], e.first)) for e in network
    ]  # fmt: skip
    strays = [row for row in range(low, high) if sides[row] == 1]
    for start in range(0, num_params, width):
        columns = slice(start, min(start + width, num_params))
        buffers[0][:, : columns.stop - start].copy_(updates[:, columns])  # the rest holds numbers nobody reads
        for one, other, place in exchanges:
            torch.minimum(one, other, out=place)
            torch.maximum(one, other, out=other)
        for row in strays:
            buffers[0][row].copy_(buffers[1][row])
        yield columns, buffers[0][low:high, : columns.stop - start]


def middle_mean(updates: Tensor, low: int, high: int, rows: Tensor | None = None) -> Tensor:
    """Return, per column, the mean of the values of ranks low to high - 1 (``[params]``); low < high.

    With `rows`, indices, only these updates count.
    """
    num_rows = len(updates) if rows is None else len(rows)
    if not 0 <= low < high <= num_rows:
        raise AggregationError(f"wanted ranks 0 <= low < high <= {num_rows}, got {low} and {high}")
    if compiled.takes(updates):
        steps = program(num_rows, ends_of_ranks(num_rows, low, high, False), low, high)
        result = compiled.middle_means(updates, rows, steps, low, high, divide_first=False)
        if _overflowed(result):
            result = _in_range(compiled.middle_means(updates, rows, steps, low, high, divide_first=True), updates)
        return result
    chosen = updates if rows is None else updates.index_select(0, rows)
    return _mean(chosen, lambda: middle_blocks(chosen, low, high), high - low)


def nearest_mean(updates: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
    """Return, per column, the mean of the `count` values nearest to the median (``[params]``); 1 <= count <= clients.

    The median of an even number of values is the mean of the two in the middle. Distances are those of the stack's
    precision; of two values at the same distance the lower one is nearer. With `rows`, indices, only these count.
    """
    num_rows = len(updates) if rows is None else len(rows)
    if not 1 <= count <= num_rows:
        raise AggregationError(f"wanted the mean of 1 to {num_rows} values, got {count}")
    if compiled.takes(updates):
        steps = program(num_rows, ends_of_nearest(num_rows, count), 0, num_rows)
        result = compiled.nearest_means(updates, rows, steps, count, divide_first=False)
        if _overflowed(result):
            result = _in_range(compiled.nearest_means(updates, rows, steps, count, divide_first=True), updates)
        return result
    chosen = updates if rows is None else updates.index_select(0, rows)
    return _mean(chosen, lambda: _nearest_blocks(chosen, count), count)


def sign_sums(updates: Tensor) -> Tensor:
    """Return, per column, how many values are positive less how many are negative (``[params]``, the stack's dtype)."""
    if compiled.takes(updates):
        return compiled.sign_sums(updates)
    result = torch.empty_like(updates[0])
    width = _width(len(updates), updates.shape[1], updates.device)
    for block, sums in zip(updates.split(width, dim=1), result.split(width), strict=True):
        torch.sum(block.sign(), 0, out=sums)
    return result


def _mean(updates: Tensor, blocks: Callable[[], Iterator[tuple[slice, Tensor]]], count: int) -> Tensor:
    """Return the sums of the blocks' columns, by `count`."""
    result = torch.empty_like(updates[0])
    for columns, values in blocks():
        torch.sum(values, 0, out=result[columns])
    result /= count
    if _overflowed(result):
        for columns, values in blocks():
            torch.sum(values.div_(count), 0, out=result[columns])
        result = _in_range(result, updates)
    return result


def _overflowed(result: Tensor) -> bool:
    """Whether a sum may have left the range of numbers; then values are divided first, which is slower."""
    return not result.isfinite().all()  # infinities of both signs make NaN


def _in_range(result: Tensor, updates: Tensor) -> Tensor:
    """Return means of divided values with the largest number where rounding alone made an infinity of finite ones."""
    columns = result.isinf().nonzero().flatten()
    columns = columns[updates[:, columns].isfinite().all(0)]
    most = torch.finfo(result.dtype).max
    result[columns] = result[columns].clamp(-most, most)
    return result


def _nearest_blocks(updates: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield (columns, values ``[count, columns]``): of each column the `count` values nearest to its median.

    They are neighbours in sorted order; so one of every `count`-th value is among them, the nearest of these.
    """
    num_clients = len(updates)
    for columns, values in middle_blocks(updates, 0, num_clients, ordered=True):
        lower, upper = values[(num_clients - 1) // 2], values[num_clients // 2]
        median = torch.where(lower == upper, lower, lower / 2 + upper / 2)
        nearest = values[:count]
        for first in range(count, num_clients, count):
            others = values[first : first + count]
            best = nearest[: len(others)]
            nearer = (others - median).abs() < (best - median).abs()
            best.copy_(torch.where(nearer, others, best))
        yield columns, nearest


def _compiled_blocks(updates: Tensor, low: int, high: int, ordered: bool) -> Iterator[tuple[slice, Tensor]]:
    num_clients, num_params = updates.shape
    steps = program(num_clients, ends_of_ranks(num_clients, low, high, ordered), low, high)
    space = torch.empty(high - low, min(COMPILED_COLUMNS, num_params), dtype=updates.dtype)
    for start in range(0, num_params, COMPILED_COLUMNS):
        columns = slice(start, min(start + COMPILED_COLUMNS, num_params))
        compiled.middle_values(updates, columns, steps, low, high, space)
        yield columns, space[:, : columns.stop - start]


def _width(num_clients: int, num_params: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(1, min(num_params, DEVICE_WORKSPACE // num_clients))
    least, most = CPU_COLUMNS
    return max(1, min(num_params, most, max(least, CPU_WORKSPACE // num_clients)))


@functools.lru_cache(maxsize=64)
def _network(num_rows: int, low: int, high: int, ordered: bool) -> tuple[tuple[Exchanges, ...], tuple[int, ...]]:
    """Return the exchanges that bring the wanted ranks to rows low to high - 1, and the buffer each row ends in."""
    sides = [0] * num_rows
    groups: list[Exchanges] = []
    for layer in pruned(merge_exchange(num_rows), ends_of_ranks(num_rows, low, high, ordered)):
        groups.extend(_grouped(layer, sides))
        for first, _ in layer:
            sides[first] ^= 1
    return tuple(groups), tuple(sides)


def _grouped(layer: list[tuple[int, int]], sides: list[int]) -> list[Exchanges]:
    """Join the exchanges of a layer into as few strided groups as a greedy pass finds."""
    runs: list[Exchanges] = []
    for i, j in layer:
        pair = (sides[i], sides[j])
        last = runs[-1] if runs else None
        if last and i == last.first + last.length and (j - i, pair) == (last.distance, last.sides):
            runs[-1] = Exchanges(last.first, last.length + 1, 1, last.length + 1, j - i, pair)
        else:
            runs.append(Exchanges(i, 1, 1, 1, j - i, pair))
    groups: list[Exchanges] = []
    for run in runs:
        last = groups[-1] if groups else None
        if last and (last.length, last.distance, last.sides) == (run.length, run.distance, run.sides):
            step = run.first - last.first if last.repeats == 1 else last.step
            if run.first == last.first + step * last.repeats:
                groups[-1] = Exchanges(last.first, run.length, last.repeats + 1, step, run.distance, run.sides)
                continue
        groups.append(run)
    return groups
