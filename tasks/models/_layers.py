"""Layers and helpers that the models share.

Every model is one `nn.Sequential` with named parts where it can be, so that bound propagation can walk
it. Its first layer, when `mean` and `std` are given, normalises: certified radii and triggers stay in
units of the input. Dropout draws from a generator of its own, never from the global one.
"""

from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from tasks.errors import ConfigError, HawthornError

Named = tuple[str, nn.Module]
Channels = tuple[float, ...]


class Normalise(nn.Module):
    """(x - mean) / std per channel, [batch, channels, ...]; holds no parameters and adds nothing to the state dict."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Channels, std: Channels) -> None:
        super().__init__()
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ConfigError(f"mean and std want one number per channel each, std above 0; got {mean} and {std}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        shape = (-1, *(1,) * (inputs.ndim - 2))
        return (inputs - self.mean.view(shape)) / self.std.view(shape)

    def extra_repr(self) -> str:
        return f"mean={self.mean.tolist()}, std={self.std.tolist()}"


class SeededDropout(nn.Module):
    """Dropout whose mask comes from an explicit generator, set by `set_dropout_generator`.

    `whole_channels` drops channels instead of single values (Dropout2d). Training without a generator
    raises `HawthornError`. A copied or pickled layer has no generator: two copies must not share draws.
    """

    def __init__(self, p: float, *, whole_channels: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ConfigError(f"dropout wants a probability in [0, 1), got {p}")
        self.p = p
        self.whole_channels = whole_channels
        self.generator: torch.Generator | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return inputs
        if self.generator is None:
            raise HawthornError(
                "dropout has no generator in training; call set_dropout_generator(model, generator) first, "
                "or model.eval() to evaluate"
            )
        shape = inputs.shape[:2] + (1,) * (inputs.ndim - 2) if self.whole_channels else inputs.shape
        draws = torch.rand(shape, generator=self.generator, device=self.generator.device)
        keep = (draws >= self.p).to(device=inputs.device, dtype=inputs.dtype)
        return inputs * keep.div_(1 - self.p)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "generator": None}

    def extra_repr(self) -> str:
        return f"p={self.p}, whole_channels={self.whole_channels}"


def set_dropout_generator(model: nn.Module, generator: torch.Generator | None) -> None:
    """Give every `SeededDropout` in `model` the generator to draw masks from (None takes it away)."""
    for module in model.modules():
        if isinstance(module, SeededDropout):
            module.generator = generator


def normalisation(mean: Channels | None, std: Channels | None, channels: int) -> list[Named]:
    """Return the first layer of a model as a list: empty when `mean` and `std` are None; raises `ConfigError`."""
    if mean is None and std is None:
        return []
    if mean is None or std is None or len(mean) != channels or len(std) != channels:
        raise ConfigError(
            f"normalising {channels} channels wants {channels} numbers in mean and std, got {mean}, {std}"
        )
    return [("normalise", Normalise(mean, std))]


def image_shape(model: str, input_shape: tuple[int, ...], num_classes: int) -> tuple[int, int, int]:
    """Return (channels, height, width) if `input_shape` is an image's and there are classes; raises `ConfigError`."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ConfigError(f"model {model} wants images of shape (channels, height, width), got {input_shape}")
    if num_classes < 2:
        raise ConfigError(f"model {model} wants at least 2 classes, got {num_classes}")
    return input_shape[0], input_shape[1], input_shape[2]


def flat_size(model: str, layers: Iterable[Named], input_shape: tuple[int, ...]) -> int:
    """Return how many numbers `layers` turn one input into; too small an input raises `ConfigError`."""
    body = chain(layers).eval()
    try:
        with torch.no_grad():
            return body(torch.zeros(1, *input_shape)).numel()
    except RuntimeError:
        raise ConfigError(f"inputs of shape {input_shape} are too small for the layers of model {model}") from None
    finally:
        body.train()


def chain(layers: Iterable[Named]) -> nn.Sequential:
    """Return the named layers as one module, applied in order."""
    return nn.Sequential(OrderedDict(layers))
