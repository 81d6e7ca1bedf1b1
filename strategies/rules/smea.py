"""Smallest maximum eigenvalue averaging: the mean of the n - f updates that spread least in their widest direction.

Allouah, Farhadkhani, Guerraoui, Gupta, Pinot and Stephan, "Distributed Learning with Curious and Adversarial Machines",
ICML 2023 (SMEA): of all sets S of n - f updates the one with the least largest eigenvalue of its covariance. No
deviation: eigenvalues are exact, and of sets with equal ones the lowest rows count.
Needs n >= 2f + 1. Costs one Gram matrix and one sum, O(n^2 d), and a search that is exact or an error.

The search is in n x n space. A set's scatter only grows with more members, so two updates at distance r that are
together cost at least r^2 / 2: who has too many such partners for the best set known is left out of all better ones,
and so are distant attackers. Of what is left all sets are tried, up to a limit; any direction u bounds the eigenvalue
of a set from below by the scatter of its inner products with u, so that few sets need an eigenvalue.
"""

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from strategies.rule import Stack, claimable, count_byzantine, require_clients, uniform_weights, weight_rule
from tasks.errors import AggregationError

MOST_SETS = 250_000  # a few seconds
CHUNK, BATCH = 4096, 512  # sets whose bounds, and whose eigenvalues, are computed at once
MOST_DIRECTIONS = 32
SLACK = 1e-9  # relative error of eigenvalues and bounds, generously


@claimable
@weight_rule
def smea(updates: Stack, *, num_byzantine: int | float) -> Tensor:
    """Weigh the n - f updates with the least largest eigenvalue of covariance equally; needs n >= 2f + 1."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("smea", "2f + 1", 2 * f + 1, num_clients, f)
    chosen = least_spread(updates.squared_distances.cpu(), num_clients - f)
    return uniform_weights(updates, chosen.to(updates.device))


def least_spread(distances: Tensor, size: int) -> Tensor:
    """Return the `size` points, ascending, of the least largest eigenvalue, from squared distances."""
    nearest = distances.clone().fill_diagonal_(-1.0).argsort(dim=1, stable=True)[:, :size].sort(1).values
    spreads = spread(distances, nearest)
    best, least = nearest[spreads.argmin()], float(spreads.min())
    left = possible(distances, least, len(distances) - size)
    if len(left) == size:
        return left
    distances = distances[left][:, left]
    num_out = len(left) - size
    if not least > 0:
        return best  # all equal
    if (count := math.comb(len(left), num_out)) > MOST_SETS:
        raise AggregationError(
            f"smea would have to try {count} sets of {size} among {len(left)} updates, more than {MOST_SETS}; lower "
            "num_byzantine, sample fewer clients, or use caf, which filters by the same eigenvalue without a search"
        )
    found = _search(distances, size, least)
    return best if found is None else left[found]


def possible(distances: Tensor, least: float, num_out: int) -> Tensor:
    """Return the points that a set of spread at most `least` with all but `num_out` points may hold, ascending."""
    clashes = distances > 2 * least * (1 + SLACK)
    left = torch.ones(len(distances), dtype=torch.bool)
    while num_out:
        degrees = clashes[:, left].sum(1).where(left, 0)
        if int(degrees.max()) <= num_out:
            break
        left[degrees.argmax()] = False
        num_out -= 1
    return left.nonzero().flatten()


def spread(distances: Tensor, sets: Tensor) -> Tensor:
    """Return the largest eigenvalue of the scatter (covariance times size) of every set (``[sets, size]``)."""
    return torch.linalg.eigvalsh(_scatter(distances, sets))[:, -1]


def _scatter(distances: Tensor, sets: Tensor) -> Tensor:
    """Return the Gram matrices (``[sets, size, size]``) around each set's own mean: -1/2 of distances, centred."""
    among = distances[sets[:, :, None], sets[:, None, :]].clamp(max=1e300) / -2
    rows = among.mean(2, keepdim=True)
    return among - rows - rows.transpose(1, 2) + rows.mean(1, keepdim=True)


def _search(distances: Tensor, size: int, least: float) -> Tensor | None:
    """Return the first set of least spread, None if none is below `least`."""
    best, directions = None, torch.empty(0, len(distances), dtype=distances.dtype)
    for out in _left_out(len(distances), len(distances) - size):
        out = out[_bounds(directions, out, size) < least]
        if not len(out):
            continue
        for batch in out.split(BATCH):
            sets = _others(batch, len(distances))
            scatter = _scatter(distances, sets)
            lower = least * torch.eye(size, dtype=scatter.dtype) - scatter
            below = torch.linalg.cholesky_ex(lower).info == 0  # positive: every eigenvalue is below the least
            below[0] |= len(directions) < MOST_DIRECTIONS
            values, vectors = torch.linalg.eigh(scatter[below])
            for members, value, vector in zip(sets[below], values[:, -1].tolist(), vectors, strict=True):
                if len(directions) < MOST_DIRECTIONS or value < least:
                    directions = torch.cat(
                        [_projections(distances, members, vector), directions[: MOST_DIRECTIONS - 1]]
                    )
                if value < least:
                    best, least = members, value
    return best


def _projections(distances: Tensor, members: Tensor, vectors: Tensor) -> Tensor:
    """Return <x_i, u> (``[1, points]``) for the widest direction u of a set, up to a constant."""
    top = vectors[:, -1] - vectors[:, -1].mean()
    offsets = distances[:, members] @ top / -2
    length = (top @ offsets[members]).clamp(min=0).sqrt()
    offsets = offsets - offsets[members].mean()
    return (offsets / length if length > 0 else torch.zeros_like(offsets))[None]


def _bounds(directions: Tensor, out: Tensor, size: int) -> Tensor:
    """Return the largest scatter along any of the directions (``[sets]``) of all points but those left `out`."""
    if not len(directions):
        return torch.full((len(out),), -torch.inf, dtype=directions.dtype)
    gone = directions[:, out]
    sums = directions.sum(1, keepdim=True) - gone.sum(2)
    squares = directions.square().sum(1, keepdim=True) - gone.square().sum(2)
    return (squares - sums.square() / size).max(0).values * (1 - SLACK)


def _left_out(num_points: int, num_out: int) -> Iterator[Tensor]:
    """Yield all choices of `num_out` points (``[choices, num_out]``) in chunks."""
    choices = itertools.combinations(range(num_points), num_out)
    while chunk := list(itertools.islice(choices, CHUNK)):
        yield torch.tensor(chunk)


def _others(out: Tensor, num_points: int) -> Tensor:
    """Return the points that are not left out (``[sets, points - num_out]``), ascending."""
    kept = torch.ones(len(out), num_points, dtype=torch.bool).scatter_(1, out, False)
    return kept.nonzero()[:, 1].reshape(len(out), num_points - out.shape[1])
