"""Adding up window generators: weights of outputs by place, times the windows there, onto one canvas per image.

A canvas holds, for every pixel (and channel) of an image whose generator is not 0, one line of numbers, one per output,
so that what windows of several places give to one pixel is added before its absolute value is taken. Lines are sorted
by stretch of columns, within which every column is seen from the same places: then a row of places gives to adjacent
lines, in one product of matrices without a 0 in it, and a canvas of one stretch stays in the cache until its sum.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from certify.zonotope.windows import Pair, Windows

Shape = tuple[int, ...]

_SMALL = 1 << 16  # numbers of a canvas that stays in the cache whole


@dataclass(frozen=True)
class Stretch:
    """Adjacent columns of pixels, and the first and last column of places whose windows hold them."""

    columns: range
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where the windows of a grid of places lie in images of one shape: the same for every sample."""

    shape: Shape  # of the image: channels, height, width
    stretches: list[Stretch]
    rows: list[range]  # rows of pixels that the windows of each row of places hold, inside the image
    order: Tensor  # [lines]: number of each line's pixel, in the order (stretch, y, x, channel)
    band: Tensor  # [lines]: number of each line's (stretch, y)
    held: list[Tensor]  # per row of places: numbers of the pixels of the lines in its rows of pixels, in order
    inside: list[Tensor]  # per row of places: [columns, lines held] number in the window, the window's size if outside

    @staticmethod
    def of(at: Windows, shape: Shape, grid: Pair, device: torch.device) -> "Geometry":
        (channels, height, width), (tall, wide) = shape, at.size
        stretches = _stretches([_inside(place, at, 1, width) for place in range(grid[1])])
        rows = [_inside(place, at, 0, height) for place in range(grid[0])]
        pixels = torch.arange(channels * height * width).view(shape).permute(1, 2, 0)  # [y, x, channel]
        parts = [pixels[:, part.columns.start : part.columns.stop].reshape(-1) for part in stretches]
        order = torch.cat(parts) if parts else pixels.new_zeros(0)
        sizes = torch.tensor([part.numel() for part in parts])
        channel, y, x = order // (height * width), order // width % height, order % width
        band = torch.arange(len(parts)).repeat_interleave(sizes) * height + y
        right = x - (torch.arange(grid[1])[:, None] * at.step[1] - at.offset[1])  # [columns, lines]
        held, inside = [], []
        for row, own in enumerate(rows):
            lines = (y >= own.start) & (y < own.stop)
            down = y - (row * at.step[0] - at.offset[0])
            number = (channel * tall + down) * wide + right
            number = torch.where((right >= 0) & (right < wide), number, channels * tall * wide)
            held.append(order[lines].to(device))
            inside.append(number[:, lines].to(device))
        return Geometry(shape, stretches, rows, order.to(device), band.to(device), held, inside)


@dataclass(eq=False)
class Memory:
    """What batch after batch uses again: a canvas, as fresh pages cost more than the sums made in them; geometries."""

    numbers: Tensor | None = None
    geometries: dict[tuple[object, ...], Geometry] = field(default_factory=dict)

    def canvas(self, lines: int, like: Tensor) -> Tensor:
        """Return zeros [lines, outputs of `like`]; those of the call before are overwritten."""
        size = lines * like.shape[1]
        if self.numbers is None or self.numbers.numel() < size or self.numbers.dtype != like.dtype:
            self.numbers = like.new_empty(size)
        return self.numbers[:size].view(lines, like.shape[1]).zero_()

    def geometry(self, at: Windows, shape: Shape, grid: Pair, device: torch.device) -> Geometry:
        """Return the geometry, made once."""
        key = (at.step, at.offset, at.size, shape, grid, device)
        if key not in self.geometries:
            self.geometries[key] = Geometry.of(at, shape, grid, device)
        return self.geometries[key]


