"""MoNNA, nearest-neighbour averaging: the mean of the updates nearest to that of a client one trusts.

Farhadkhani et al., "Robust Collaborative Learning with Linear Gradient Overhead", ICML 2023: every node averages the
vectors nearest to its own, itself among them. Deviation: there each node trusts itself and mixes what arrives; on a
server the trusted vector is that of one client the operator vouches for, such as a node of their own, and the n - f
nearest of all n count. Of updates equally far the lower row goes first.
Needs n >= 2f + 1 and the trusted client's update in the round, and cannot follow a mixing, which has no clients.
Costs one reading for n distances and one sum: O(n d).
"""

from collections.abc import Sequence

from torch import Tensor

from strategies.distances import squared_distances_to
from strategies.rule import Stack, claimable, count_byzantine, require_clients, uniform_weights, weight_rule
from tasks.errors import AggregationError

LAW_ARGUMENTS = {"trusted": 0}
LAWS_NOT_KEPT = {"bounded": "the trusted client may itself be the outlier, and then all is lost"}


@claimable
@weight_rule
def monna(updates: Stack, clients: Sequence[int], *, num_byzantine: int | float, trusted: int) -> Tensor:
    """Weigh the n - f updates nearest to that of the client with the id `trusted` equally and all others 0."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("monna", "2f + 1", 2 * f + 1, num_clients, f)
    if trusted not in clients:
        raise AggregationError(
            f"monna trusts client {trusted}, whose update did not come this round; the {num_clients} that came are "
            f"{list(clients)[:20]}; sample all clients, or trust one that is always there"
        )
    row = list(clients).index(trusted)
    rows = updates.columns(slice(None))
    distances = squared_distances_to(rows, rows[row])
    distances[row] = -1.0  # first, also among updates equal to it
    return uniform_weights(updates, distances.argsort(stable=True)[: num_clients - f])
