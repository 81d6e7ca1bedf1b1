"""What Adam, Yogi and Adagrad on the server share: FedOpt, Reddi et al., ICLR 2021, algorithm 2.

m <- beta1 m + (1 - beta1) aggregate; v by the variant's own line; direction m / (sqrt(v) + tau). As in the paper there
is no bias correction, v starts at tau^2, and m at 0. Note for models with batch norm: running statistics are
parameters like others here and take the same steps.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from tasks.errors import ConfigError

LARGEST = torch.finfo(torch.float32).max  # of v: beyond it inf - inf would make the model NaN, and inf never shrinks
LARGEST_TAU = 1e18  # its square is the first v
SecondMoment = Callable[[Tensor, Tensor], Tensor]  # (v, aggregate squared) -> v


def adaptive(
    name: str, aggregate: Tensor, memory: dict[str, Tensor], beta1: float, beta2: float, tau: float, grow: SecondMoment
) -> Tensor:
    """Return the direction (``[params]``) and keep both moments in `memory`."""
    if not (0 <= beta1 < 1 and 0 <= beta2 < 1 and 0 < tau < LARGEST_TAU):
        given = f"{beta1}, {beta2} and {tau}"
        raise ConfigError(f"{name} wants beta1 and beta2 in [0, 1) and tau in (0, {LARGEST_TAU:g}), got {given}")
    first = beta1 * memory.get(f"{name}.first", torch.zeros_like(aggregate)) + (1 - beta1) * aggregate
    square = aggregate.square().clamp(max=LARGEST)
    second = grow(memory.get(f"{name}.second", torch.full_like(aggregate, tau * tau)), square).clamp(max=LARGEST)
    memory[f"{name}.first"], memory[f"{name}.second"] = first, second
    return first / (second.sqrt() + tau)
