"""The coordinate-wise median.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
definition 1 and algorithm 1 (option I). An even number of clients averages the two values in the middle.
"""

from torch import Tensor

from strategies.rule import coordinate_rule
from strategies.sorting import middle_mean


@coordinate_rule
def median(updates: Tensor) -> Tensor:
    """Return the median of every parameter over the clients (``[params]``)."""
    num_clients = len(updates)
    return middle_mean(updates, (num_clients - 1) // 2, num_clients // 2 + 1)
