"""The geometric median (RFA): the point with the least sum of distances to the updates.

Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022,
algorithm 2, the smoothed Weiszfeld algorithm, with equal client shares: start at the mean, then weigh each
update by 1 / max(nu, distance). Deviations: the iteration runs on weights, in n x n space, on a Gram matrix, so
that the updates are read for that matrix and for the result alone; and since a step costs almost
nothing, it runs until the weights rest, where the paper stops after three or four steps (`max_iterations`).
"""

import torch
from torch import Tensor

from strategies.distances import majority_gram
from strategies.rule import count_clients, weight_rule
from tasks.errors import ConfigError


@weight_rule
def geometric_median(
    updates: Tensor, *, nu: float = 1e-6, max_iterations: int = 200, tolerance: float = 1e-8
) -> Tensor:
    """Weigh each update by its inverse distance to the median; stops when no weight moves more than `tolerance`.

    `nu`, in the unit of the updates, is the distance below which an update weighs no more than at it.
    """
    count_clients(updates)
    if nu <= 0 or max_iterations < 1 or tolerance < 0:
        given = f"nu = {nu}, max_iterations = {max_iterations}, tolerance = {tolerance}"
        raise ConfigError(f"geometric_median wants nu > 0, max_iterations >= 1 and tolerance >= 0, got {given}")
    return weiszfeld(majority_gram(updates), nu, max_iterations, tolerance)


def weiszfeld(products: Tensor, nu: float, max_iterations: int, tolerance: float) -> Tensor:
    """Return the weights (``[clients]``, sum 1) of the geometric median of points with these inner products."""
    reachable = products.diagonal().isfinite()  # a float64 row above 1e154 is too far off to weigh anything
    products = products.where(reachable[:, None] & reachable, 0.0)
    weights = reachable.double() / reachable.sum()
    for _ in range(max_iterations):
        previous = weights
        weights = reachable / distances_to_sum(products, weights).clamp(min=nu)
        weights = weights / weights.sum()
        if bool((weights - previous).abs().max() <= tolerance):
            break
    return weights


def distances_to_sum(products: Tensor, weights: Tensor) -> Tensor:
    """Return ||x_i - sum_j weights[j] x_j|| (``[clients]``) from the inner products of the x.

    As a quadratic form of the difference of coefficients, which does not cancel when the sum is close to x_i.
    """
    coefficients = weights - torch.eye(len(weights), dtype=weights.dtype, device=weights.device)
    return ((coefficients @ products) * coefficients).sum(1).clamp(min=0).sqrt()
