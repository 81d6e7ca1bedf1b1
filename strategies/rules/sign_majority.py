"""Majority vote of signs: every client votes on the direction of every parameter, and no vote counts more for its size.

Bernstein et al., "signSGD with Majority Vote is Communication Efficient and Fault Tolerant", ICLR 2019, algorithm 1:
the step is eta * sign(sum_i sign(x_i)). A tie gives 0, and a client with a 0 does not vote.
Deviation: eta may be left out. Then it follows the round: the median over the clients of their mean absolute entry. As
||x||_1 <= sqrt(d) ||x||_2, the result is no longer than the longest honest update while fewer than half of the clients
attack. A fixed `step_size` is the paper's eta (divided by server-lr, the setting that multiplies every aggregate).
Any n; there is no f. Costs two readings, one with a `step_size`: O(n d).
"""

import torch
from torch import Tensor

from strategies.rule import Stack, stack_rule
from strategies.sorting import sign_sums
from tasks.errors import ConfigError

WIDTH = 8192  # columns at once: their signs stay in the inner caches
LAWS_NOT_KEPT = {
    "shift": "signs are taken of the updates themselves, and a shift changes them",
    "unanimity": "only signs survive: of one update that all send, the sizes of its entries are lost",
}


@stack_rule
def sign_majority(updates: Stack, *, step_size: float | None = None) -> Tensor:
    """Return the majority's sign of every parameter times `step_size`, or times the round's median mean |entry|."""
    if step_size is not None and step_size <= 0:
        raise ConfigError(f"sign_majority wants step_size > 0, got {step_size}; leave it out to follow the round")
    votes = torch.empty(updates.num_params, dtype=updates.dtype, device=updates.device)
    sizes = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    for columns, block in updates.blocks(WIDTH):
        torch.sign(sign_sums(block), out=votes[columns])
        if step_size is None:
            sizes += mean_size(block) * (block.shape[1] / updates.num_params)
    return votes.mul_(sizes.quantile(0.5) if step_size is None else step_size)


def mean_size(block: Tensor) -> Tensor:
    """Return the mean absolute value of every row (``[rows]``, float64)."""
    sums = torch.linalg.vector_norm(block, ord=1, dim=1).double()
    if not sums.isfinite().all():  # beyond float32: add up in float64
        sums = torch.linalg.vector_norm(block, ord=1, dim=1, dtype=torch.float64)
    return sums / max(1, block.shape[1])
