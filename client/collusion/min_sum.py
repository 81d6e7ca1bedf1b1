"""Min-Sum: as far from the mean as possible, yet no farther from all together than some honest client is.

Shejwalkar and Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for
Federated Learning", NDSS 2021, the attack on unknown aggregation rules called Min-Sum: all attackers send

    m = mean + gamma p,    gamma the largest with sum_i ||m - x_i||^2 <= max_i sum_j ||x_i - x_j||^2,

p the inverse unit vector, standard deviation or sign vector of the honest updates. Stealthier than Min-Max.

Knows: the honest updates of the round, or the attackers' own in their place (the paper's "updates unknown").
Deviation: no halving search (the paper's algorithm 1), but its limit. Deviations from the mean sum to 0, so with k
known updates both sides are sum_j ||x_j - mean||^2 plus k ||gamma p||^2 or k max_i ||x_i - mean||^2, whence

    gamma = max_i ||x_i - mean|| / ||p||:

the attackers stand just as far from the mean as the farthest honest client, only in the direction of p.
Where p or the spread is 0 (a single known update) the mean itself is sent. Cost: two readings.
"""

import math

import torch
from torch import Tensor

from client.collusion._geometry import Known
from client.collusion._perturbation import Perturbation, at, centre_along


def min_sum(
    known: Tensor,
    num_attackers: int,
    num_clients: int,
    generator: torch.Generator,
    *,
    perturbation: Perturbation = "unit",
) -> Tensor:
    """Return mean + gamma p of the `known` updates for every attacker, with the largest gamma that Min-Sum allows."""
    honest = Known.of("min_sum", known, num_attackers, num_clients)
    return at(honest, perturbation, _largest_gamma(honest, perturbation), num_attackers)


def _largest_gamma(known: Known, perturbation: Perturbation) -> float:
    squares = torch.zeros(len(known), dtype=torch.float64, device=known.updates.device)
    square = squares.new_zeros(())
    for _, block in known.blocks():
        _, direction = centre_along(block, perturbation)
        squares += block.square_().sum(1)
        square += direction @ direction
    return math.sqrt(float(squares.max() / square)) if square else 0.0
