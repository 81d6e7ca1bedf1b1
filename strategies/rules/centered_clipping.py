"""Centered clipping: walk from the previous aggregate towards the updates, with every pull shortened to a radius.

Karimireddy, He and Jaggi, "Learning from History for Byzantine Robust Optimization", ICML 2021, section 4:

    v <- v + 1/n sum_i (x_i - v) min(1, radius / ||x_i - v||), from v = the aggregate of the round before.

Deviation: the paper leaves the radius to be tuned. Without one it is, at every step, the lower median of the distances
to v, which follows their scale and which less than half of the clients cannot push beyond the farthest honest update.
A radius that is given bounds how far one round moves the aggregate, whoever attacks: num_steps * radius.
Any n; there is no f. Costs one Gram matrix, n inner products and one sum: O(n^2 d).

The walk runs in n x n space: v is a sum of updates and the previous aggregate with coefficients that sum to 1, and
lengths follow from their inner products around an update that lies with the majority. They are true products, not
derived from distances: a small share of a far outlier would be lost in the rounding of its distance.
So the result is a weighted sum of the updates plus a share of the previous aggregate, 0 once nobody is clipped.
"""

import torch
from torch import Tensor

from strategies.rule import Decision, Stack, uniform_weights, weight_rule
from tasks.errors import AggregationError, ConfigError

FARTHEST_SQUARE = 1e299  # sums of such squares do not overflow; updates further off have no weight
LAWS_NOT_KEPT = {
    "weights_sum_to_one": "the previous aggregate keeps the share that clipping took from the updates",
}


@weight_rule
def centered_clipping(updates: Stack, previous: Tensor, *, radius: float | None = None, num_steps: int = 3) -> Decision:
    """Weigh rows as `num_steps` clipped steps from `previous` come out; `radius` in the unit of the updates."""
    weights, share = centered_weights(updates, previous, radius=radius, num_steps=num_steps)
    return Decision(weights, added=share * previous.double() if share else None)


def centered_weights(
    updates: Stack, previous: Tensor, *, radius: float | None = None, num_steps: int = 3
) -> tuple[Tensor, float]:
    """Return the weight of every row (``[rows]``, float64) and of `previous` in the result; they sum to 1."""
    if (radius is not None and radius <= 0) or num_steps < 1:
        raise ConfigError(f"centered_clipping wants radius > 0 and num_steps >= 1, got {radius} and {num_steps}")
    if previous.shape != (updates.num_params,):
        raise AggregationError(f"previous is [{updates.num_params}] like an update, got {list(previous.shape)}")
    products, reachable = products_with(updates, previous)
    points = torch.eye(len(products), dtype=torch.float64, device=updates.device)
    walk = points[-1]
    for _ in range(num_steps):
        rays = points[:-1] - walk
        lengths = ((rays @ products) * rays).sum(1).clamp(min=0).sqrt().where(reachable, torch.inf)
        limit = lengths.sort().values[(len(lengths) - 1) // 2] if radius is None else lengths.new_tensor(radius)
        clipped = lengths > limit
        pulls = torch.where(clipped, limit / lengths, 1.0) / len(lengths)
        stays = float(1 - pulls.sum()) if clipped.any() else 0.0
        walk = stays * walk + torch.cat([pulls, pulls.new_zeros(1)])
    return walk[:-1], float(walk[-1])


def products_with(updates: Stack, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return inner products (``[rows + 1, rows + 1]``, float64) of the rows and `point` around a row of the majority.

    Also which rows (``[rows]``) are near enough to have any; products with the others are 0.
    """
    among = updates.majority_products
    squares = among.diagonal().nan_to_num(nan=torch.inf)
    near = squares <= FARTHEST_SQUARE
    centre = squares.argmin()[None]  # only around itself a row is 0
    ray = point.double() - updates.weighted_sum(uniform_weights(updates, centre)).double()
    along = updates.dots(ray)
    along = torch.where(near, along - along[centre], 0.0)
    among = among.where(near[:, None] & near, 0.0)
    below = torch.cat([along, ray.square().sum()[None]])
    return torch.cat([torch.cat([among, along[:, None]], 1), below[None]]), near
