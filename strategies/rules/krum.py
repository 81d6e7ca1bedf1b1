"""Krum: the one update that is closest to its neighbours.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
section 4: the score of an update is the sum of squared distances to its n - f - 2 nearest others, and
the lowest score is chosen; a tie goes to the lowest index. No deviation.
"""

import torch
from torch import Tensor

from strategies.rule import Stack, claimable, count_byzantine, require_clients, uniform_weights, weight_rule


@claimable
@weight_rule
def krum(updates: Stack, *, num_byzantine: int | float) -> Tensor:
    """Weigh the update of lowest score 1 and all others 0; needs n >= 2f + 3."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("krum", "2f + 3", 2 * f + 3, num_clients, f)
    scores = krum_scores(updates.squared_distances, num_clients - f - 2)
    return uniform_weights(updates, scores.argsort(stable=True)[:1])


def krum_scores(distances: Tensor, num_neighbours: int) -> Tensor:
    """Return each client's sum of squared distances to its nearest others (``[clients]``)."""
    others = distances.clone().fill_diagonal_(torch.inf)
    return others.sort(1).values[:, :num_neighbours].sum(1)
