"""The MNIST network of "Certified Federated Adversarial Training" (Zizzo, Rawat, Sinn, Maffeis, Hughes).

NFFL 2021 workshop, appendix D. Two 4x4 convolutions of stride 2 (16, 32), 1,000 hidden units; only
convolution, linear and ReLU layers, which zonotopes can follow. The paper does not state the padding: 0 gives
800 flattened values, 1 gives 1,568.
"""

from torch import nn

from tasks.errors import ConfigError
from tasks.models._layers import Channels, chain, flat_size, image_shape, normalisation


def cfat_mnist(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    padding: int = 0,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return the network; `padding` is that of both convolutions, in pixels."""
    channels, _, _ = image_shape("cfat_mnist", input_shape, num_classes)
    if padding < 0:
        raise ConfigError(f"cfat_mnist: padding must be 0 or more, got {padding}")
    body = [
        *normalisation(mean, std, channels),
        ("conv1", nn.Conv2d(channels, 16, 4, stride=2, padding=padding)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(16, 32, 4, stride=2, padding=padding)),
        ("relu2", nn.ReLU()),
        ("flatten", nn.Flatten()),
    ]
    size = flat_size("cfat_mnist", body, input_shape)
    head = [("fc1", nn.Linear(size, 1000)), ("relu3", nn.ReLU()), ("fc2", nn.Linear(1000, num_classes))]
    return chain([*body, *head])
