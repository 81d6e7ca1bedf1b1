"""The VGG-9 of "Attack of the Tails" (Wang et al., NeurIPS 2020) for CIFAR-10: 9,225,610 parameters.

Eight 3x3 convolutions of configuration A (Simonyan and Zisserman, 2015), one linear layer; no batch
normalisation, no dropout. Mean and std are those of the honest clients' loaders of the authors' code (its
attackers and its tests divide by 0.2023, 0.1994, 0.2010 instead); give ``mean=None, std=None`` for
inputs as they are.
"""

from torch import nn

from tasks.models._layers import Channels, Named, chain, flat_size, image_shape, normalisation

_POOL = 0
_PLAN = (64, _POOL, 128, _POOL, 256, 256, _POOL, 512, 512, _POOL, 512, 512, _POOL)


def vgg9(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = (0.4914, 0.4824, 0.4467),
    std: Channels | None = (0.2471, 0.2435, 0.2616),
) -> nn.Module:
    """Return the network; images of at least 32x32."""
    channels, _, _ = image_shape("vgg9", input_shape, num_classes)
    body: list[Named] = normalisation(mean, std, channels)
    number = 1
    for width in _PLAN:
        if width == _POOL:
            body.append((f"pool{number - 1}", nn.MaxPool2d(2)))
            continue
        body.append((f"conv{number}", nn.Conv2d(channels, width, 3, padding=1)))
        body.append((f"relu{number}", nn.ReLU()))
        channels, number = width, number + 1
    body.append(("flatten", nn.Flatten()))
    return chain([*body, ("fc", nn.Linear(flat_size("vgg9", body, input_shape), num_classes))])
