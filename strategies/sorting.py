"""Order statistics of every parameter over the clients, by a pruned sorting network.

Sorting n numbers a million times is slow; exchanging two rows of a million numbers is two vectorised
operations, `minimum` and `maximum`. Batcher's merge exchange (Knuth, The Art of Computer
Programming 3, section 5.2.2, algorithm M) is a fixed sequence of such exchanges for any n. Those that
cannot change *which* values end up in the wanted ranks are left out, and exchanges at a regular
distance run as one operation. Columns are taken in blocks that stay in the cache.

A row has a place in each of two buffers: an exchange writes its minimum to the other buffer and its
maximum in place, so that nothing is copied back.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CPU_WORKSPACE = 2**21  # numbers per buffer: 8 MiB of float32, so that both stay in the last cache
DEVICE_WORKSPACE = 2**27
CPU_COLUMNS = (1024, 32768)  # fewer do not pay for the call of an operation, more do not fit the inner caches


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
    num_clients, num_params = updates.shape
    device = updates.device
    width = _width(num_clients, num_params, device)
    buffers = [torch.empty(num_clients, width, dtype=updates.dtype, device=device) for _ in range(2)]
    network, sides = _network(num_clients, low, high, ordered)
    program = [
        (e.rows(buffers[e.sides[0]], e.first), e.rows(buffers[e.sides[1]], e.first + e.distance),
         e.rows(buffers[1 - e.sides[0]], e.first)) for e in network
    ]  # fmt: skip
    strays = [row for row in range(low, high) if sides[row] == 1]
    for start in range(0, num_params, width):
        columns = slice(start, min(start + width, num_params))
        buffers[0][:, : columns.stop - start].copy_(updates[:, columns])  # the rest holds numbers nobody reads
        for one, other, place in program:
            torch.minimum(one, other, out=place)
            torch.maximum(one, other, out=other)
        for row in strays:
            buffers[0][row].copy_(buffers[1][row])
        yield columns, buffers[0][low:high, : columns.stop - start]


def middle_mean(updates: Tensor, low: int, high: int) -> Tensor:
    """Return, per column, the mean of the values of ranks low to high - 1 (``[params]``); low < high."""
    result = torch.empty_like(updates[0])
    for columns, values in middle_blocks(updates, low, high):
        torch.sum(values, 0, out=result[columns])
    result /= high - low
    if result.isinf().any():  # a sum of values near the largest number overflowed: divide first
        for columns, values in middle_blocks(updates, low, high):
            torch.sum(values.div_(high - low), 0, out=result[columns])
    return result


def _width(num_clients: int, num_params: int, device: torch.device) -> int:
    if device.type != "cpu":
        return max(1, min(num_params, DEVICE_WORKSPACE // num_clients))
    least, most = CPU_COLUMNS
    return max(1, min(num_params, most, max(least, CPU_WORKSPACE // num_clients)))


@functools.lru_cache(maxsize=64)
def _network(num_rows: int, low: int, high: int, ordered: bool) -> tuple[tuple[Exchanges, ...], tuple[int, ...]]:
    """Return the exchanges that bring the wanted ranks to rows low to high - 1, and the buffer each row ends in."""
    sides = [0] * num_rows
    program: list[Exchanges] = []
    for layer in _pruned(_merge_exchange(num_rows), num_rows, low, high, ordered):
        program.extend(_grouped(layer, sides))
        for first, _ in layer:
            sides[first] ^= 1
    return tuple(program), tuple(sides)


def _merge_exchange(num_rows: int) -> list[list[tuple[int, int]]]:
    """Return the layers of Batcher's network; within a layer no row appears twice and the distance is one."""
    top = 1 << max(0, (num_rows - 1).bit_length() - 1)
    layers, p = [], top
    while p > 0 and num_rows > 1:
        q, r, distance = top, 0, p
        while True:
            layers.append([(i, i + distance) for i in range(num_rows - distance) if i & p == r])
            if q == p:
                break
            distance, q, r = q - p, q >> 1, p
        p >>= 1
    return layers


def _pruned(
    layers: list[list[tuple[int, int]]], num_rows: int, low: int, high: int, ordered: bool
) -> list[list[tuple[int, int]]]:
    """Drop exchanges between two rows that end in the same class (below, wanted, above) and are not used again."""
    wanted = range(low, high)
    ends: list[int | None] = [(row if ordered else low) if row in wanted else -1 if row < low else num_rows
                              for row in range(num_rows)]  # fmt: skip
    kept = []
    for layer in reversed(layers):
        needed = [(i, j) for i, j in layer if ends[i] is None or ends[j] is None or ends[i] != ends[j]]
        for i, j in needed:
            ends[i] = ends[j] = None
        kept.append(needed)
    return [layer for layer in reversed(kept) if layer]


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
