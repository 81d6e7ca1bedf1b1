"""Bucketing: shuffle the updates and average them in small groups, so that honest clients look more alike.

Karimireddy, He and Jaggi, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022, algorithm 1.
With f attackers at most f of the ceil(n / s) groups are touched: the rule that follows has to bear f of those.
Where n is no multiple of s the last group is smaller, and its mean is that of the updates it has.
Needs at least two groups, unless there is but one client. No reading of the updates.
"""

import torch
from torch import Tensor

from strategies.rule import Stack, mixing
from tasks.errors import AggregationError, ConfigError

LAW_ARGUMENTS = {"bucket_size": 2}
LAWS_NOT_KEPT = {
    "client_order": "which rows meet in a group is drawn by their places, so another order is another draw"
}


@mixing
def bucketing(updates: Stack, generator: torch.Generator, *, bucket_size: int) -> Tensor:
    """Return the matrix (``[buckets, rows]``) that averages `bucket_size` rows at a time in a random order."""
    if bucket_size < 1:
        raise ConfigError(f"bucketing wants bucket_size >= 1, got {bucket_size}")
    num_clients = len(updates)
    if num_clients > 1 and bucket_size >= num_clients:
        raise AggregationError(
            f"bucketing wants bucket_size < n, got {bucket_size} with n = {num_clients}: all updates would be one "
            "mean that no rule can defend; lower bucket_size or sample more clients"
        )
    places = torch.empty(num_clients, dtype=torch.int64)
    places[torch.randperm(num_clients, generator=generator)] = torch.arange(num_clients) // bucket_size
    matrix = torch.zeros(int(places.max()) + 1, num_clients, dtype=torch.float64)
    matrix[places, torch.arange(num_clients)] = 1.0
    return (matrix / matrix.sum(1, keepdim=True)).to(updates.device)
