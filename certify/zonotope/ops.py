"""Linear maps between two layers: forwards on values, forwards on generators, backwards on rows of coefficients.

A row of coefficients `a` on a map's output W x + b is the row `a W` on its input plus the number `a b`. Backwards
through a strided convolution is a transposed convolution, which is slow on CPUs: there it is one ordinary convolution
that computes all phases of the output at once, then a pixel shuffle.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

Shape = tuple[int, ...]

# A dense matrix between two windows costs less than a convolution of them up to so many numbers, and up to so many
# multiplications for each one of the convolution.
_DENSE_NUMBERS = 1 << 17
_DENSE_WASTE = 8


class LinearMap(Protocol):
    """x -> W x + b on tensors [rows, *shape]; `diagonal` where every output depends on one input."""

    @property
    def diagonal(self) -> bool: ...

    def values(self, inputs: Tensor) -> Tensor:
        """Return W x + b."""
        ...

    def generators(self, inputs: Tensor) -> Tensor:
        """Return W x."""
        ...

    def spread(self, radius: Tensor) -> Tensor:
        """Return |W| r: how far the output moves when each input moves by at most r."""
        ...

    def transposed(self, rows: Tensor) -> Tensor:
        """Return a W for rows a."""
        ...

    def constants(self, rows: Tensor) -> Tensor | None:
        """Return a b [rows], None where there is no b."""
        ...


@dataclass(frozen=True, eq=False)
class Origin:
    """How large the numbers were that a map's weights were computed from, where they are not the stored ones."""

    bias: Tensor  # [channels]: sum of the magnitudes that the bias is the sum of, before they cancel
    loose: Tensor  # [channels]: what underflow may be off by, over (2 + largest input) times the smallest normal number
    roundings: int  # of a weight, at most


