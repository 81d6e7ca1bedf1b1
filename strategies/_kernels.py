"""Machine code for the loops that aggregation spends its time in, by Numba; `strategies.compiled` calls it.

Stacks come as addresses of rows, so that views cost no copy; `one` is a 1 of the stack's precision and makes each
kernel serve float32 and float64. Two inner loops are written as vector instructions, as loops in Python leave them
several times slower: what a sorting network does, and the products of a tile of rows with another.
Results do not depend on the number of threads. NaN is not expected; infinities are.
"""

import itertools
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

from strategies.networks import BOTH, LOWER, PADDING, SIZES, SORT, UPPER, merge_exchange

FEATURES = llvmlite.binding.get_host_cpu_features()
# Bytes of a vector register, and rows of a tile whose sums of products fit the registers, together with two operands.
REGISTER, TILE = (64, 5) if FEATURES.get("avx512f") else (32, 3) if FEATURES.get("avx") else (16, 3)
STEP = 64  # columns of one exchange; widths of blocks that are sorted are multiples of it
LANES = REGISTER // 4  # widths of blocks that are multiplied are multiples of it
SEGMENT = 16384  # columns taken at once, of all rows one after the other; long parts of rows load faster
REORDER = {"reassoc", "contract", "nsz"}  # sums may be taken in the order of the vector registers, fixed at compilation

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


