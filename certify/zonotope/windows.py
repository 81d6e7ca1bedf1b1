"""Rows of a convolution as windows: a neuron sees a few pixels of the layers before, so its row holds only those.

A window is named by the neuron's place (i, j): it starts at pixel (i * step - offset) and is `size` pixels high and
wide. Going back through a convolution it grows by the kernel's reach. Pixels of a window outside the image are
padding, which is constant 0: coefficients there are set to 0. A window that has grown to the image's size, or that
meets a layer that is no convolution, is written into full rows, which travel on as such.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from certify.zonotope.graph import Node
from certify.zonotope.ops import Conv, Scale
from certify.zonotope.relaxation import Relaxation

if TYPE_CHECKING:
    from certify.zonotope.backward import Propagation

Pair = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Windows:
    """Where the windows of rows lie: sample, place (i, j), and the geometry they share."""

    sample: Tensor  # [rows]
    row: Tensor
    column: Tensor
    last: Pair  # no place lies behind this row and column
    step: Pair
    offset: Pair
    size: Pair

    def before(self, conv: Conv) -> "Windows":
        """Return the windows of the convolution's input that these windows of its output see."""
        kernel = conv.weight.shape[-2:]
        pairs = list(zip(conv.stride, conv.padding, conv.dilation, kernel, strict=True))
        step = [s * stride for s, (stride, _, _, _) in zip(self.step, pairs, strict=True)]
        offset = [o * stride + padding for o, (stride, padding, _, _) in zip(self.offset, pairs, strict=True)]
        size = [(n - 1) * stride + d * (k - 1) + 1 for n, (stride, _, d, k) in zip(self.size, pairs, strict=True)]
        places = (self.sample, self.row, self.column, self.last)
        return Windows(*places, (step[0], step[1]), (offset[0], offset[1]), (size[0], size[1]))

    def view(self, images: Tensor) -> Tensor:
        """Return every possible window of images, 0 outside them: [samples, rows, columns, channels, *size]."""
        pad = []
        for axis in (1, 0):
            last = self.last[axis] * self.step[axis] - self.offset[axis]
            length = images.shape[-2:][axis]
            pad += [self.offset[axis], max(0, last + self.size[axis] - length)]
        padded = functional.pad(images, pad) if any(pad) else images
        view = padded.unfold(2, self.size[0], self.step[0]).unfold(3, self.size[1], self.step[1])
        return view.permute(0, 2, 3, 1, 4, 5)

    def of(self, images: Tensor) -> Tensor:
        """Return each row's window of images [samples, channels, ...]: [rows, channels, *size]."""
        view = self.view(images)
        _, rows, columns, *window = view.shape
        every = view.reshape(-1, *window)  # whole windows beside each other: choosing among them copies long runs
        place = self.row * columns + self.column
        return every.index_select(0, place if images.shape[0] == 1 else place + self.sample * (rows * columns))

    def full(self, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return window rows written into rows of the whole image [rows, *shape]."""
        count, channels = rows.shape[:2]
        starts, margins, lengths = [], [], []
        for axis, places in enumerate((self.row, self.column)):  # a canvas that holds every window, then cut
            start = places * self.step[axis] - self.offset[axis]
            before = max(0, -int(start.min()))
            margins.append(before)
            starts.append(start + before)
            lengths.append(before + max(shape[1 + axis], int(start.max()) + self.size[axis]))
        canvas = rows.new_zeros(count, channels, lengths[0] * lengths[1])
        down = torch.arange(self.size[0], device=rows.device)[:, None] * lengths[1]
        inside = (down + torch.arange(self.size[1], device=rows.device)).view(-1)
        index = (starts[0] * lengths[1] + starts[1])[:, None] + inside
        canvas = canvas.scatter(2, index[:, None].expand(-1, channels, -1), rows.flatten(2))
        (top, left), (_, height, width) = margins, shape
        return canvas.view(count, channels, *lengths)[:, :, top : top + height, left : left + width]


@dataclass(frozen=True, eq=False)
class Spread:
    """Generators of rows that belong to one image: the input's pixels, or a ReLU's new symbols."""

    node: int
    windows: Windows
    coefficients: Tensor  # [rows, channels, *windows.size], with sign


@dataclass(frozen=True, eq=False)
class WindowRows:
    """What rows amount to at the input: `constant` + or - `spread`, the sum of all |generators|."""

    constant: Tensor  # [rows]
    spread: Tensor  # [rows]
    spreads: tuple[Spread, ...]


def window_bounds(run: "Propagation", index: int, which: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
    """Return both bounds of neurons `where` (of samples `which`) of the convolution that is node `index`."""
    if run.slopes == "equal":
        found = travel_windows(run, index, which, where, 1, keep=False)
        return found.constant - found.spread, found.constant + found.spread
    above, below = (travel_windows(run, index, which, where, sign, keep=False) for sign in (1, -1))
    return -(below.constant + below.spread), above.constant + above.spread


def travel_windows(
    run: "Propagation", index: int, which: Tensor, where: Tensor, sign: int, *, keep: bool
) -> WindowRows:
    """Carry the rows of neurons to the input; with `keep` their generators are returned too."""
    node = run.graph.nodes[index]
    conv = node.map
    assert isinstance(conv, Conv)
    _, height, width = node.shape
    channel, place = where // (height * width), where % (height * width)
    at = Windows(which, place // width, place % width, (height - 1, width - 1), (1, 1), (0, 0), (1, 1)).before(conv)
    rows = sign * conv.unit_rows[channel]
    constant = rows.new_zeros(where.numel()) if conv.bias is None else sign * conv.bias[channel]
    spread, spreads, clean = torch.zeros_like(constant), [], False  # clean: padding has coefficient 0
    while index := node.parents[0]:
        node = run.graph.nodes[index]
        if not can_follow(node, at):
            more, wider = run.travel(index, at.full(rows, node.shape), which)
            return WindowRows(constant + more, spread + wider, tuple(spreads))
        if node.kind == "relu":
            rows, moved, more, wider = _through_relu(run.lines[index], rows, at)
            constant, spread, clean = constant + more, spread + wider, True
            if keep:
                spreads.append(Spread(index, at, moved))
            continue
        if not clean and any(at.offset):
            rows = rows * at.of(torch.ones(1, 1, *node.shape[1:], dtype=rows.dtype, device=rows.device))
        assert isinstance(node.map, Conv | Scale)
        added = node.map.constants(rows)
        constant = constant if added is None else constant + added
        clean = isinstance(node.map, Scale)
        if isinstance(node.map, Conv):
            at = at.before(node.map)
            rows = node.map.transposed_windows(rows, at.size)
        else:
            rows = node.map.transposed(rows)
    constant = constant + (rows * at.of(run.box.center)).flatten(1).sum(1)
    moved = rows * at.of(run.box.radius)
    if keep:
        spreads.append(Spread(0, at, moved))
    return WindowRows(constant, spread + moved.flatten(1).abs().sum(1), tuple(spreads))


def can_follow(node: Node, at: Windows) -> bool:
    """Whether windows can go on through `node`: a ReLU or convolution, on an image larger than they are."""
    followed = node.kind == "relu" or isinstance(node.map, Conv | Scale)
    grown = len(node.shape) == 3 and all(size >= length for size, length in zip(at.size, node.shape[1:], strict=True))
    return followed and len(node.shape) == 3 and not grown


def _through_relu(lines: Relaxation, rows: Tensor, at: Windows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows before the ReLU, new generators, and what constant and spread gain."""
    mu = at.of(lines.mu)
    if lines.equal:
        moved = rows * mu
        flat = moved.flatten(1)
        return rows * at.of(lines.lower), moved, flat.sum(1), flat.abs().sum(1)
    positive = rows.clamp(min=0)
    lower, upper = at.of(lines.lower), at.of(lines.upper)
    gained = 2 * (positive * mu).flatten(1).sum(1)
    return rows * lower + positive * (upper - lower), positive, gained, torch.zeros_like(gained)
