"""Yogi on the server (FedYogi): Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.

v <- v - (1 - beta2) aggregate^2 sign(v - aggregate^2): the second moment changes by bounded steps, so that one huge
aggregate does not freeze the step sizes for long. The step size is the setting server-lr.
"""

from torch import Tensor

from strategies.optimizers._adaptive import adaptive


def yogi(
    aggregate: Tensor, memory: dict[str, Tensor], *, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3
) -> Tensor:
    """Return the direction m / (sqrt(v) + tau) (``[params]``)."""
    return adaptive(
        "yogi", aggregate, memory, beta1, beta2, tau,
        lambda v, square: v - (1 - beta2) * square * (v - square).sign(),
    )  # fmt: skip