def _spots(builder: ir.IRBuilder, one: types.Float, address: Any, starts: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return, for each index, the place of a vector of numbers in the array at `address`, and the vector."""
    element, lanes = ir.DoubleType() if one.bitwidth == 64 else ir.FloatType(), REGISTER * 8 // one.bitwidth
    vector = ir.VectorType(element, lanes)
    places = [builder.bitcast(_place(builder, address, start, element), vector.as_pointer()) for start in starts]
    return [(place, builder.load(place, align=one.bitwidth // 8)) for place in places]


def _exchange(kept: int) -> Any:
    @intrinsic
    def exchange(typing: Any, one: types.Float, address: types.Integer, i: types.Integer, j: types.Integer) -> Any:
        """Sort STEP pairs of numbers, from i and j on: the smaller to i, the larger to j."""

        def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[ir.Value]) -> ir.Value:
            offsets = [ir.Constant(INT, k) for k in range(0, STEP, REGISTER * 8 // one.bitwidth)]
            lower = _spots(builder, one, args[1], [builder.add(args[2], offset) for offset in offsets])
            upper = _spots(builder, one, args[1], [builder.add(args[3], offset) for offset in offsets])
            for (place, value), (other_place, other) in zip(lower, upper):
                smaller, larger = _sorted(builder, value, other)
                if kept & LOWER:
                    builder.store(smaller, place, align=one.bitwidth // 8)
                if kept & UPPER:
                    builder.store(larger, other_place, align=one.bitwidth // 8)
            return context.get_dummy_value()

        return types.void(one, address, i, j), generate

    return exchange


def _sorted(builder: ir.IRBuilder, one: Any, other: Any) -> tuple[Any, Any]:
    """Return the smaller and the larger numbers of two vectors."""
    flags = ("nnan", "nsz")
    smaller = _call(builder, "llvm.minnum", one.type, [one, other], flags)
    return smaller, _call(builder, "llvm.maxnum", one.type, [one, other], flags)


def _call(builder: ir.IRBuilder, name: str, vector: Any, values: Sequence[Any], flags: Sequence[str]) -> Any:
    kind = ir.FunctionType(vector, [vector] * len(values))
    bits = 64 if vector.element == DOUBLE else 32
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.v{vector.count}f{bits}")
    return builder.call(function, values, fastmath=flags)


exchange_both, exchange_lower, exchange_upper = _exchange(BOTH), _exchange(LOWER), _exchange(UPPER)


@intrinsic
def sort_rows(typing: Any, one: types.Float, work: Any, width: Any, rows: Any, k: Any) -> Any:
    """Sort SIZES[k] rows of the workspace in registers; their numbers are in the array at `rows`."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Sequence[Any]) -> ir.Value:
        _, work_, width_, rows_, k_ = args
        lanes = ir.Constant(INT, REGISTER * 8 // one.bitwidth)
        done = builder.append_basic_block("sorted")
        choice = builder.switch(k_, done)
        for case, size in enumerate(SIZES):
            block = builder.append_basic_block(f"sort{size}")
            choice.add_case(ir.Constant(k_.type, case), block)
            builder.position_at_end(block)
            numbers = [builder.load(_place(builder, rows_, ir.Constant(INT, at), INT)) for at in range(size)]
            starts = [builder.mul(number, width_) for number in numbers]
            with cgutils.for_range(builder, builder.udiv(width_, lanes)) as loop:
                column = builder.mul(loop.index, lanes)
                spots = _spots(builder, one, work_, [builder.add(start, column) for start in starts])
                values = [value for _, value in spots]
                for i, j in itertools.chain(*merge_exchange(size)):
                    values[i], values[j] = _sorted(builder, values[i], values[j])
                for (place, _), value in zip(spots, values):
                    builder.store(value, place, align=one.bitwidth // 8)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(one, work, width, rows, k), generate


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

                def load(first: Any) -> list[Any]:
                    starts = [builder.add(builder.add(first, step), column) for step in steps]
                    return [value for _, value in _spots(builder, one, rows_, starts)]

                left = load(a_)
                right = left if diagonal else load(b_)
                for i, j in pairs:
                    terms = [left[i], right[j], builder.load(sums[i, j])]
                    builder.store(_call(builder, "llvm.fmuladd", vector, terms, ()), sums[i, j])
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
    """Run a network on `filled` columns from `start` on; the workspace is ``[rows + 1 + PADDING, width]``."""
    num_rows = len(rows)
    for row in range(num_rows):
        source = rows[row]
        for c in range(filled):
            put(one, get(one, source, start + c), work, row * width + c)
        for c in range(filled, width):
            put(one, one, work, row * width + c)
    for c in range(width):
        put(one, np.inf, work, (num_rows + PADDING) * width + c)
    at = 0
    while at < len(program):
        step = program[at]
        if step >= SORT:
            sort_rows(one, work, width, program.ctypes.data + 8 * (at + 1), step - SORT)
            at += 1 + SIZES[step - SORT]
            continue
        i, j = program[at + 1] * width, program[at + 2] * width
        at += 3
        if step == BOTH:
            for c in range(0, width, STEP):
                exchange_both(one, work, i + c, j + c)
        elif step == LOWER:
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
    total = len(rows) * width  # a row of the workspace behind those that are sorted
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
                    centre, value = get(one, work, median + c), get(one, work, best + c)
                    other = get(one, work, row * width + c)
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


@kernel(fastmath=True)
def weighted_sum(one, rows, weights, num_params, out, sums):
    """Write the sum of rows times their weights; `sums` has space for SEGMENT float64 numbers, in which it is built."""
    num_rows = len(rows)
    for start in range(0, num_params, SEGMENT):
        width = min(SEGMENT, num_params - start)
        for c in range(width):
            put(1.0, 0.0, sums, c)
        row = 0
        while row + 8 <= num_rows:  # eight at a time, so that the sums are read and written seldom
            r0, r1, r2, r3 = rows[row], rows[row + 1], rows[row + 2], rows[row + 3]
            r4, r5, r6, r7 = rows[row + 4], rows[row + 5], rows[row + 6], rows[row + 7]
            w0, w1, w2, w3 = weights[row], weights[row + 1], weights[row + 2], weights[row + 3]
            w4, w5, w6, w7 = weights[row + 4], weights[row + 5], weights[row + 6], weights[row + 7]
            for c in range(width):
                k = start + c
                a = w0 * get(one, r0, k) + w1 * get(one, r1, k)
                b = w2 * get(one, r2, k) + w3 * get(one, r3, k)
                d = w4 * get(one, r4, k) + w5 * get(one, r5, k)
                e = w6 * get(one, r6, k) + w7 * get(one, r7, k)
                put(1.0, get(1.0, sums, c) + ((a + b) + (d + e)), sums, c)
            row += 8
        while row < num_rows:
            source, weight = rows[row], weights[row]
            for c in range(width):
                put(1.0, get(1.0, sums, c) + weight * get(one, source, start + c), sums, c)
            row += 1
        for c in range(width):
            put(one, get(1.0, sums, c), out, start + c)
