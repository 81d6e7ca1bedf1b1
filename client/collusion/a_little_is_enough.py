"""A Little Is Enough (ALIE): hide inside the spread of the honest updates.

G. Baruch, M. Baruch and Y. Goldberg, "A Little Is Enough: Circumventing Defenses For Distributed Learning",
NeurIPS 2019, algorithm 3 (preventing convergence). All attackers send, for every parameter,

    mean + z std,    s = floor(n/2 + 1) - f,    z the largest with Phi(z) < (n - f - s) / (n - f):

s honest clients on their side give the attackers a majority, and so many lie farther out than z by chance. With few
attackers that share is below one half and z is negative and small; studies then give `z`.
The paper writes mean + z std, the authors' program mean - z std: `direction`.

Knows: the honest updates of the round or, as in the paper, only the attackers' own (no omniscience needed).
Deviation: none; std divides by k as in the authors' program, so a single known update is sent as it is.
Cost: one reading of the stack.
"""

import math
import statistics
from typing import Literal

import torch
from torch import Tensor

from client.collusion._geometry import Known, centre, deviation, shared
from tasks.errors import AggregationError


def a_little_is_enough(
    known: Tensor,
    num_attackers: int,
    num_clients: int,
    generator: torch.Generator,
    *,
    z: float | None = None,
    direction: Literal["plus", "minus"] = "plus",
) -> Tensor:
    """Return mean +- z std of the `known` updates for every attacker; without `z` the paper's z of n and f."""
    honest = Known.of("a_little_is_enough", known, num_attackers, num_clients)
    if not num_attackers:
        return known[:0]
    factor = largest_z(num_clients, num_attackers) if z is None else z
    if direction == "minus":
        factor = -factor

    def values(block: Tensor) -> Tensor:
        return centre(block).add_(deviation(block), alpha=factor)

    return shared(honest.craft(values), num_attackers)


def largest_z(num_clients: int, num_attackers: int) -> float:
    """Return z of algorithm 3; `AggregationError` where it is infinite, as when the attackers are the majority."""
    num_honest = num_clients - num_attackers
    supporters = math.floor(num_clients / 2 + 1) - num_attackers
    if not 0 < supporters < num_honest:
        raise AggregationError(
            f"a_little_is_enough: no finite z solves Phi(z) < (n - f - s) / (n - f) for n = {num_clients}, "
            f"f = {num_attackers}, s = {supporters}; give one, for example z=1.5"
        )
    return statistics.NormalDist().inv_cdf((num_honest - supporters) / num_honest)
