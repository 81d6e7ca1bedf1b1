"""FLTrust: the server trains on a little data it trusts and counts a client as far as it agrees with the result.

Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021, section IV and
algorithm 2. With g_0 the server's own update, TS_i = max(0, cos(x_i, g_0)) and the aggregate is

    sum_i TS_i (||g_0|| / ||x_i||) x_i / sum_i TS_i.

It is never longer than g_0, however many clients lie; it is as good as g_0 is honest. Clients and server have to train
alike (steps and learning rate), or their lengths do not compare.
Deviation: the paper does not say what happens where no client agrees, sum TS_i = 0; here the aggregate is 0. An update
too short to be stretched to ||g_0||, such as one of zeros, has TS_i = 0; so has every update where g_0 is 0.

Precondition: none on n and f. Cost: the updates are read once for inner products, once for norms, once for the sum.
"""

import torch
from torch import Tensor

from strategies.rule import Stack, weight_rule
from tasks.errors import AggregationError

LONGEST_STRETCH = 1e30  # beyond, a weight would leave float32, in which the sum is taken
LAWS_NOT_KEPT = {
    "shift": "angles and norms are measured from the global model, the origin, and a shift changes them",
    "weights_sum_to_one": "updates are stretched or shortened to the norm of the server's own",
}


@weight_rule
def fltrust(updates: Stack, root_update: Tensor) -> Tensor:
    """Weigh each client by the cosine of its update with `root_update` ``[params]``, rescaled to that one's norm."""
    if root_update.shape != (updates.num_params,) or not root_update.isfinite().all():
        wanted = f"a finite update of the server's own, [{updates.num_params}]"
        raise AggregationError(f"fltrust wants {wanted}, got {list(root_update.shape)}; check the root data's training")
    root_update = root_update.to(updates.device)
    length = torch.linalg.vector_norm(root_update.double())
    lengths = updates.norms
    usable = (lengths > 0) & (length > 0) & (lengths * LONGEST_STRETCH >= length)
    both = torch.where(usable, lengths * length, 1.0)
    trust = torch.where(usable, updates.dots(root_update) / both, 0.0).clamp(0, 1)
    total = trust.sum()
    stretch = length / lengths.where(usable, 1.0)
    return trust / total * stretch if total > 0 else torch.zeros_like(trust)
