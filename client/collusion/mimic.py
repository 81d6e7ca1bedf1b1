"""Mimic: all attackers copy one honest client, whom the rule then counts f + 1 times.

Karimireddy, He and Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022, section 3
and its appendix on the attack: z is the direction of the largest variance among honest updates, and the client i
with the largest |<z, x_i>| is copied. Nothing sent is out of the ordinary, so no rule can tell; where clients differ
in their data, the others' data is underweighted.

Knows: the honest updates of the round.
Deviation: the paper sums variance over a warm-up of many rounds by an online power iteration and then copies one
client for good. This version has no memory: z is the exact top eigenvector of this round's updates (what the power
iteration converges to), and the client is chosen anew in every round. It can change from round to round, which makes
the attack weaker when no client stands out. z has no sign; the authors' program takes the largest <z, x_i> as it is.
Cost: one reading and one Gram matrix.
"""

import torch
from torch import Tensor

from client.collusion._geometry import Known, centre, shared


def mimic(known: Tensor, num_attackers: int, num_clients: int, generator: torch.Generator) -> Tensor:
    """Return, for every attacker, the row of `known` that lies farthest along the direction of largest variance."""
    honest = Known.of("mimic", known, num_attackers, num_clients)
    return shared(known[_farthest(honest)][None].clone(), num_attackers)


def _farthest(known: Known) -> int:
    """Return argmax_i |<z, x_i>|; of updates that do not differ, the first."""
    products = torch.zeros(len(known), len(known), dtype=torch.float64, device=known.updates.device)
    along_mean = products.new_zeros(len(known))
    for _, block in known.blocks():
        mean = centre(block)
        products += block @ block.t()
        along_mean += block @ mean
    values, vectors = torch.linalg.eigh(products)
    if values[-1] <= 0:
        return 0
    # z = sum_j u_j d_j / sqrt(value) with d_j = x_j - mean, so sqrt(value) <z, x_i> = value u_i + sum_j u_j <d_j, mean>
    top = vectors[:, -1]
    return int((values[-1] * top + top @ along_mean).abs().argmax())
