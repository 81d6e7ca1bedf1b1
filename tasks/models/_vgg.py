"""What the VGG networks share: 3x3 convolutions with ReLU, 2x2 max-pooling where the plan says `POOL`.

Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015, table 1.
"""

from torch import nn

from tasks.models._layers import (
    Channels,
    Named,
    SeededDropout,
    chain,
    flat_size,
    image_shape,
    normalisation,
)

POOL = 0
A = (64, POOL, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
B = (64, 64, POOL, 128, 128, POOL, 256, 256, POOL, 512, 512, POOL, 512, 512, POOL)
D = (64, 64, POOL, 128, 128, POOL, 256, 256, 256, POOL, 512, 512, 512, POOL, 512, 512, 512, POOL)
# of the honest clients' loaders of "Attack of the Tails"
MEAN, STD = (0.4914, 0.4824, 0.4467), (0.2471, 0.2435, 0.2616)


def convolutions(
    model: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    plan: tuple[int, ...],
    mean: Channels | None,
    std: Channels | None,
) -> tuple[list[Named], int]:
    """Return the layers up to the flat features, and how many features there are; raises `ConfigError`."""
    channels, _, _ = image_shape(model, input_shape, num_classes)
    body: list[Named] = normalisation(mean, std, channels)
    number = 1
    for width in plan:
        if width == POOL:
            body.append((f"pool{number - 1}", nn.MaxPool2d(2)))
            continue
        body.append((f"conv{number}", nn.Conv2d(channels, width, 3, padding=1)))
        body.append((f"relu{number}", nn.ReLU()))
        channels, number = width, number + 1
    body.append(("flatten", nn.Flatten()))
    return body, flat_size(model, body, input_shape)


def with_three_linear_layers(
    model: str,
    input_shape: tuple[int, ...],
    num_classes: int,
    plan: tuple[int, ...],
    mean: Channels | None,
    std: Channels | None,
) -> nn.Module:
    """Return the capacity study's network: dropout-512-ReLU twice, then the classes; dropout is 0.5."""
    body, size = convolutions(model, input_shape, num_classes, plan, mean, std)
    head: list[Named] = []
    for number in (1, 2):
        head.append((f"dropout{number}", SeededDropout(0.5)))
        head.append((f"fc{number}", nn.Linear(size if number == 1 else 512, 512)))
        head.append((f"relu_fc{number}", nn.ReLU()))
    return chain([*body, *head, ("fc3", nn.Linear(512, num_classes))])
