"""Min-Max: as far from the mean as possible, yet no farther from anyone than honest clients are from each other.

Shejwalkar and Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
Federated Learning", NDSS 2021, the attack on unknown aggregation rules called Min-Max: all attackers send

    m = mean + gamma p,    gamma the largest with max_i ||m - x_i|| <= max_ij ||x_i - x_j||,

p the inverse unit vector, standard deviation or sign vector of the honest updates.

Knows: the honest updates of the round, or the attackers' own in their place (the paper's "updates unknown").
Deviation: the paper finds gamma by a halving search (its algorithm 1), which reads n x d distances in every step, stops
within a tolerance and cannot pass twice its first guess. ||m - x_i||^2 is a quadratic in gamma with one reading's
inner products as coefficients, and gamma = 0 is always allowed, so the search's limit is the smallest positive root.
Where p or the spread is 0 (a single known update) the mean itself is sent.
Cost: two readings and one Gram matrix.
"""

import torch
from torch import Tensor

from client.collusion._geometry import Known
from client.collusion._perturbation import Line, Perturbation, at


def min_max(
    known: Tensor,
    num_attackers: int,
    num_clients: int,
    generator: torch.Generator,
    *,
    perturbation: Perturbation = "unit",
) -> Tensor:
    """Return mean + gamma p of the `known` updates for every attacker, with the largest gamma that Min-Max allows."""
    honest = Known.of("min_max", known, num_attackers, num_clients)
    return at(honest, perturbation, largest_gamma(Line.through(honest, perturbation)), num_attackers)


def largest_gamma(line: Line) -> float:
    """Return the smallest positive root of square gamma^2 - 2 slope_i gamma + ||d_i||^2 = max_jk ||d_j - d_k||^2."""
    if not line.square:
        return 0.0
    squares = line.products.diagonal()
    bound = (squares[:, None] + squares[None, :] - 2 * line.products).max()
    room = (bound - squares).clamp_(min=0)  # the mean is never farther from an update than the diameter
    root = (line.slopes.square() + line.square * room).sqrt_()
    # (slope + root) / square, written without a difference where the slope is negative
    gammas = torch.where(line.slopes > 0, (line.slopes + root) / line.square, room / (root - line.slopes))
    return float(gammas.nan_to_num_(nan=0.0).min())  # 0 / 0: no room and no slope
