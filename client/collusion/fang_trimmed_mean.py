"""Fang's attack on the trimmed mean: on every parameter, just beyond the honest values, against their direction.

Fang, Cao, Jia and Gong, "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020,
section 4.3, the directed deviation attack on trimmed mean; section 4.4 applies it to the median. Where the honest
mean of a parameter is positive, attackers go below the smallest honest value, elsewhere above the largest:

    full knowledge      uniform between the extreme w and b w or w / b, whichever lies beyond w; the paper's b is 2
    partial knowledge   uniform in mean - 4 std .. mean - 3 std, or mean + 3 std .. mean + 4 std

Knows: with at least n - f known updates the attack is the full one, with fewer (the attackers' own) the partial one.
Deviation: the paper's local models are updates here, relative to the global model, as in the authors' program; the
direction is the sign of the mean of the known updates, the attackers' own honest ones not counted under full
knowledge. A parameter whose mean is exactly 0 is pushed up; one that is 0 for everybody stays 0.
Cost: one reading and one draw per number sent; every attacker draws its own.
"""

import torch
from torch import Tensor

from client.collusion._geometry import Known, centre, deviation
from tasks.errors import SpecError


def fang_trimmed_mean(
    known: Tensor, num_attackers: int, num_clients: int, generator: torch.Generator, *, factor: float = 2.0
) -> Tensor:
    """Return rows drawn beyond the `known` values of every parameter; `factor` is the paper's b, above 1."""
    if factor <= 1:
        raise SpecError(f"fang_trimmed_mean wants factor > 1, got {factor}")
    honest = Known.of("fang_trimmed_mean", known, num_attackers, num_clients)
    full = len(honest) >= num_clients - num_attackers

    def values(block: Tensor) -> Tensor:
        draws = torch.rand(num_attackers, block.shape[1], generator=generator, dtype=torch.float64).to(block.device)
        return _beyond(block, draws, factor) if full else _estimated(block, draws)

    return honest.craft(values, num_attackers)


def _beyond(block: Tensor, draws: Tensor, factor: float) -> Tensor:
    upwards = block.mean(0) <= 0
    edge = torch.where(upwards, block.amax(0), block.amin(0))
    far = torch.where(upwards == (edge > 0), edge * factor, edge / factor)
    return draws.mul_(far - edge).add_(edge)


def _estimated(block: Tensor, draws: Tensor) -> Tensor:
    mean = centre(block)
    std = deviation(block)
    return draws.add_(3).mul_(torch.where(mean <= 0, std, -std)).add_(mean)
