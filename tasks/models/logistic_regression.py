"""Multi-class logistic regression: one linear layer with bias on the flattened input.

CRFL (Xie, Chen, Chen, Li, ICML 2021, section 6) certifies it on MNIST, EMNIST and LOAN; FLIP (Zhang et al.,
ICLR 2023) uses it in its theory. No normalisation in both: Lemma 1 of CRFL speaks of the input as it is.
"""

import math

from torch import nn

from tasks.errors import ConfigError
from tasks.models._layers import Channels, chain, normalisation


def logistic_regression(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    bias: bool = True,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return logits = W x + b for inputs of any shape; MNIST gives 7,850 parameters."""
    if not input_shape or min(input_shape) < 1 or num_classes < 2:
        raise ConfigError(f"logistic_regression wants inputs and 2 classes or more, got {input_shape}, {num_classes}")
    linear = nn.Linear(math.prod(input_shape), num_classes, bias=bias)
    return chain([*normalisation(mean, std, input_shape[0]), ("flatten", nn.Flatten()), ("linear", linear)])
