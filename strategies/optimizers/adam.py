"""Adam on the server (FedAdam): Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.

v <- beta2 v + (1 - beta2) aggregate^2. The step size is the setting server-lr; the paper's grid is 1e-3 to 10, and
tau = 1e-3 served it in most tasks (appendix D). No bias correction, as in the paper.
"""

from torch import Tensor

from strategies.optimizers._adaptive import adaptive


def adam(
    aggregate: Tensor, memory: dict[str, Tensor], *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Tensor:
    """Return the direction m / (sqrt(v) + tau) (``[params]``)."""
    return adaptive("adam", aggregate, memory, beta1, beta2, tau, lambda v, square: beta2 * v + (1 - beta2) * square)
