"""The CIFAR-10 network of "Certified Federated Adversarial Training" (Zizzo, Rawat, Sinn, Maffeis, Hughes).

NFFL 2021 workshop, appendix D. Convolutions 32 (3x3), 64 (4x4, stride 2), 64 (3x3), 128 (4x4, stride 2), then
512, 512 hidden units. The paper does not state the padding: 0 gives 3,200 flattened values, 1 gives 8,192.
"""

from torch import nn

from tasks.errors import ConfigError
from tasks.models._layers import Channels, Named, chain, flat_size, image_shape, normalisation


def cfat_cifar(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    padding: int = 0,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return the network; `padding` is that of all four convolutions, in pixels."""
    channels, _, _ = image_shape("cfat_cifar", input_shape, num_classes)
    if padding < 0:
        raise ConfigError(f"cfat_cifar: padding must be 0 or more, got {padding}")
    body: list[Named] = normalisation(mean, std, channels)
    for number, (width, kernel, stride) in enumerate(((32, 3, 1), (64, 4, 2), (64, 3, 1), (128, 4, 2)), start=1):
        body.append((f"conv{number}", nn.Conv2d(channels, width, kernel, stride, padding)))
        body.append((f"relu{number}", nn.ReLU()))
        channels = width
    body.append(("flatten", nn.Flatten()))
    head: list[Named] = [
        ("fc1", nn.Linear(flat_size("cfat_cifar", body, input_shape), 512)),
        ("relu5", nn.ReLU()),
        ("fc2", nn.Linear(512, 512)),
        ("relu6", nn.ReLU()),
        ("fc3", nn.Linear(512, num_classes)),
    ]
    return chain([*body, *head])
