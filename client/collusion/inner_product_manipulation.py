"""Inner product manipulation (IPM, also "Fall of Empires"): send the honest mean backwards.

Xie, Koyejo and Gupta, "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI 2019,
the attack on the median and on Krum: all attackers send -epsilon times the mean of the honest updates, so that the
inner product of the aggregate with the true mean turns negative while a small epsilon keeps the update among the
honest ones. The plain mean of n is reversed from epsilon > (n - f) / f on; epsilon = 1 is the colluding sign flip.

Knows: the honest updates of the round (the paper's attackers are omniscient), or an estimate from the attackers' own.
Deviation: none. The default is the small epsilon that later studies use against robust rules. Cost: one reading.
"""

import torch
from torch import Tensor

from client.collusion._geometry import Known, shared
from tasks.errors import SpecError


def inner_product_manipulation(
    known: Tensor, num_attackers: int, num_clients: int, generator: torch.Generator, *, epsilon: float = 0.1
) -> Tensor:
    """Return -`epsilon` times the mean of the `known` updates for every attacker."""
    if epsilon <= 0:
        raise SpecError(f"inner_product_manipulation wants epsilon > 0, got {epsilon}")
    honest = Known.of("inner_product_manipulation", known, num_attackers, num_clients)
    return shared(honest.craft(lambda block: block.mean(0).mul_(-epsilon)), num_attackers)
