"""Fang's attack on Krum: the farthest step backwards that Krum still selects.

Fang, Cao, Jia and Gong, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020,
section 4.2. With s the signs of the direction the aggregate would take, all attackers send -lambda s, as one cluster;
lambda starts at the bound of theorem 1 and is halved until Krum selects the cluster or it falls below a threshold.

    full knowledge      s from the honest update that Krum would select; Krum runs on f copies and all honest updates
    partial knowledge   s from the mean of the attackers' own updates; Krum runs on q copies and these, q = 1, 2, ...
                        until a lambda is found, for what attackers know stands for what they do not

Knows: the rule, and with at least n - f known updates (all honest ones) the attack is the full one, else the partial.
Deviation: the global model is the origin of updates, so the paper's w_Re is 0. A sign of exactly 0 stays 0, and theorem
1's d counts the others. s comes from the known updates alone, without the attackers' own before the attack under
full knowledge. The threshold is a share of the bound, so that updates may have any scale (the paper's is 1e-5 itself).
Copies are exact, as the search assumes (the paper spreads them within 0.01, more than many updates measure).
The paper leaves open how many neighbours Krum sums under partial knowledge: here as for q Byzantine among q + k, that
is k - 2, and q stops at k - 2, beyond which copies are neighbours enough for themselves. Ties count as lost. A search
without success sends its last, smallest step.
Cost: three readings, one Gram matrix; each step of the search is n x n, as distances to -lambda s are quadratics.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from client.collusion._geometry import Known, shared
from tasks.errors import AggregationError, SpecError


def fang_krum(
    known: Tensor,
    num_attackers: int,
    num_clients: int,
    generator: torch.Generator,
    *,
    num_byzantine: int | None = None,
    threshold: float = 1e-5,
) -> Tensor:
    """Return -lambda s for every attacker; `num_byzantine` is what the attacked Krum assumes, None: the true number.

    Raises `AggregationError` where that Krum is undefined or too few neighbours make any lambda succeed.
    """
    if not 0 < threshold < 1 or (num_byzantine is not None and num_byzantine < 0):
        came = f"{threshold} and {num_byzantine}"
        raise SpecError(f"fang_krum wants 0 < threshold < 1 and num_byzantine >= 0, got {came}")
    honest = Known.of("fang_krum", known, num_attackers, num_clients)
    if not num_attackers:
        return known[:0]
    assumed = num_attackers if num_byzantine is None else num_byzantine
    least = max(2 * assumed + 3, assumed + num_attackers + 2)
    if num_clients < least:
        raise AggregationError(
            f"fang_krum wants n >= {least} for {num_attackers} attackers and a Krum that assumes {assumed}, "
            f"got n = {num_clients}; take fewer attackers or sample more clients"
        )
    distances = honest.squared_distances()
    if len(honest) >= num_clients - num_attackers:
        neighbours, trials = num_clients - assumed - 2, range(num_attackers, num_attackers + 1)
        chosen = int(_scores(distances, neighbours).argmin())
    else:
        neighbours = max(1, len(honest) - 2)
        chosen, trials = None, range(1, min(num_attackers, neighbours) + 1)
    size = _search(_measure(honest, distances, chosen), trials, neighbours, threshold)
    return shared(honest.craft(lambda block: _signs(block, chosen).mul_(-size)), num_attackers)


@dataclass(frozen=True)
class _Geometry:
    """All that Krum's scores with copies of -lambda s depend on; squared distances to it are quadratics in lambda."""

    distances: Tensor  # ||x_i - x_j||^2, [k, k]
    squares: Tensor  # ||x_i||^2, [k]
    slopes: Tensor  # <x_i, s>, [k]
    square: float  # ||s||^2

    def selects(self, size: float, copies: int, neighbours: int) -> bool:
        """True where Krum, on the known updates and `copies` of -`size` s, gives the copies the lowest score."""
        to_copies = (self.squares + 2 * size * self.slopes + size**2 * self.square).clamp_(min=0)
        own = torch.cat([to_copies.new_zeros(copies - 1), to_copies]).sort().values[:neighbours].sum()
        others = torch.cat([_to_others(self.distances), to_copies[:, None].expand(-1, copies)], 1)
        return bool(own < others.sort(1).values[:, :neighbours].sum(1).min())

    def bound(self, copies: int, neighbours: int) -> float:
        """Return theorem 1's upper bound of lambda: above it, the copies' honest neighbours alone are too far."""
        score = float(_scores(self.distances, neighbours).min()) / (neighbours - copies + 1)
        return (math.sqrt(score) + math.sqrt(float(self.squares.max()))) / math.sqrt(self.square)


def _search(geometry: _Geometry, trials: range, neighbours: int, threshold: float) -> float:
    """Return the first lambda of bound, bound / 2, ... that Krum selects with one of these numbers of copies.

    Without any, it is the last one tried, which lies above `threshold` times the bound.
    """
    size = 0.0
    if not geometry.square:
        return size
    for copies in trials:
        size = bound = geometry.bound(copies, neighbours)
        while not (found := geometry.selects(size, copies, neighbours)) and size / 2 > threshold * bound:
            size /= 2
        if found:
            break
    return size


def _to_others(distances: Tensor) -> Tensor:
    return distances.clone().fill_diagonal_(torch.inf)


def _scores(distances: Tensor, neighbours: int) -> Tensor:
    """Return Krum's scores of the known updates alone, ``[k]``."""
    return _to_others(distances).sort(1).values[:, : min(neighbours, len(distances) - 1)].sum(1)


def _signs(block: Tensor, chosen: int | None) -> Tensor:
    return (block.mean(0) if chosen is None else block[chosen]).sign()


def _measure(known: Known, distances: Tensor, chosen: int | None) -> _Geometry:
    squares = distances.new_zeros(len(known))
    slopes, square = torch.zeros_like(squares), squares.new_zeros(())
    for _, block in known.blocks():
        signs = _signs(block, chosen)
        squares += block.square().sum(1)
        slopes += block @ signs
        square += signs @ signs
    return _Geometry(distances, squares, slopes, float(square))
