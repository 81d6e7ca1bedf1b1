"""Norm clipping: shorten every update to a largest norm, then average.

Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 3 (norm thresholding); called norm difference
clipping by Wang et al., "Attack of the Tails", NeurIPS 2020, section 4. Deviation: without `max_norm` the threshold
follows the round. The adaptive variant of "Attack of the Tails" takes the mean of the round's norms, attackers
included, which one huge update moves at will (``adaptive="mean"``); the default is their median.

Precondition: none on n and f. Cost: the updates are read once for norms and once for the sum.
"""

from typing import Literal

import torch
from torch import Tensor

from strategies.rule import Stack, claimable, uniform_weights, weight_rule
from tasks.errors import AggregationError, ConfigError

LAWS_NOT_KEPT = {
    "shift": "norms are measured from the global model, the origin, and a shift changes them",
    "weights_sum_to_one": "a clipped update counts for less and nothing takes up the rest",
}


@claimable
@weight_rule
def norm_clipping(
    updates: Stack, *, max_norm: float | None = None, adaptive: Literal["median", "mean"] = "median"
) -> Tensor:
    """Weigh an update of L2 norm r by min(1, max_norm / r) / n; `max_norm` None follows this round's norms."""
    if max_norm is not None and max_norm <= 0:
        raise ConfigError(f"norm_clipping wants max_norm > 0, got {max_norm}; leave it out to follow the round's norms")
    lengths = updates.norms
    if max_norm is not None:
        limit = lengths.new_tensor(max_norm)
    else:
        limit = lengths.quantile(0.5) if adaptive == "median" else lengths.mean()
    return clipped_weights(updates, limit)


def clipped_weights(updates: Stack, limit: Tensor) -> Tensor:
    """Return the weights (``[rows]``) of the mean of all rows, each shortened to a norm of at most `limit`."""
    return uniform_weights(updates) * clip_factors(updates, limit)


def clip_factors(updates: Stack, limit: Tensor) -> Tensor:
    """Return what each row is multiplied by (``[rows]``, at most 1) so that its L2 norm is at most `limit`.

    A row whose norm no float64 holds is multiplied by 0; `AggregationError` if that is true of `limit`.
    """
    lengths = updates.norms
    if not limit.isfinite() or lengths.isnan().any():
        raise AggregationError(
            "clipping wants norms that float64 holds, got updates beyond them; bound them before, "
            "with max-update-norm, or send float32"
        )
    return torch.where(lengths <= limit, 1.0, limit / lengths)
