"""The plain server step: the aggregate itself is the direction, and the step size is the setting server-lr.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017 (server-lr 1);
FedOpt of Reddi et al., "Adaptive Federated Optimization", ICLR 2021, algorithm 1, with SGD on the server.
"""

from torch import Tensor


def step(aggregate: Tensor) -> Tensor:
    """Return the aggregate (``[params]``) unchanged."""
    return aggregate
