"""MnistNet of DBA (Xie, Huang, Chen, Li, ICLR 2020) and FLIP (Zhang et al., ICLR 2023), for MNIST and Fashion-MNIST.

431,080 parameters on 28x28 grey images. Deviation: returns logits; the authors' code ends in a
log-softmax and takes the cross-entropy of that, which is the same loss. No normalisation in the papers.
"""

from torch import nn

from tasks.models._layers import Channels, chain, flat_size, image_shape, normalisation


def mnist_net(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return two 5x5 convolutions (20, 50) with 2x2 max-pooling, then 500 hidden units."""
    channels, _, _ = image_shape("mnist_net", input_shape, num_classes)
    body = [
        *normalisation(mean, std, channels),
        ("conv1", nn.Conv2d(channels, 20, 5)),
        ("relu1", nn.ReLU()),
        ("pool1", nn.MaxPool2d(2)),
        ("conv2", nn.Conv2d(20, 50, 5)),
        ("relu2", nn.ReLU()),
        ("pool2", nn.MaxPool2d(2)),
        ("flatten", nn.Flatten()),
    ]
    size = flat_size("mnist_net", body, input_shape)
    head = [("fc1", nn.Linear(size, 500)), ("relu3", nn.ReLU()), ("fc2", nn.Linear(500, num_classes))]
    return chain([*body, *head])
