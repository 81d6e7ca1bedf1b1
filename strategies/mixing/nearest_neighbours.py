"""Nearest-neighbour mixing (NNM): replace every update by the mean of its nearest, itself among them.

Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023, section 3,
algorithm 2: y_i is the mean of the n - f updates nearest to x_i. Ties go to the lower row, after the update itself.
No deviation. Needs n >= 2f + 1. Costs one Gram matrix, O(n^2 d); the mixed updates are never written out.
"""

import torch
from torch import Tensor

from strategies.rule import Stack, count_byzantine, mixing, require_clients


@mixing
def nearest_neighbours(updates: Stack, *, num_byzantine: int | float) -> Tensor:
    """Return the matrix (``[rows, rows]``) with 1 / (n - f) at the n - f nearest of each row; needs n >= 2f + 1."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("nearest_neighbours", "2f + 1", 2 * f + 1, num_clients, f)
    distances = updates.squared_distances.clone().fill_diagonal_(-1.0)
    nearest = distances.argsort(dim=1, stable=True)[:, : num_clients - f]
    return torch.zeros_like(distances).scatter_(1, nearest, 1 / (num_clients - f))