@dataclass(frozen=True)
class Product:
    """Coefficients [count, active neurons from `neuron` on] of the lines from `line` on."""

    line: int
    neuron: int
    coefficients: Tensor

    def add(self, weights: Tensor, canvas: Tensor, start: int) -> None:
        """Add to a canvas whose first line is `start`."""
        count, neurons = self.coefficients.shape
        lines = canvas.narrow(0, self.line - start, count)
        lines.addmm_(self.coefficients, weights.narrow(0, self.neuron, neurons))


@dataclass(frozen=True, eq=False)
class Image:
    """One image's generators, as products to be added onto canvases: of each stretch the first and last line, too."""

    stretches: list[tuple[int, int, list[Product]]]

    def spread(self, weights: Tensor, memory: Memory) -> Tensor:
        """Return the sum of |generators| of every output that has `weights` [active neurons, outputs]."""
        total = weights.new_zeros(weights.shape[1])
        lines = self.stretches[-1][1] if self.stretches else 0
        parts = self.stretches
        if lines * weights.shape[1] <= _SMALL:  # one canvas for all
            parts = [(0, lines, [product for *_, some in parts for product in some])]
        for start, stop, products in parts:
            canvas = memory.canvas(stop - start, weights)
            for product in products:
                product.add(weights, canvas, start)
            total += canvas.abs_().sum(0)
        return total


def image_of(coefficients: Tensor, geometry: Geometry, counts: Sequence[Sequence[int]], kept: Tensor | None) -> Image:
    """Return coefficients [active neurons, channels, *window], sorted by place, ready to be added up.

    `counts` says how many active neurons each place has, by row and column; `kept` ([channels, height, width], bool)
    which pixels' generators are not 0, None for all.
    """
    columns = functional.pad(coefficients.flatten(1), (0, 1))  # the last one, of 0, is outside the window
    height, stretches = geometry.shape[1], geometry.stretches
    flags = None if kept is None else kept.flatten()
    bands = geometry.band if flags is None else geometry.band[flags[geometry.order]]
    before = [0, *torch.bincount(bands, minlength=len(stretches) * height).cumsum(0).tolist()]  # lines
    products: list[list[Product]] = [[] for _ in stretches]
    first = 0
    for row, (rows, places) in enumerate(zip(geometry.rows, counts, strict=True)):
        starts = [0, *itertools.accumulate(places)]
        if not starts[-1]:
            continue
        inside = geometry.inside[row]
        if flags is not None:
            inside = inside.index_select(1, flags[geometry.held[row]].nonzero()[:, 0])
        block, done = _block(columns[first : first + starts[-1]], places, inside), 0
        for number, part in enumerate(stretches):
            low, high = before[number * height + rows.start], before[number * height + rows.stop]
            own, stop = starts[part.first], starts[part.last + 1]
            if high > low and stop > own:
                turned = block.as_strided((high - low, stop - own), (1, block.shape[1]), own * block.shape[1] + done)
                products[number].append(Product(low, first + own, turned))
            done += high - low
        first += starts[-1]
    ends = itertools.pairwise(before[::height])
    return Image([(*end, some) for end, some in zip(ends, products, strict=True) if some])


def _block(columns: Tensor, places: Sequence[int], inside: Tensor) -> Tensor:
    """Return the coefficients of one row of places at the lines it holds: [active neurons, lines]."""
    sizes = list(places)
    block = columns.new_empty(columns.shape[0], inside.shape[1])
    for index, some, out in zip(inside.unbind(), columns.split(sizes), block.split(sizes), strict=True):
        if some.shape[0]:
            torch.index_select(some, 1, index, out=out)
    return block


def _inside(place: int, at: Windows, axis: int, length: int) -> range:
    start = place * at.step[axis] - at.offset[axis]
    return range(min(max(start, 0), length), max(0, min(start + at.size[axis], length)))


def _stretches(windows: list[range]) -> list[Stretch]:
    """Return the longest stretches of columns that the same windows hold, left to right; none that no window holds."""
    ends = sorted({end for window in windows for end in (window.start, window.stop)})
    found = []
    for start, stop in itertools.pairwise(ends):
        holding = [place for place, window in enumerate(windows) if window.start <= start and stop <= window.stop]
        if holding:
            found.append(Stretch(range(start, stop), holding[0], holding[-1]))
    return found