@dataclass(frozen=True, eq=False)
class Linear:
    """A fully connected layer."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None
    origin: Origin | None = None
    diagonal = False

    def values(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight, self.bias)

    def generators(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight)

    def spread(self, radius: Tensor) -> Tensor:
        return functional.linear(radius, self.absolute)

    @cached_property
    def absolute(self) -> Tensor:
        return self.weight.abs()

    @cached_property
    def turned(self) -> Tensor:
        """The weights as [inputs, outputs] in memory."""
        return self.weight.T.contiguous()

    def transposed(self, rows: Tensor) -> Tensor:
        return rows @ self.weight

    def constants(self, rows: Tensor) -> Tensor | None:
        return None if self.bias is None else rows @ self.bias


@dataclass(frozen=True, eq=False)
class Conv:
    """A convolution of images `input_shape`; an average pooling is one with groups = channels."""

    weight: Tensor  # [outputs, inputs / groups, height, width]
    bias: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    input_shape: Shape
    origin: Origin | None = None
    diagonal = False

    def values(self, inputs: Tensor) -> Tensor:
        return self._convolve(inputs, self.weight, self.bias)

    def generators(self, inputs: Tensor) -> Tensor:
        return self._convolve(inputs, self.weight, None)

    def spread(self, radius: Tensor) -> Tensor:
        return self._convolve(radius, self.absolute, None)

    def constants(self, rows: Tensor) -> Tensor | None:
        return None if self.bias is None else rows.sum((-2, -1)) @ self.bias

    def transposed(self, rows: Tensor) -> Tensor:
        full = self.transposed_full(rows)
        (top, left), (_, height, width) = self.padding, self.input_shape
        missing = (max(0, left + width - full.shape[-1]), max(0, top + height - full.shape[-2]))
        if any(missing):  # rows at the far edge that no window reaches
            full = functional.pad(full, (0, missing[0], 0, missing[1]))
        return full[..., top : top + height, left : left + width]

    def transposed_full(self, rows: Tensor) -> Tensor:
        """Return a W on the padded input, [rows, inputs, (h - 1) stride + reach, ...], possibly a little larger."""
        one_stride = self.stride[0] == self.stride[1] and (self.stride[0] == 1 or self.dilation == (1, 1))
        if rows.device.type != "cpu" or not one_stride:
            transpose = functional.conv_transpose2d
            return transpose(rows, self.weight, None, self.stride, 0, 0, self.groups, self.dilation)
        if rows.dtype == torch.float64 and self.groups == 1 and self.dilation == (1, 1):
            return self._columns(rows)
        return self._phases(rows)

    def transposed_windows(self, rows: Tensor, size: tuple[int, int]) -> Tensor:
        """Return a W on windows of `size` of the padded input, [rows, inputs, *size], for rows that are windows too."""
        shape = rows.shape[1:]
        numbers, products = math.prod(shape), self.weight.shape[1] * math.prod(self.weight.shape[2:])
        inputs = self.input_shape[0]
        wasted = inputs * math.prod(size) > _DENSE_WASTE * products
        if wasted or numbers * inputs * math.prod(size) > _DENSE_NUMBERS or rows.shape[0] < numbers:
            return self.transposed_full(rows)[..., : size[0], : size[1]]
        if shape not in self._window_maps:
            units = torch.eye(numbers, dtype=rows.dtype, device=rows.device).view(numbers, *shape)
            whole = self.transposed_full(units)[..., : size[0], : size[1]]
            self._window_maps[shape] = whole.reshape(numbers, -1)
        return (rows.reshape(-1, numbers) @ self._window_maps[shape]).view(-1, inputs, *size)

    @cached_property
    def _window_maps(self) -> dict[torch.Size, Tensor]:
        """Dense matrices [numbers of a window of the output, numbers of its window of the input], by shape."""
        return {}

    @cached_property
    def absolute(self) -> Tensor:
        return self.weight.abs()

    @cached_property
    def unit_rows(self) -> Tensor:
        """The row of one output pixel per channel, on the window it sees: [outputs, inputs, reach, reach]."""
        outputs = self.weight.shape[0]
        eye = torch.eye(outputs, dtype=self.weight.dtype, device=self.weight.device)
        return functional.conv_transpose2d(
            eye.view(outputs, outputs, 1, 1), self.weight, None, 1, 0, 0, self.groups, self.dilation
        )

    def _convolve(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(inputs, weight, bias, self.stride, self.padding, self.dilation, self.groups)

    def _phases(self, rows: Tensor) -> Tensor:
        stride, (height, width) = self.stride[0], self._phase_weight.shape[-2:]
        padding = tuple(d * (k - 1) for d, k in zip(self.dilation, (height, width), strict=True))
        mixed = functional.conv2d(rows, self._phase_weight, None, 1, padding, self.dilation, self.groups)
        return mixed if stride == 1 else functional.pixel_shuffle(mixed, stride)

    @cached_property
    def _phase_weight(self) -> Tensor:
        """The kernel of every phase of the output, flipped: [inputs * stride^2, outputs / groups, taps, taps]."""
        outputs, inner, height, width = self.weight.shape
        s, groups = self.stride[0], self.groups
        taps = (-(-height // s), -(-width // s))
        padded = functional.pad(self.weight, (0, taps[1] * s - width, 0, taps[0] * s - height))
        split = padded.view(groups, outputs // groups, inner, taps[0], s, taps[1], s).flip(3, 5)
        return split.permute(0, 2, 4, 6, 1, 3, 5).reshape(groups * inner * s * s, outputs // groups, *taps)

    def _columns(self, rows: Tensor) -> Tensor:
        count, outputs, height, width = rows.shape
        kernel = self.weight.shape[2:]
        columns = self.weight.reshape(outputs, -1).T @ rows.reshape(count, outputs, height * width)
        size = tuple((n - 1) * s + k for n, s, k in zip((height, width), self.stride, kernel, strict=True))
        return functional.fold(columns, size, kernel, stride=self.stride)


@dataclass(frozen=True, eq=False)
class Scale:
    """Scale and shift per channel."""

    scale: Tensor  # [channels, 1, ...]
    shift: Tensor
    origin: Origin | None = None
    diagonal = True

    def values(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale + self.shift

    def generators(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale

    def spread(self, radius: Tensor) -> Tensor:
        return radius * self.scale.abs()

    def transposed(self, rows: Tensor) -> Tensor:
        return rows * self.scale

    def constants(self, rows: Tensor) -> Tensor:
        return (rows * self.shift).flatten(1).sum(1)


@dataclass(frozen=True, eq=False)
class Reshape:
    """The same numbers in another shape."""

    input_shape: Shape
    output_shape: Shape
    diagonal = True

    def values(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(-1, *self.output_shape)

    generators = values

    def spread(self, radius: Tensor) -> Tensor:
        return radius.reshape(-1, *self.output_shape)

    def transposed(self, rows: Tensor) -> Tensor:
        return rows.reshape(-1, *self.input_shape)

    def constants(self, rows: Tensor) -> None:
        return None


@dataclass(frozen=True, eq=False)
class Gather:
    """x[plus] - x[minus] on flattened inputs; `minus` may be None. Indices may repeat."""

    plus: Tensor  # [outputs], int64
    minus: Tensor | None
    input_shape: Shape
    diagonal = False

    def values(self, inputs: Tensor) -> Tensor:
        flat = inputs.flatten(1)
        chosen = flat[:, self.plus]
        return chosen if self.minus is None else chosen - flat[:, self.minus]

    generators = values

    def spread(self, radius: Tensor) -> Tensor:
        flat = radius.flatten(1)
        if self.minus is None:
            return flat[:, self.plus]
        both = flat[:, self.plus] + flat[:, self.minus]
        return torch.where(self.plus == self.minus, torch.zeros_like(both), both)

    def transposed(self, rows: Tensor) -> Tensor:
        size = 1
        for length in self.input_shape:
            size *= length
        spread = rows.new_zeros(rows.shape[0], size).index_add(1, self.plus, rows)
        if self.minus is not None:
            spread = spread.index_add(1, self.minus, rows, alpha=-1)
        return spread.view(-1, *self.input_shape)

    def constants(self, rows: Tensor) -> None:
        return None
