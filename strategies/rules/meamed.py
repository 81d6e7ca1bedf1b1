"""The mean around the median: per parameter, the mean of the n - f values nearest to the median.

Xie, Koyejo and Gupta, "Generalized Byzantine-tolerant SGD", 2018 (arXiv 1802.10116), definition 6 and algorithm of
section 4 ("MeaMed"). An even number of clients has the mean of its two middle values as median; of two values
equally far the lower one counts.
Needs n >= 2f + 1. Costs one partial sort of every column: O(n d log^2 n).
"""

from torch import Tensor

from strategies.rule import coordinate_rule, count_byzantine, require_clients
from strategies.sorting import nearest_mean


@coordinate_rule
def meamed(updates: Tensor, *, num_byzantine: int | float) -> Tensor:
    """Return the mean of the n - f values nearest to the median of every parameter; needs n >= 2f + 1."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("meamed", "2f + 1", 2 * f + 1, num_clients, f)
    return nearest_mean(updates, num_clients - f)
