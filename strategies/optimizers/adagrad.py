"""Adagrad on the server (FedAdagrad): Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 2.

v <- v + aggregate^2, which never shrinks; the step size is the setting server-lr.
"""

from torch import Tensor

from strategies.optimizers._adaptive import adaptive


def adagrad(aggregate: Tensor, memory: dict[str, Tensor], *, beta1: float = 0.0, tau: float = 1e-3) -> Tensor:
    """Return the direction m / (sqrt(v) + tau) (``[params]``)."""
    return adaptive("adagrad", aggregate, memory, beta1, 0.0, tau, lambda v, square: v + square)
