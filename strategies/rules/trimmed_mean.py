"""The coordinate-wise trimmed mean.

Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018,
definition 2 and algorithm 1 (option II), whose share beta is `num_byzantine` given as a float.
"""

from torch import Tensor

from strategies.rule import coordinate_rule, count_byzantine, require_clients
from strategies.sorting import middle_mean


@coordinate_rule
def trimmed_mean(updates: Tensor, *, num_byzantine: int | float) -> Tensor:
    """Drop the f largest and f smallest values of every parameter and average the rest; needs n > 2f."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("trimmed_mean", "2f + 1", 2 * f + 1, num_clients, f)
    return middle_mean(updates, f, num_clients - f)
