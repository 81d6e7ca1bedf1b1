"""Machine code for the loops that aggregation spends its time in, by Numba; `strategies.compiled` calls it.

Stacks come as addresses of rows, so that views cost no copy; `one` is a 1 of the stack's precision and makes each
kernel serve float32 and float64. Two inner loops are written as vector instructions, as loops in Python leave them
several times slower: the exchange of a sorting network, and the products of a tile of rows with another.
Results do not depend on the number of threads. NaN is not expected; infinities are.
"""

from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import NullCache
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic as numba_intrinsic

FEATURES = llvmlite.binding.get_host_cpu_features()
# Bytes of a vector register, and rows of a tile whose sums of products fit the registers, together with two operands.
REGISTER, TILE = (64, 5) if FEATURES.get("avx512f") else (32, 3) if FEATURES.get("avx") else (16, 3)
STEP = 64  # columns of one exchange; widths of blocks that are sorted are multiples of it
LANES = REGISTER // 4  # widths of blocks that are multiplied are multiples of it
SEGMENT = 8192  # columns of a vector that every row meets before the next, from the second cache
REORDER = {"reassoc", "contract", "nsz"}  # sums may be taken in the order of the vector registers, fixed at compilation
BOTH, LOWER, UPPER = 3, 1, 2  # which values of an exchange are kept

INT = ir.IntType(64)
DOUBLE = ir.DoubleType()


def kernel(function: Callable[..., Any] | None = None, *, fastmath: bool = False) -> Any:
    """Compile at the first call and keep the machine code on disk, or only in memory where no folder can be written."""
    if function is None:
        return lambda inner: kernel(inner, fastmath=fastmath)
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": REORDER if fastmath else False}
    try:
        return njit(function, cache=True, **options)
    except RuntimeError:  # numba found no place for its cache
        return njit(function, **options)


def forget_disk() -> None:
    """Compile whatever is not compiled yet in memory alone, as the folder of the cache is full or its files broken."""
    dispatchers: list[Any] = [found for found in globals().values() if isinstance(found, Dispatcher)]
    for dispatcher in dispatchers:
        dispatcher._cache = NullCache()


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make an operation of a function that writes its instructions; kernels call it without the first argument."""
    return numba_intrinsic(function)


def _place(builder: ir.IRBuilder, address: ir.Value, index: Any, element: ir.Type) -> Any:
    return builder.gep(builder.inttoptr(address, element.as_pointer()), [index])


@intrinsic
def get(typing: Any, one: types.Float, address: types.Integer, index: types.Integer) -> Any:
    """Return number `index` of the array at `address`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        return builder.load(_place(builder, args[1], args[2], context.get_value_type(one)))

    return one(one, address, index), generate


