"""Adding up window generators: weights of outputs by place, times the windows there, onto one canvas per image.

A canvas holds, for every pixel (and channel) of an image, one number per output, so that what windows of several
places give to one pixel is added before its absolute value is taken. Outputs lie beside each other in memory. Where few
of an image's generators are not 0, as with unstable ReLUs, only those have a line on the canvas.
"""

import itertools
import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from certify.zonotope.windows import Windows

Place = tuple[int, int, int]  # row and column of the convolution's output, and how many of its neurons are active
_WORTH = 0.7  # share of generators from which on all of them have lines


class Image(Protocol):
    """One image's generators."""

    def spread(self, weights: Tensor, memory: dict[str, Tensor]) -> Tensor:
        """Return the sum of |generators| of every output that has `weights` [active neurons, outputs]."""
        ...


def image_of(coefficients: Tensor, at: Windows, places: list[Place], kept: Tensor | None) -> Image:
    """Return coefficients [active neurons, channels, *window], sorted by place, ready to be added up.

    `kept` ([channels, height, width], bool) says which pixels' generators are not 0; None for all.
    """
    if kept is None or int(kept.sum()) > _WORTH * kept.numel():
        return _whole(coefficients, at, places)
    return _sparse(coefficients, at, places, kept)


@dataclass(frozen=True, eq=False)
class _Whole:
    """Every pixel of the image has a line."""

    turned: Tensor  # [y, (x, channel), active neurons]
    blocks: list[tuple[slice, slice, slice]]  # rows and lines of the canvas, active neurons
    shape: tuple[int, int]

    def spread(self, weights: Tensor, memory: dict[str, Tensor]) -> Tensor:
        canvas = _canvas(memory, (*self.shape, weights.shape[1]), weights)
        for rows, lines, own in self.blocks:
            turned = self.turned[:, :, own]
            canvas[rows, lines].baddbmm_(turned, weights[own].expand(turned.shape[0], -1, -1))
        return canvas.abs_().sum((0, 1))


def _whole(coefficients: Tensor, at: Windows, places: list[Place]) -> _Whole:
    (tall, wide), channels = at.size, coefficients.shape[1]
    turned = coefficients.permute(2, 3, 1, 0).reshape(tall, wide * channels, -1)
    blocks, first, shape = [], 0, (0, 0)
    for row, column, count in places:
        top, left = row * at.step[0], column * at.step[1] * channels
        bottom, right = top + tall, left + wide * channels
        blocks.append((slice(top, bottom), slice(left, right), slice(first, first + count)))
        shape = (max(shape[0], bottom), max(shape[1], right))
        first += count
    return _Whole(turned, blocks, shape)


@dataclass(frozen=True, eq=False)
class _Sparse:
    """Only some generators have a line; lines are in the order (y, x, channel)."""

    blocks: list[tuple[slice, slice, Tensor]]  # lines of the canvas, active neurons, coefficients [lines, neurons]
    lines: int

    def spread(self, weights: Tensor, memory: dict[str, Tensor]) -> Tensor:
        canvas = _canvas(memory, (self.lines, weights.shape[1]), weights)
        for lines, own, coefficients in self.blocks:
            canvas[lines].addmm_(coefficients, weights[own])
        return canvas.abs_().sum(0)


def _sparse(coefficients: Tensor, at: Windows, places: list[Place], kept: Tensor) -> _Sparse:
    _, height, width = kept.shape
    tall, wide = at.size
    before = [0, *itertools.accumulate(kept.sum(0).flatten().tolist())]  # lines before each pixel
    blocks, first, taken = [], 0, 0
    padded = functional.pad(kept[None], _margins(at, places, height, width))
    windows = padded.unfold(2, tall, at.step[0]).unfold(3, wide, at.step[1])[0].permute(1, 2, 3, 4, 0)
    inside = torch.stack([windows[row, column] for row, column, _ in places])  # [places, y, x, channels]
    sizes = inside.flatten(1).sum(1).tolist()
    repeats = torch.tensor([count for _, _, count in places], device=kept.device)
    packed = coefficients.permute(0, 2, 3, 1)[inside.repeat_interleave(repeats, 0)]  # by place, neuron, line
    for (row, column, count), size in zip(places, sizes, strict=True):
        top, left = row * at.step[0] - at.offset[0], column * at.step[1] - at.offset[1]
        own = slice(first, first + count)
        chosen = packed[taken : taken + count * size].view(count, size).T  # [lines of the window, neurons]
        done, taken = 0, taken + count * size
        for y in range(max(top, 0), min(top + tall, height)):
            start, end = before[y * width + max(left, 0)], before[y * width + min(left + wide, width)]
            if end > start:
                blocks.append((slice(start, end), own, chosen[done : done + end - start]))
                done += end - start
        first += count
    return _Sparse(blocks, before[-1])


def _margins(at: Windows, places: list[Place], height: int, width: int) -> tuple[int, int, int, int]:
    """Return how far windows reach out of the image: left, right, top, bottom."""
    last = [max((place[axis] for place in places), default=0) for axis in (0, 1)]
    ends = [n * step - offset + size for n, step, offset, size in zip(last, at.step, at.offset, at.size, strict=True)]
    return at.offset[1], max(0, ends[1] - width), at.offset[0], max(0, ends[0] - height)


def _canvas(memory: dict[str, Tensor], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros in memory that is used again and again: fresh pages cost more than the sums made in them."""
    size = math.prod(shape)
    if "canvas" not in memory or memory["canvas"].numel() < size or memory["canvas"].dtype != like.dtype:
        memory["canvas"] = like.new_empty(size)
    return memory["canvas"][:size].view(shape).zero_()
