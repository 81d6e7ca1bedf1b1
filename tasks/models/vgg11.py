"""The VGG-11 of the capacity study of "Attack of the Tails" (Wang et al., NeurIPS 2020): 9,750,922 parameters.

Configuration A (Simonyan and Zisserman, 2015) with two linear layers of 512 before the classes, dropout 0.5 before
each; no batch normalisation. Normalisation as in `vgg9`.
"""

from torch import nn

from tasks.models._layers import Channels
from tasks.models._vgg import MEAN, STD, A, with_three_linear_layers


def vgg11(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = MEAN,
    std: Channels | None = STD,
) -> nn.Module:
    """Return the network; images of at least 32x32."""
    return with_three_linear_layers("vgg11", input_shape, num_classes, A, mean, std)