@intrinsic
def put(typing: Any, one: types.Float, value: types.Float, address: types.Integer, index: types.Integer) -> Any:
    """Write number `index` of the array at `address`, in the precision of `one`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
        number = context.cast(builder, args[1], value, one)
        builder.store(number, _place(builder, args[2], args[3], context.get_value_type(one)))
        return context.get_dummy_value()

    return types.void(one, value, address, index), generate


def _exchange(kept: int) -> Any:
    @intrinsic
    def exchange(typing: Any, one: types.Float, address: types.Integer, i: types.Integer, j: types.Integer) -> Any:
        """Sort STEP pairs of numbers, from i and j on: the smaller to i, the larger to j."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            element = context.get_value_type(one)
            lanes = REGISTER * 8 // one.bitwidth
            vector = ir.VectorType(element, lanes)
            pairs = []
            for k in range(0, STEP, lanes):
                spots = [
                    builder.bitcast(
                        _place(builder, args[1], builder.add(index, ir.Constant(INT, k)), element), vector.as_pointer()
                    )
                    for index in args[2:]
                ]
                pairs.append((spots, [builder.load(spot, align=one.bitwidth // 8) for spot in spots]))
            for spots, values in pairs:
                for side, name in enumerate(("minnum", "maxnum")):
                    if kept & (1 << side):
                        chosen = _call(builder, f"llvm.{name}", vector, values, ("nnan", "nsz"))
                        builder.store(chosen, spots[side], align=one.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(one, address, i, j), generate

    return exchange


def _call(builder: ir.IRBuilder, name: str, vector: ir.VectorType, values: Sequence[ir.Value], flags: Any) -> ir.Value:
    kind = ir.FunctionType(vector, [vector] * len(values))
    bits = 64 if vector.element == DOUBLE else 32
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{vector.count}f{bits}")
    return builder.call(function, values, fastmath=flags)


exchange_both, exchange_lower, exchange_upper = _exchange(BOTH), _exchange(LOWER), _exchange(UPPER)


def _tile(diagonal: bool) -> Any:
    pairs = [(i, j) for i in range(TILE) for j in range(i if diagonal else 0, TILE)]

    @intrinsic
    def tile(
        typing: Any,
        one: types.Float,
        rows: Any,
        a: Any,
        b: Any,
        stride: Any,
        width: Any,
        total: Any,
        at: Any,
        across: Any,
    ) -> Any:
        """Add <a_i, b_j> of TILE rows from a and b on, `stride` apart, to the float64 matrix `total`, from `at` on."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            element, lanes = context.get_value_type(one), REGISTER * 8 // one.bitwidth
            vector, wide = ir.VectorType(element, lanes), ir.VectorType(DOUBLE, lanes)
            sums = {pair: cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * lanes)) for pair in pairs}
            _, rows_, a_, b_, stride_, width_, total_, at_, across_ = args
            steps = [builder.mul(stride_, ir.Constant(INT, row)) for row in range(TILE)]
            with cgutils.for_range(builder, builder.udiv(width_, ir.Constant(INT, lanes))) as loop:
                column = builder.mul(loop.index, ir.Constant(INT, lanes))

                def load(first: ir.Value, step: Any) -> Any:
                    place = _place(builder, rows_, builder.add(builder.add(first, step), column), element)
                    return builder.load(builder.bitcast(place, vector.as_pointer()), align=one.bitwidth // 8)

                left = [load(a_, step) for step in steps]
                right = left if diagonal else [load(b_, step) for step in steps]
                for i, j in pairs:
                    terms = [left[i], right[j], builder.load(sums[i, j])]
                    builder.store(_call(builder, "llvm.fma", vector, terms, ()), sums[i, j])
            kind = ir.FunctionType(DOUBLE, [DOUBLE, wide])
            add_up = cgutils.get_or_insert_function(builder.module, kind, f"llvm.vector.reduce.fadd.v{lanes}f64")
            for (i, j), kept in sums.items():
                values = builder.load(kept)
                values = values if element == DOUBLE else builder.fpext(values, wide)
                summed = builder.call(add_up, [ir.Constant(DOUBLE, -0.0), values], fastmath=("reassoc",))
                index = builder.add(builder.mul(across_, ir.Constant(INT, i)), ir.Constant(INT, j))
                place = _place(builder, total_, builder.add(at_, index), DOUBLE)
                builder.store(builder.fadd(builder.load(place), summed), place)
            return context.get_dummy_value()

        return types.void(one, rows, a, b, stride, width, total, at, across), generate

    return tile


tile_square, tile_triangle = _tile(False), _tile(True)


@kernel
def sort_block(one, rows, start, filled, program, work, width):
    """Run a sorting network on `filled` columns from `start` on, in the workspace ``[rows, width]``."""
    for row in range(len(rows)):
        source = rows[row]
        for c in range(filled):
            put(one, get(one, source, start + c), work, row * width + c)
        for c in range(filled, width):
            put(one, one, work, row * width + c)
    for k in range(len(program)):
        kept, i, j = program[k, 0], program[k, 1] * width, program[k, 2] * width
        if kept == BOTH:
            for c in range(0, width, STEP):
                exchange_both(one, work, i + c, j + c)
        elif kept == LOWER:
            for c in range(0, width, STEP):
                exchange_lower(one, work, i + c, j + c)
        else:
            for c in range(0, width, STEP):
                exchange_upper(one, work, i + c, j + c)


@kernel
def middle_values(one, rows, start, stop, program, low, high, out, across, work, width):
    """Write the rows low to high - 1 of the sorted columns start to stop - 1 to the array ``[high - low, across]``."""
    for begin in range(start, stop, width):
        filled = min(width, stop - begin)
        sort_block(one, rows, begin, filled, program, work, width)
        for row in range(low, high):
            for c in range(filled):
                put(one, get(one, work, row * width + c), out, (row - low) * across + begin - start + c)


@kernel
def add_rows(one, work, width, low, high, factor, total):
    """Set the numbers at `total` of the workspace to the sum of its rows low to high - 1, each times `factor`."""
    for c in range(width):
        put(one, 0.0, work, total + c)
    row = low
    while row + 8 <= high:  # in pairs of pairs of pairs, which rounds less than one by one
        at = row * width
        for c in range(at, at + width):
            a = factor * get(one, work, c) + factor * get(one, work, c + width)
            b = factor * get(one, work, c + 2 * width) + factor * get(one, work, c + 3 * width)
            d = factor * get(one, work, c + 4 * width) + factor * get(one, work, c + 5 * width)
            e = factor * get(one, work, c + 6 * width) + factor * get(one, work, c + 7 * width)
            put(one, get(one, work, total + c - at) + ((a + b) + (d + e)), work, total + c - at)
        row += 8
    while row < high:
        at = row * width
        for c in range(width):
            put(one, get(one, work, total + c) + factor * get(one, work, at + c), work, total + c)
        row += 1


@kernel
def middle_means(one, rows, num_params, program, low, high, factor, divisor, out, work, width):
    """Write the sum of rows low to high - 1, each times `factor`, of the sorted columns, by `divisor`."""
    total = len(rows) * width  # one more row of the workspace
    for begin in range(0, num_params, width):
        filled = min(width, num_params - begin)
        sort_block(one, rows, begin, filled, program, work, width)
        add_rows(one, work, width, low, high, factor, total)
        for c in range(filled):
            put(one, get(one, work, total + c) / divisor, out, begin + c)


@kernel
def nearest_means(one, rows, num_params, program, count, factor, divisor, out, work, width):
    """Write the sum of the `count` values of every column nearest to its median, each times `factor`, by `divisor`.

    They are neighbours in sorted order; so one of every `count`-th value is among them, the nearest of these.
    """
    num_rows = len(rows)
    total, median = num_rows * width, (num_rows + 1) * width
    half = one / (one + one)
    for begin in range(0, num_params, width):
        filled = min(width, num_params - begin)
        sort_block(one, rows, begin, filled, program, work, width)
        lower, upper = (num_rows - 1) // 2 * width, num_rows // 2 * width
        for c in range(width):
            a, b = get(one, work, lower + c), get(one, work, upper + c)
            put(one, a if a == b else a * half + b * half, work, median + c)
        for first in range(min(count, num_rows - count)):
            best = first * width
            for row in range(first + count, num_rows, count):
                for c in range(width):
                    centre, value, other = (
                        get(one, work, median + c),
                        get(one, work, best + c),
                        get(one, work, row * width + c),
                    )
                    put(one, other if abs(other - centre) < abs(value - centre) else value, work, best + c)
        add_rows(one, work, width, 0, count, factor, total)
        for c in range(filled):
            put(one, get(one, work, total + c) / divisor, out, begin + c)


@kernel
def sign_sums(one, rows, num_params, out):
    """Write, for every column, how many numbers are positive less how many are negative."""
    zero = one - one
    for start in range(0, num_params, SEGMENT):
        stop = min(start + SEGMENT, num_params)
        for c in range(start, stop):
            put(one, 0.0, out, c)
        for row in range(len(rows)):
            source = rows[row]
            for c in range(start, stop):
                value = get(one, source, c)
                sign = (one if value > zero else zero) - (one if value < zero else zero)
                put(one, get(one, out, c) + sign, out, c)


@kernel
def gram(one, product_one, rows, origin, num_params, work, width, total, across):
    """Add <x_i - x_origin, x_j - x_origin> to the upper half of the float64 matrix at `total`; `origin` is an
    address, or 0 for products around 0.

    The workspace ``[tiles * TILE, width]`` holds one block of columns in the precision of `product_one`; the rows
    that only fill a tile must hold 0.
    """
    num_rows = len(rows)
    num_tiles = (num_rows + TILE - 1) // TILE
    for start in range(0, num_params, width):
        filled = min(width, num_params - start)
        wide = (filled + LANES - 1) // LANES * LANES
        for row in range(num_rows):
            source = rows[row]
            at = row * width
            if origin == 0:
                for c in range(filled):
                    put(product_one, product_one * get(one, source, start + c), work, at + c)
            else:
                for c in range(filled):
                    away = product_one * get(one, source, start + c) - product_one * get(one, origin, start + c)
                    put(product_one, away, work, at + c)
            for c in range(filled, wide):
                put(product_one, 0.0, work, at + c)
        for i in range(0, num_tiles * TILE, TILE):
            tile_triangle(product_one, work, i * width, i * width, width, wide, total, i * across + i, across)
            for j in range(i + TILE, num_tiles * TILE, TILE):
                tile_square(product_one, work, i * width, j * width, width, wide, total, i * across + j, across)


@kernel(fastmath=True)
def squares(one, rows, num_params, out):
    """Write the sum of squares of every row, in float64."""
    for row in range(len(rows)):
        source = rows[row]
        total = 0.0
        for c in range(num_params):
            value = np.float64(get(one, source, c))
            total += value * value
        out[row] = total


@kernel(fastmath=True)
def dots(one, vector_one, rows, vector, num_params, out):
    """Add the inner product of every row with a vector, in float64, to `out`."""
    for start in range(0, num_params, SEGMENT):
        stop = min(start + SEGMENT, num_params)
        for row in range(len(rows)):
            source = rows[row]
            total = 0.0
            for c in range(start, stop):
                total += np.float64(get(one, source, c)) * np.float64(get(vector_one, vector, c))
            out[row] += total


@kernel(fastmath=True)
def distances_to(one, vector_one, rows, vector, num_params, out):
    """Add the squared distance of every row to a vector, in float64, to `out`."""
    for start in range(0, num_params, SEGMENT):
        stop = min(start + SEGMENT, num_params)
        for row in range(len(rows)):
            source = rows[row]
            total = 0.0
            for c in range(start, stop):
                away = np.float64(get(one, source, c)) - np.float64(get(vector_one, vector, c))
                total += away * away
            out[row] += total
