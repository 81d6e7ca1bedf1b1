"""The VGG-9 of "Attack of the Tails" (Wang et al., NeurIPS 2020) for CIFAR-10: 9,225,610 parameters.

Eight 3x3 convolutions of configuration A (Simonyan and Zisserman, 2015), one linear layer; no batch
normalisation, no dropout. Mean and std are those of the honest clients' loaders of the authors' code (its
attackers and its tests divide by 0.2023, 0.1994, 0.2010 instead); give ``mean=None, std=None`` for
inputs as they are.
"""

from torch import nn

from tasks.models._layers import Channels, chain
from tasks.models._vgg import MEAN, STD, A, convolutions


def vgg9(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = MEAN,
    std: Channels | None = STD,
) -> nn.Module:
    """Return the network; images of at least 32x32."""
    body, size = convolutions("vgg9", input_shape, num_classes, A, mean, std)
    return chain([*body, ("fc", nn.Linear(size, num_classes))])
