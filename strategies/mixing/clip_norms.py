"""Clip every update to a largest L2 norm before a rule: x min(1, max_norm / ||x||).

Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 3 (norm thresholding), in front of any rule.
With the mean it is the rule `norm_clipping`. Any n. Costs one reading: O(n d).
"""

import torch
from torch import Tensor

from strategies.rule import Stack, claimable, mixing
from tasks.errors import ConfigError

LAW_ARGUMENTS = {"max_norm": 10.0}
LAWS_NOT_KEPT = {
    "shift": "norms are measured from the global model, the origin, and a shift changes them",
    "scale": "the largest norm is a number that does not scale with the updates",
    "unanimity": "an update that all send is shortened like any other",
    "rows_sum_to_one": "a clipped row counts for less and nothing takes up the rest",
}


@claimable
@mixing
def clip_norms(updates: Stack, *, max_norm: float) -> Tensor:
    """Return the diagonal matrix that shortens rows to an L2 norm of at most `max_norm`."""
    if max_norm <= 0:
        raise ConfigError(f"clip_norms wants max_norm > 0, got {max_norm}")
    return shortened(updates.norms, torch.as_tensor(max_norm, dtype=torch.float64, device=updates.device))


def shortened(lengths: Tensor, limit: Tensor) -> Tensor:
    """Return the diagonal matrix that brings rows of these `lengths` to at most `limit`; a row of 0 stays as it is."""
    return torch.where(lengths <= limit, 1.0, limit / lengths).diag()
