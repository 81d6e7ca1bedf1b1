"""Multi-layer perceptron: linear layers with ReLU between them, for inputs of any shape and models of any size."""

from torch import nn

from tasks.errors import ConfigError
from tasks.models._layers import Channels, chain, normalisation


def mlp(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    hidden: tuple[int, ...] = (128,),
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return the network; `hidden` are the widths of its hidden layers."""
    if not input_shape or min(input_shape) < 1 or num_classes < 2:
        raise ConfigError(f"mlp wants inputs and 2 classes or more, got {input_shape}, {num_classes}")
    if not hidden or min(hidden) < 1:
        raise ConfigError(f"mlp: hidden must be widths of at least 1, got {hidden}")
    body = [*normalisation(mean, std, input_shape[0]), ("flatten", nn.Flatten())]
    width = 1
    for size in input_shape:
        width *= size
    for number, following in enumerate(hidden, start=1):
        body += [(f"fc{number}", nn.Linear(width, following)), (f"relu{number}", nn.ReLU())]
        width = following
    return chain([*body, (f"fc{len(hidden) + 1}", nn.Linear(width, num_classes))])
