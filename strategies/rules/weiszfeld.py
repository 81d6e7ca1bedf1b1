"""A few Weiszfeld steps from the mean: the geometric median as far as RFA's own search goes.

Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022, algorithm 2,
with the settings of CRFL's code (Xie et al., ICML 2021, figure 6): at most ten steps, no update nearer than 1e-5, an
end where the mean distance changes by less than 1e-6 of itself. Every client has an equal share; that code weighs by
numbers of samples, which clients claim.

For comparison with what papers call RFA. `geometric_median` searches to the end and is the rule to defend with: each
step here wears the weight of a far outlier down by a factor, and a long enough one makes up for ten of them.
"""

from torch import Tensor

from strategies.rule import Stack, weight_rule
from strategies.rules.geometric_median import distances_to, sharp_products, without_unreachable
from tasks.errors import ConfigError

LAWS_NOT_KEPT = {
    "bounded": "ten steps from the mean leave a far enough outlier a weight that makes up for its distance",
}


@weight_rule
def weiszfeld(updates: Stack, *, iterations: int = 10, nu: float = 1e-5, tolerance: float = 1e-6) -> Tensor:
    """Weigh each update by its inverse distance to the point before, `iterations` times at most, from the mean on.

    `nu`, in the unit of the updates, is the distance below which an update weighs no more than at it.
    """
    if iterations < 1 or nu <= 0 or tolerance < 0:
        given = f"iterations = {iterations}, nu = {nu}, tolerance = {tolerance}"
        raise ConfigError(f"weiszfeld wants iterations >= 1, nu > 0 and tolerance >= 0, got {given}")
    products, reachable = without_unreachable(sharp_products(updates))
    weights = reachable.double() / reachable.sum()
    distances = distances_to(products, weights)
    objective = float((reachable * distances).sum())
    for _ in range(iterations):
        pulls = reachable / distances.clamp(min=nu)
        weights = pulls / pulls.sum()
        distances = distances_to(products, weights)
        before, objective = objective, float((reachable * distances).sum())
        if abs(before - objective) < tolerance * objective:
            break
    return weights
