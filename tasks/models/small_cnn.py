"""A small convolutional network for 28x28 images, 11,978 parameters on MNIST: quick enough for whole runs on one core.

Ours, of the shape of LeNet-5 (LeCun et al., 1998): two 5x5 convolutions (8, 16) with pooling, 32 hidden units.
"""

from torch import nn

from tasks.models._layers import Channels, chain, flat_size, image_shape, normalisation


def small_cnn(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return the network; images of at least 16x16."""
    channels, _, _ = image_shape("small_cnn", input_shape, num_classes)
    body = [
        *normalisation(mean, std, channels),
        ("conv1", nn.Conv2d(channels, 8, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(8, 16, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
    ]
    size = flat_size("small_cnn", body, input_shape)
    return chain([*body, ("fc1", nn.Linear(size, 32)), ("relu3", nn.ReLU()), ("fc2", nn.Linear(32, num_classes))])
