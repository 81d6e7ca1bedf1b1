"""Networks that sort the rows of a stack, as far as the wanted ranks need it.

Batcher's merge exchange (Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M) is a fixed sequence of
exchanges for any n. Those that cannot change *which* values end up in the wanted ranks are left out.

It works in phases p = ..., 4, 2, 1, after each of which the rows i, i + p, i + 2p, ... are in order, for every i < p.
So the first phases can be replaced by sorting these classes of rows in any way, such as in a processor's registers.
"""

import functools

import numpy as np

Layers = list[list[tuple[int, int]]]

LOWER, UPPER, BOTH = 1, 2, 3  # which values of an exchange are used afterwards
# Numba compiles these numbers and `merge_exchange` into what it keeps of _kernels.py: after a change, touch that file.
SORT = 4  # SORT + k stands for sorting SIZES[k] rows
SIZES = (3, 4, 5, 6, 8, 10, 13, 16, 20, 25, 28)  # of sorts that fit into 32 vector registers, a few numbers apart
PADDING = 2  # where a size is larger than a class: the row this far behind the stack, which holds infinity


@functools.lru_cache(maxsize=64)
def program(num_rows: int, ends: tuple[int, ...], low: int, high: int) -> np.ndarray:
    """Return what brings values to the classes `ends` of rows, of which low to high - 1 are used, for a compiled loop.

    A sequence of (LOWER, UPPER or BOTH, i, j), exchanges, and of (SORT + k, SIZES[k] rows), sorts.
    """
    layers = pruned(merge_exchange(num_rows), ends)
    sorts, replaced = class_sorts(num_rows)
    whole = sum(map(len, merge_exchange(num_rows)[:replaced]))
    if 2 * sum(map(len, layers[:replaced])) < whole:  # so little is needed that single exchanges do it sooner
        sorts, replaced = [], 0
    used = [low <= row < high for row in range(num_rows)]
    exchanges: list[tuple[int, int, int]] = []
    for layer in reversed(layers[replaced:]):
        for i, j in layer:
            if kept := LOWER * used[i] + UPPER * used[j]:
                exchanges.append((kept, i, j))
                used[i] = used[j] = True
    return np.array([number for step in sorts + exchanges[::-1] for number in step], dtype=np.int64)


def class_sorts(num_rows: int) -> tuple[list[tuple[int, ...]], int]:
    """Return the sorts of the largest classes of rows that SIZES allows, and how many layers they replace."""
    if num_rows < SIZES[0]:
        return [], 0
    stride = 1
    while -(-num_rows // stride) > SIZES[-1]:
        stride *= 2
    sorts = []
    for first in range(stride):
        rows = range(first, num_rows, stride)
        k = next(k for k, size in enumerate(SIZES) if size >= len(rows))
        sorts.append((SORT + k, *rows, *[num_rows + PADDING] * (SIZES[k] - len(rows))))
    top = 1 << max(0, (num_rows - 1).bit_length() - 1)
    phases = (top // stride).bit_length()
    return sorts, phases * (phases + 1) // 2


def merge_exchange(num_rows: int) -> Layers:
    """Return the layers of Batcher's network; within a layer no row appears twice and the distance is one.

    Phase p has one layer more than the one before, and the first has one.
    """
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


def pruned(layers: Layers, classes: tuple[int, ...]) -> Layers:
    """Drop exchanges between two rows that end in the same class and are not used again; layers may become empty."""
    ends: list[int | None] = list(classes)
    kept = []
    for layer in reversed(layers):
        needed = [(i, j) for i, j in layer if ends[i] is None or ends[j] is None or ends[i] != ends[j]]
        for i, j in needed:
            ends[i] = ends[j] = None
        kept.append(needed)
    return kept[::-1]


def ends_of_ranks(num_rows: int, low: int, high: int, ordered: bool) -> tuple[int, ...]:
    """Return the class in which every row's value ends: one for each wanted rank or, unless `ordered`, one for all."""
    wanted = range(low, high)
    return tuple((row if ordered else low) if row in wanted else -1 if row < low else num_rows
                 for row in range(num_rows))  # fmt: skip


def ends_of_nearest(num_rows: int, count: int) -> tuple[int, ...]:
    """Return the class in which every row's value ends: one for all that are among the `count` nearest to the median.

    Whatever the values, those in the middle are; the others and the median itself need their own ranks.
    """
    always = set(range(num_rows - count, count)) - {(num_rows - 1) // 2, num_rows // 2}
    return tuple(num_rows if row in always else row for row in range(num_rows))
