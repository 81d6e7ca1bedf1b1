"""Bulyan: pick n - 2f updates one by one with another rule, then average per parameter what is near their median.

El Mhamdi, Guerraoui and Rouault, "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018,
section 4 (algorithm Bulyan(A)). theta = n - 2f times, the inner rule A is applied to those not yet picked, with f
unchanged, and the update next to A's output is picked; then each parameter is the mean of the beta = theta - 2f values
nearest to the median of the theta picks.
A may be any Byzantine-resilient rule; here it is Krum, whose output is an update and whose last pick compares f - 1
neighbours (for f = 1 none, so that all tie), or the coordinate-wise trimmed mean or median.
Deviation: none. What the paper leaves open is settled so: a tie of updates goes to the lowest index; of two values as
far from the median the lower one counts.

Precondition: n >= 4f + 3. Cost: the updates are read for their distances and the picks once for the last step; Krum
picks in n x n space, in O(theta n^2). With the other inner rules each of the theta picks reads all updates again.
"""

from typing import Literal

import torch
from torch import Tensor

from strategies.distances import norms
from strategies.rule import Stack, count_byzantine, require_clients, stack_rule
from strategies.sorting import middle_mean, nearest_mean

WIDTH = 2**17  # columns at once; a copy of the rows in question, which sorting takes faster when it is large
FARTHEST = 1e300  # stands for squared distances that no float64 holds, so that sums stay finite
LAWS_NOT_KEPT = {
    "client_order": "with f = 2 the last pick looks at one neighbour, which sees it as near: the lower index wins",
}


@stack_rule
def bulyan(
    updates: Stack, *, num_byzantine: int | float, inner: Literal["krum", "trimmed_mean", "median"] = "krum"
) -> Tensor:
    """Return, per parameter, the mean of the n - 4f values nearest to the median of n - 2f picks; needs n >= 4f + 3."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("bulyan", "4f + 3", 4 * f + 3, num_clients, f)
    picks = krum_picks(updates.squared_distances, f) if inner == "krum" else central_picks(updates, f, inner)
    result = torch.empty(updates.num_params, dtype=updates.dtype, device=updates.device)
    for columns, block in updates.blocks(WIDTH):
        result[columns] = nearest_mean(block.index_select(0, picks), num_clients - 4 * f)
    return result


def krum_picks(distances: Tensor, f: int) -> Tensor:
    """Return the indices that Krum chooses from all, from all but the first choice, and so on, n - 2f of them.

    Each row's others are sorted once; a choice takes one of them away and one off the number of neighbours.
    """
    num_clients = len(distances)
    others = distances.clamp(max=FARTHEST).fill_diagonal_(torch.inf).sort(1)
    nearest, who = others.values[:, :-1], others.indices[:, :-1]
    left = torch.ones(num_clients, dtype=torch.bool, device=distances.device)
    picks = []
    for size in range(num_clients, 2 * f, -1):
        present = left[who]
        neighbours = present & (present.cumsum(1) <= size - f - 2)
        scores = torch.where(neighbours, nearest, 0.0).sum(1)
        pick = scores.where(left, torch.inf).argsort(stable=True)[0]
        left[pick] = False
        picks.append(pick)
    return torch.stack(picks)


def central_picks(updates: Stack, f: int, inner: Literal["trimmed_mean", "median"]) -> Tensor:
    """Return the n - 2f indices nearest, one after the other, to the trimmed mean or median of those not yet chosen."""
    left = torch.arange(len(updates), device=updates.device)
    picks = []
    while (size := len(left)) > 2 * f:
        low, high = (f, size - f) if inner == "trimmed_mean" else ((size - 1) // 2, size // 2 + 1)
        squares = torch.zeros(size, dtype=torch.float64, device=updates.device)
        for _, block in updates.blocks(WIDTH):
            rows = block.index_select(0, left)
            squares += norms(rows - middle_mean(rows, low, high)).square()
        nearest = int(squares.argsort(stable=True)[0])
        picks.append(left[nearest])
        left = torch.cat([left[:nearest], left[nearest + 1 :]])
    return torch.stack(picks)
