"""Robust learning rate: where too few clients agree on a parameter's sign, step the other way.

Ozdayi, Kantarcioglu and Gel, "Defending against Backdoors in Federated Learning with Robust Learning Rate", AAAI 2021,
section 4, equation 4: the learning rate of a parameter is +eta if |sum_i sign(x_i)| >= threshold, else -eta; it
multiplies the mean. The paper advises a threshold above the number of attackers and below the number of honest clients
less that of attackers. Deviation: the mean counts every client the same, where the paper's weighs by claimed samples.
Needs 1 <= threshold <= n: beyond n every parameter would run backwards. Costs two readings: O(n d).
"""

import math

import torch
from torch import Tensor

from strategies.rule import coordinate_rule
from strategies.sorting import sign_sums
from tasks.errors import AggregationError, ConfigError

LAW_ARGUMENTS = {"threshold": 4}
LAWS_NOT_KEPT = {
    "shift": "signs are taken of the updates themselves, and a shift changes them",
    "bounded": "it turns the mean around, but keeps its length, which one client moves as far as it likes",
}


@coordinate_rule
def rlr(updates: Tensor, *, threshold: int | float) -> Tensor:
    """Return the mean, with its sign turned where the votes for the majority's sign lead by less than `threshold`.

    `threshold` as a float in (0, 1] is a share of the clients present, rounded up.
    """
    num_clients = len(updates)
    wanted = required_lead(threshold, num_clients)
    mean = updates.mean(0)
    if not mean.isfinite().all():  # the sum left the range: divide first
        mean = (updates / num_clients).sum(0)
    return torch.where(sign_sums(updates).abs() >= wanted, mean, -mean)


def required_lead(threshold: int | float, num_clients: int) -> int:
    """Return the threshold as a number of clients; `AggregationError` if no vote among that many can reach it."""
    if isinstance(threshold, float):
        if not 0 < threshold <= 1:
            raise ConfigError(
                f"threshold as a share must be in (0, 1], got {threshold}; a count is written without a point"
            )
        return math.ceil(threshold * num_clients - 1e-9)
    if threshold < 1:
        raise ConfigError(f"rlr wants threshold >= 1, got {threshold}")
    if threshold > num_clients:
        raise AggregationError(
            f"rlr wants threshold <= n, got {threshold} with n = {num_clients}, where every parameter would be turned; "
            "lower it, or write it as a share such as 0.5"
        )
    return threshold
