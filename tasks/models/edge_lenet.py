"""The "LeNet" of "Attack of the Tails" (Wang et al., NeurIPS 2020) for EMNIST digits: 1,199,882 parameters.

Deviation: the second dropout is a plain one. The authors' code puts Dropout2d on a matrix, which older
PyTorch took as plain dropout and newer ones warn about. Mean and std are those of the authors' loaders;
give ``mean=None, std=None`` for inputs as they are.
"""

from torch import nn

from tasks.models._layers import Channels, SeededDropout, chain, flat_size, image_shape, normalisation


def edge_lenet(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = (0.1307,),
    std: Channels | None = (0.3081,),
) -> nn.Module:
    """Return two 3x3 convolutions (32, 64), 2x2 max-pooling and 128 hidden units, with dropout 0.25 and 0.5."""
    channels, _, _ = image_shape("edge_lenet", input_shape, num_classes)
    body = [
        *normalisation(mean, std, channels),
        ("conv1", nn.Conv2d(channels, 32, 3)),
        ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(32, 64, 3)),
        ("relu2", nn.ReLU()),
        ("pool", nn.MaxPool2d(2)),
        ("dropout1", SeededDropout(0.25, whole_channels=True)),
        ("flatten", nn.Flatten()),
    ]
    size = flat_size("edge_lenet", body, input_shape)
    head = [
        ("fc1", nn.Linear(size, 128)),
        ("relu3", nn.ReLU()),
        ("dropout2", SeededDropout(0.5)),
        ("fc2", nn.Linear(128, num_classes)),
    ]
    return chain([*body, *head])
