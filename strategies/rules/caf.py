"""CAF, the covariance-bound agnostic filter: wear down the weights of updates that stretch the cloud in one direction.

Allouah, Guerraoui and Stephan, "Towards Trustworthy Federated Learning with Untrusted Participants", ICML 2025,
algorithm 2. From equal weights c_i = 1, while their sum is above n - 2f: mu = the weighted mean, (lambda, u) = the
largest eigenvalue of the weighted covariance and its eigenvector, t_i = <x_i - mu, u>^2, and c_i <- c_i (1 - t_i /
max_j t_j), the maximum over those with c_j > 0. The result is the mu of least lambda that was met. No deviation, but
for f = 0, where no step is taken and the result is the mean, and a cloud with no extent left, where the filter stops.
Float64 rows too far off for inner products have weight 0 from the start, which is what the filter would end at.
Needs n >= 2f + 1. Costs one Gram matrix, one sum and at most n eigenvectors of n x n matrices: O(n^2 d + n^4).

The covariance's non-zero eigenvalues are those of the weighted Gram matrix around mu, so everything is n x n; the power
method, which would have to choose its number of steps, is not needed.
"""

import torch
from torch import Tensor

from strategies.rule import Stack, count_byzantine, require_clients, uniform_weights, weight_rule
from strategies.rules.geometric_median import without_unreachable


@weight_rule
def caf(updates: Stack, *, num_byzantine: int | float) -> Tensor:
    """Return the weights of the mean with the least covariance on the filter's way; needs n >= 2f + 1."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("caf", "2f + 1", 2 * f + 1, num_clients, f)
    if f == 0:
        return uniform_weights(updates)
    products, reachable = without_unreachable(updates.majority_products)
    weights = reachable.double()
    best, least = weights / weights.sum(), torch.inf
    while float(weights.sum()) > num_clients - 2 * f:
        share = weights / weights.sum()
        value, offsets = widest_direction(products, share)
        if value < least:
            best, least = share, value
        tops = torch.where(weights > 0, offsets.square(), 0.0)
        if value <= 0 or not tops.max() > 0:
            break  # all that still count are equal
        weights = weights * (1 - tops / tops.max())
    return best


def widest_direction(products: Tensor, share: Tensor) -> tuple[float, Tensor]:
    """Return the largest eigenvalue of the covariance under weights `share`, and <x_i - mean, eigenvector> of all i.

    `products` are inner products around any origin; rows of weight 0 take no part in the eigenvector.
    """
    pull = products @ share
    around = products - pull[:, None] - pull + share @ pull
    root = share.sqrt()
    scaled = root[:, None] * around * root
    size = scaled.diagonal().max()
    if not size > 0:
        return 0.0, torch.zeros_like(share)
    values, vectors = torch.linalg.eigh((scaled + scaled.t()) / (2 * size))
    value = values[-1].clamp(min=0) * size
    offsets = around @ (root * vectors[:, -1])
    return float(value), offsets / value.sqrt() if value > 0 else torch.zeros_like(share)
