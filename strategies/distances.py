"""Accurate inner products, distances and norms of client updates, from one or two readings of the stack.

Distance-based rules need only n x n numbers. The fast way to them is one Gram matrix, and its textbook
form ||x||^2 + ||y||^2 - 2<x, y> cancels when two updates are close to each other but far from the
origin. Here the origin is one of the updates: a row near the coordinate-wise median, so that a few
huge rows cannot carry it away. Pairs that still cancel belong to tight clusters far from the origin;
each cluster is measured again around one of its own members. The distances to that member are free
of cancellation, so a cluster shrinks each time, and no pair is left to chance. What one reading shows to lie apart
from the middle of a cluster is no origin of the next, and after two readings the origin is chosen on all columns:
whoever knows those that are sampled wins a few readings, not one for each update.

Blocks of columns are multiplied in the stack's precision and added up in float64. Rows whose squares leave
float32's range are multiplied in float64. Only distances above 1e154, whose squares no float64 holds, are inf;
norms that long are taken of shortened rows.
Sums of n terms alone, such as norms, are float64 throughout: that costs no more than reading the stack.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from strategies import compiled
from strategies.sorting import middle_mean
from tasks.errors import AggregationError

BLOCK_COLUMNS = 8192
PANEL_ROWS = 64  # a Gram matrix is symmetric: panels of rows let its upper half be skipped
SAMPLE_COLUMNS = 256  # columns that choose the origin; they decide about speed, not about what is right
BLURRED = 1e-5  # share of the largest ||x||^2 of a cluster by which squared distances that cancelled may be wrong
SAMPLED_READINGS = 2  # of a cluster and those it lies in, before its origin is chosen on all columns
CANCELLED = 1 / 16  # share of ||x||^2 + ||y||^2; with float32 products good to 3e-6, larger distances are good to 1e-4
SMALLEST_SQUARE = 1e-33  # per column; a row whose mean square is below it may have lost squares to underflow


def squared_distances(updates: Tensor) -> Tensor:
    """Return ||x_i - x_j||^2 (``[clients, clients]``, float64): symmetric, zero diagonal, relative error below 1e-4."""
    result = torch.zeros(len(updates), len(updates), dtype=torch.float64, device=updates.device)
    everyone = torch.arange(len(updates), device=updates.device)
    clusters = [(everyone, everyone, 0)]  # rows, which positions among them may hold the origin, readings before
    while clusters:
        rows, inner, readings = clusters.pop()
        if readings < SAMPLED_READINGS:
            centre = int(inner[_central(updates, rows[inner])])
        else:
            centre = _surely_central(updates, rows)
        products = gram(updates, int(rows[centre]), rows)
        around, doubtful = _distances_from(products, centre)
        result[rows[:, None], rows[None, :]] = around
        for members in _components(doubtful):
            error = BLURRED * products.diagonal()[members].max()
            clusters.append((rows[members], _inner(around[members][:, members], error), readings + 1))
    return result


def majority_gram(updates: Tensor) -> Tensor:
    """Return the Gram matrix (``[clients, clients]``, float64) around an update that lies with the majority.

    Around such an origin, weighted sums that are dominated by honest updates do not cancel.
    """
    everyone = torch.arange(len(updates), device=updates.device)
    centre = _central(updates, everyone)
    products = gram(updates, centre, everyone)
    _, doubtful = _distances_from(products, centre)
    if int(doubtful.sum(1).max()) >= max(1, len(updates) // 3):  # many rows are close to each other, far from here
        medoid = int(squared_distances(updates).sort(1).values[:, len(updates) // 2].argmin())
        products = gram(updates, medoid, everyone)
    return products


def gram(updates: Tensor, origin: int | None, rows: Tensor) -> Tensor:
    """Return <x_i - x_origin, x_j - x_origin> for i, j in `rows` (``[rows, rows]``, float64), in one reading.

    With `origin` None they are taken around 0.
    """
    if updates.dtype == torch.float64:
        return _gram(updates, origin, rows, torch.float64)
    products = _gram(updates, origin, rows, torch.float32)
    squares = products.diagonal() if origin is None else products.diagonal()[rows != origin]
    return products if _in_range(squares, updates.shape[1]) else _gram(updates, origin, rows, torch.float64)


def norms(updates: Tensor) -> Tensor:
    """Return the L2 norm of every update (``[clients]``, float64)."""
    if compiled.takes(updates):
        return _long_norms(updates, compiled.squares(updates).sqrt())
    narrow = torch.float64 if updates.dtype == torch.float64 else torch.float32
    squares = _squares(updates, narrow)
    if narrow == torch.float32 and not _in_range(squares, updates.shape[1]):
        squares = _squares(updates, torch.float64)
    return _long_norms(updates, squares.sqrt())


def dots(updates: Tensor, vector: Tensor) -> Tensor:
    """Return the inner product of every update with `vector` ``[params]`` (``[clients]``, float64), in one reading."""
    _check_length(updates, vector)
    if compiled.takes(updates) and vector.device == updates.device:
        return compiled.dots(updates, vector)
    total = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    for block, part in _blocks(updates, vector):
        total += block @ part
    return total


def squared_distances_to(updates: Tensor, vector: Tensor) -> Tensor:
    """Return ||x_i - vector||^2 for every update (``[clients]``, float64), from differences and in one reading."""
    _check_length(updates, vector)
    if compiled.takes(updates) and vector.device == updates.device:
        return compiled.distances_to(updates, vector)
    total = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    for block, part in _blocks(updates, vector):
        total += (block - part).square_().sum(1)
    return total


def _check_length(updates: Tensor, vector: Tensor) -> None:
    if vector.shape != updates.shape[1:]:
        raise AggregationError(f"wanted a vector of {updates.shape[1]} parameters, got {list(vector.shape)}")


def _blocks(updates: Tensor, vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield blocks of columns and the part of `vector` they meet, both in float64."""
    parts = vector.to(updates.device).split(BLOCK_COLUMNS)
    for block, part in zip(updates.split(BLOCK_COLUMNS, dim=1), parts, strict=True):
        yield block.double(), part.double()


