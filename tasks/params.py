"""Model parameters as one flat float32 vector, and the layout that names its parts.

A rule sees a model as one vector; Flower's messages carry named arrays. `Layout` goes between:
trainable parameters first, then floating-point buffers (batch-norm statistics, which FLIP and DBA
aggregate too). Integer buffers (`num_batches_tracked`) are not part of the vector.
"""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a model's arrays, in the order of the flat vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    num_trainable: int  # length of the leading part that is trained by gradient

    @staticmethod
    def of(model: nn.Module) -> "Layout":
        """Return the layout of `model`: its parameters, then its floating-point buffers."""
        parameters = dict(model.named_parameters())
        persistent = model.state_dict().keys()
        buffers = {k: v for k, v in model.named_buffers() if v.is_floating_point() and k in persistent}
        entries = {**parameters, **buffers}
        return Layout(
            names=tuple(entries),
            shapes=tuple(tuple(v.shape) for v in entries.values()),
            num_trainable=sum(v.numel() for v in parameters.values()),
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of values of each array."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def num_params(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """Return named views into `vector` ([num_params]); nothing is copied."""
        parts = torch.split(vector, list(self.sizes))
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    def join(self, arrays: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Copy named arrays into one float32 vector ([num_params]); `out` is filled when given."""
        vector = torch.empty(self.num_params) if out is None else out
        for name, view in self.split(vector).items():
            view.copy_(arrays[name])
        return vector


def bind(model: nn.Module, layout: Layout, vector: Tensor) -> None:
    """Make `model`'s parameters and buffers views into `vector`, so that training changes the vector in place."""
    views = layout.split(vector)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, view in views.items():
        (parameters.get(name) if name in parameters else buffers[name]).data = view  # type: ignore[union-attr]


def model_vector(model: nn.Module) -> Tensor:
    """Return a copy of `model`'s state as one float32 vector ([num_params])."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return Layout.of(model).join({k: v.detach() for k, v in state.items()})


def digest(vector: Tensor) -> str:
    """Return the SHA-256 of a vector's float32 bytes, little-endian: the identity of a model."""
    return hashlib.sha256(vector.detach().contiguous().cpu().numpy().astype("<f4").tobytes()).hexdigest()
