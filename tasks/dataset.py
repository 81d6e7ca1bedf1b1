"""A data set in memory: inputs, labels, and how a batch of it is read."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.vocabulary import Vocabulary

VALUES_AT_ONCE = 1 << 19  # 2 MiB of float32 inputs
Split = Literal["train", "test"]


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels of both splits, held once per process and shared by every client in it.

    Inputs are ``[samples, channels, height, width]`` for images and ``[samples, features]`` for
    tables, as uint8 or float32; a batch is float32, multiplied by `scale` (1/255 for uint8 pixels).
    Texts are word ids ``[samples, words]``, int32, and int64 in a batch.
    """

    name: str
    train_inputs: Tensor
    train_labels: Tensor  # [samples], int64
    test_inputs: Tensor
    test_labels: Tensor
    num_classes: int
    scale: float = 1.0
    train_groups: Tensor | None = None  # [samples], int64: the natural group (writer, state, user) of each sample
    vocabulary: Vocabulary | None = None  # of texts
    num_edge: int = 0  # the last training samples are edge cases that honest clients hold (`with_edge`)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one input, without the batch dimension."""
        return tuple(self.train_inputs.shape[1:])

    def split(self, name: Split) -> tuple[Tensor, Tensor]:
        """Return (inputs as stored, labels) of a split."""
        return (self.train_inputs, self.train_labels) if name == "train" else (self.test_inputs, self.test_labels)

    def batch(self, split: Split, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return (inputs as scaled float32, labels) at `index`; the returned inputs are the caller's to change.

        Images lie channels-last in memory, in which a CPU's convolutions and poolings are a quarter faster.
        """
        inputs, labels = self.split(split)
        chosen = inputs[index] if isinstance(index, slice) else inputs.index_select(0, index)
        order = torch.channels_last if chosen.ndim == 4 else torch.contiguous_format
        kind = torch.int64 if self.vocabulary is not None else torch.float32
        scaled = chosen.to(kind, copy=isinstance(index, slice), memory_format=order)
        chosen_labels = labels[index] if isinstance(index, slice) else labels.index_select(0, index)
        return (scaled.mul_(self.scale) if self.scale != 1.0 else scaled), chosen_labels

    def batches(self, split: Split, order: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the samples at `order` ([samples], int64) in batches of `size`; many are read at once."""
        num_values = math.prod(self.input_shape)
        for part in order.split(max(1, VALUES_AT_ONCE // (size * num_values)) * size):
            inputs, labels = self.batch(split, part)
            yield from zip(inputs.split(size), labels.split(size), strict=True)
