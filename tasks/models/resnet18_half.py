"""ResNet-18 at half width, the CIFAR-10 network of DBA (ICLR 2020) and FLIP (ICLR 2023): 2,797,610 parameters.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2016, in the form for 32x32 images: a
3x3 stem, four stages of two basic blocks with 32, 64, 128, 256 channels. No normalisation of inputs in the papers.
Its batch-norm statistics are part of what a federation aggregates.
"""

from torch import Tensor, nn
from torch.nn import functional

from tasks.models._layers import Channels, chain, image_shape, normalisation

_STAGES = ((32, 1), (64, 2), (128, 2), (256, 2))  # (channels, stride of the first block)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch normalisation, added to the input or to its 1x1 projection."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != width:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, inputs: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(inputs)))
        return functional.relu(self.bn2(self.conv2(inner)) + self.shortcut(inputs))


def resnet18_half(
    input_shape: tuple[int, ...],
    num_classes: int,
    *,
    mean: Channels | None = None,
    std: Channels | None = None,
) -> nn.Module:
    """Return the network; the last feature map is averaged whole (4x4 on 32x32 images)."""
    channels, _, _ = image_shape("resnet18_half", input_shape, num_classes)
    layers = [
        *normalisation(mean, std, channels),
        ("conv1", nn.Conv2d(channels, 32, 3, padding=1, bias=False)),
        ("bn1", nn.BatchNorm2d(32)),
        ("relu", nn.ReLU()),
    ]
    channels = 32
    for number, (width, stride) in enumerate(_STAGES, start=1):
        blocks = nn.Sequential(BasicBlock(channels, width, stride), BasicBlock(width, width, 1))
        layers.append((f"layer{number}", blocks))
        channels = width
    return chain(
        [
            *layers,
            ("pool", nn.AdaptiveAvgPool2d(1)),
            ("flatten", nn.Flatten()),
            ("fc", nn.Linear(channels, num_classes)),
        ]
    )