def _in_range(squares: Tensor, num_params: int) -> bool:
    return bool((torch.isfinite(squares) & (squares >= SMALLEST_SQUARE * num_params)).all())


def _gram(updates: Tensor, origin: int | None, rows: Tensor, dtype: torch.dtype) -> Tensor:
    if compiled.takes(updates):
        return compiled.gram(updates, origin, rows, dtype)
    num_rows, num_params = len(rows), updates.shape[1]
    width = min(BLOCK_COLUMNS if updates.device.type == "cpu" else 2**26 // num_rows, num_params)
    everyone = num_rows == len(updates)
    total = torch.zeros(num_rows, num_rows, dtype=torch.float64, device=updates.device)
    product = torch.zeros(num_rows, num_rows, dtype=dtype, device=updates.device)
    space = torch.empty(num_rows, width, dtype=dtype, device=updates.device)
    for start in range(0, num_params, max(1, width)):
        block = updates[:, start : start + width]
        centred = space[:, : block.shape[1]]
        chosen = block if everyone else block.index_select(0, rows)
        if origin is None:
            centred.copy_(chosen)
        else:
            torch.sub(chosen.to(dtype), block[origin].to(dtype), out=centred)
        for top in range(0, num_rows, PANEL_ROWS):
            bottom = min(top + PANEL_ROWS, num_rows)
            product[top:bottom, :bottom] = centred[top:bottom] @ centred[:bottom].t()
        total += product
    return total.tril() + total.tril(-1).t()


def _squares(updates: Tensor, dtype: torch.dtype) -> Tensor:
    total = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    for block in updates.split(4 * BLOCK_COLUMNS, dim=1):
        total += torch.linalg.vector_norm(block.to(dtype), dim=1).double().square()
    return total


def _long_norms(updates: Tensor, found: Tensor) -> Tensor:
    """Return the norms with those whose squares no float64 holds taken of the row divided by its largest entry."""
    for row in found.isinf().nonzero().flatten().tolist():
        largest = updates[row].abs().max().double()
        found[row] = largest * torch.linalg.vector_norm(updates[row].double() / largest)
    return found


def _inner(distances: Tensor, error: Tensor) -> Tensor:
    """Return the positions whose median squared distance to all may be the least, if all are wrong by `error`."""
    typical = distances.sort(1).values[:, len(distances) // 2]
    return (typical <= typical.min() + error).nonzero().flatten()


def _central(updates: Tensor, rows: Tensor) -> int:
    """Return the position in `rows` of the row nearest to their coordinate-wise median, on a sample of columns."""
    stride = -(-updates.shape[1] // SAMPLE_COLUMNS) or 1
    sample = updates[:, ::stride].index_select(0, rows).double()
    return int((sample - sample.median(0).values).square().sum(1).argmin())


def _surely_central(updates: Tensor, rows: Tensor) -> int:
    """Return the position in `rows` of the row nearest to their coordinate-wise median, on all columns."""
    middle = middle_mean(updates, (len(rows) - 1) // 2, len(rows) // 2 + 1, rows)
    return int(squared_distances_to(updates, middle)[rows].argmin())


def _distances_from(products: Tensor, centre: int) -> tuple[Tensor, Tensor]:
    """Return squared distances by a Gram matrix, and which of them cancelled; those to its `centre` never do."""
    squares = products.diagonal()
    sums = squares[:, None] + squares[None, :]
    distances = (sums - 2 * products).clamp_(min=0).fill_diagonal_(0)
    doubtful = ~(distances >= CANCELLED * sums)  # also where inf - inf left NaN
    doubtful[centre], doubtful[:, centre] = False, False
    return distances.nan_to_num_(nan=torch.inf, posinf=torch.inf), doubtful.fill_diagonal_(False)


def _components(linked: Tensor) -> list[Tensor]:
    """Return the connected components, of two members or more, of a symmetric boolean matrix."""
    left = linked.any(1)
    found = []
    while left.any():
        members = torch.zeros_like(left)
        members[left.nonzero()[0]] = True
        while (grown := members | linked[members].any(0)).sum() > members.sum():
            members = grown
        found.append(members.nonzero().flatten())
        left &= ~members
    return found
