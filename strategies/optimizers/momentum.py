"""Server momentum: the direction is a decaying sum of all aggregates.

Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", 2019,
section 4 (FedAvgM): v <- beta v + aggregate. A note on defences: one poisoned aggregate goes on acting for about
1 / (1 - beta) rounds.
"""

import torch
from torch import Tensor

from tasks.errors import ConfigError


def momentum(aggregate: Tensor, memory: dict[str, Tensor], *, beta: float = 0.9, nesterov: bool = False) -> Tensor:
    """Return the velocity (``[params]``), or with `nesterov` the aggregate plus beta times it; beta in [0, 1)."""
    if not 0 <= beta < 1:
        raise ConfigError(f"momentum wants beta in [0, 1), got {beta}")
    velocity = beta * memory.get("momentum", torch.zeros_like(aggregate)) + aggregate
    memory["momentum"] = velocity
    return aggregate + beta * velocity if nesterov else velocity.clone()  # the memory's own stays its own
