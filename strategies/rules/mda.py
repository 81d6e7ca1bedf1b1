"""Minimum diameter averaging: the mean of the n - f updates whose largest distance to each other is least.

El Mhamdi, Guerraoui, Guirguis, Hoang and Rouault, "Genuinely Distributed Byzantine Machine Learning", PODC 2020 (MDA),
after the minimum volume ellipsoid of Rousseeuw, "Multivariate Estimation with High Breakdown Point", 1985. As a rule
several sets have the least diameter, which is that of two updates, and the paper leaves open which of them counts. Here
it is the set whose second largest distance is least, then whose third is, and so on, so that the order of the clients
decides nothing while no two distances are equal. Of pairs equally far to the last bit, as among small whole numbers,
the first in the order of rows that a set can hold is settled, and what follows is least among the sets that hold it:
then the diameter is still the least there is, but another choice might have had a shorter second or third distance.
Needs n >= 2f + 1. Costs one Gram matrix and one sum, O(n^2 d), and the search below; exact or an error.

No set is enumerated. A set of diameter at most t exists exactly if f updates touch every pair that is further apart:
a vertex cover of size f in the graph of those pairs. Bounded search finds it: an update in more than f such pairs is
left out, one in a single pair stays, else branch on the one in most. That grows with f alone, not with C(n, f).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strategies.rule import Stack, claimable, count_byzantine, require_clients, uniform_weights, weight_rule
from tasks.errors import AggregationError

MOST_BRANCHES = 100_000  # a few seconds


@claimable
@weight_rule
def mda(updates: Stack, *, num_byzantine: int | float) -> Tensor:
    """Weigh the n - f updates of least diameter equally and all others 0; needs n >= 2f + 1."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("mda", "2f + 1", 2 * f + 1, num_clients, f)
    chosen = least_diameter(updates.squared_distances.cpu().numpy(), f)
    return uniform_weights(updates, torch.tensor(chosen, device=updates.device))


def least_diameter(distances: NDArray[np.float64], num_out: int) -> list[int]:
    """Return the n - `num_out` points of least diameter, then least second largest distance and so on, ascending.

    Of pairs at exactly the same distance the first in row order is settled, before shorter distances are looked at.
    """
    num_points = len(distances)
    size = num_points - num_out
    if num_out == 0 or size < 2:
        return list(range(size))
    lengths = np.unique(distances[np.triu_indices(num_points, 1)])
    search = CoverSearch(num_points, num_out)
    kept = 0  # points of the wanted set found up to now; the distances between them are settled
    high = len(lengths) - 1  # the whole stack has no longer pair than this
    step = max(1, high // 2)
    while kept.bit_count() < size:
        low = -1  # no pair may be kept: too few
        while high - low > 1:
            middle = max(high - step, low + 1)
            if search.covers(too_long(distances, lengths[middle]), kept):
                high, step = middle, 2 * step
            else:
                low, step = middle, max(1, (high - middle) // 2)
        kept, step = _settle(search, distances, float(lengths[high]), kept), 1
    return _members(kept)


def too_long(distances: NDArray[np.float64], limit: float) -> list[int]:
    """Return, for every point, the bits of the points further from it than `limit`."""
    rows = np.packbits(distances > limit, axis=1, bitorder="little")
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def _settle(search: "CoverSearch", distances: NDArray[np.float64], length: float, kept: int) -> int:
    """Return `kept` and the first pair at distance `length` that a set without longer pairs can hold besides."""
    graph = too_long(distances, length)
    ones, others = np.nonzero(np.triu(distances == length, 1))
    for one, other in zip(ones.tolist(), others.tolist(), strict=True):
        pair = kept | 1 << one | 1 << other
        new = _members(pair & ~kept)
        if new and not any(graph[i] & pair for i in new) and search.covers(graph, pair):
            return pair
    raise AssertionError("the least length is that of a pair")


def _members(bits: int) -> list[int]:
    return [i for i in range(bits.bit_length()) if bits >> i & 1]


class CoverSearch:
    """Decides whether `num_out` points, none of them to be kept, touch all edges of a graph; counts its branches."""

    def __init__(self, num_points: int, num_out: int) -> None:
        self.everyone = (1 << num_points) - 1
        self.num_out = num_out
        self.branches = 0

    def covers(self, graph: list[int], kept: int) -> bool:
        """Return whether a cover exists; edges between two kept points do not count."""
        out = 0
        for point in _members(kept):
            out |= graph[point]
        out &= ~kept
        return self._covers(graph, self.everyone & ~kept & ~out, self.num_out - out.bit_count())

    def _covers(self, graph: list[int], left: int, budget: int) -> bool:
        """Return whether `budget` of the points `left` touch all edges among these."""
        while budget >= 0:
            degrees = {i: degree for i in _members(left) if (degree := (graph[i] & left).bit_count())}
            if not degrees:
                return True
            largest = sorted(degrees.values(), reverse=True)
            if 2 * sum(largest[:budget]) < sum(largest):
                return False  # those in most pairs do not suffice
            most = max(degrees, key=degrees.__getitem__)
            single = next((i for i, degree in degrees.items() if degree == 1), None)
            if degrees[most] > budget or (degrees[most] <= 2 and single is None):
                left, budget = left & ~(1 << most), budget - 1  # too many neighbours to leave out, or a ring
            elif single is not None:
                left, budget = left & ~(graph[single] & left), budget - 1
            else:
                self._count()
                if self._covers(graph, left & ~(1 << most), budget - 1):
                    return True
                budget -= degrees[most]
                left &= ~(graph[most] & left)
        return False

    def _count(self) -> None:
        self.branches += 1
        if self.branches > MOST_BRANCHES:
            raise AggregationError(
                f"mda gave up the search for the set of least diameter after {MOST_BRANCHES} branches: with "
                f"n = {self.everyone.bit_length()} and f = {self.num_out} these updates make it too hard; "
                "lower num_byzantine, sample fewer clients, or use caf or geometric_median, which need no search"
            )
