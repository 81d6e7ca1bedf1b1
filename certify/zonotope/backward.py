"""Bounds by rows of coefficients that travel from a layer back to the input.

A row says: this combination of a layer's numbers is at most `constant + spread + row . (numbers before)`. Through a
ReLU with parallel lines both bounds of a combination travel in one row, and the result is, number for number, that of
a zonotope that travels forwards; but the work is (rows wanted) x (layers before), whatever eps, instead of one
generator per input pixel and unstable ReLU. Rows of a convolution see only a window of the layer before and travel as
windows. A neuron whose sign the interval of the relaxed layer before proves gets no row: its relaxation is exact
either way, so nothing changes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from certify.zonotope.graph import Graph
from certify.zonotope.grids import Grids
from certify.zonotope.ops import Conv, Linear
from certify.zonotope.relaxation import Box, Relaxation, Slopes, hull, relax, widen
from certify.zonotope.windows import window_bounds

Bounds = tuple[Tensor, Tensor]


@dataclass(eq=False)
class Propagation:
    """Bounds of one batch of inputs: fills in the ReLUs' lines layer by layer, then answers for any rows."""

    graph: Graph
    box: Box
    slopes: Slopes
    working_set: int  # bytes that a chunk of rows may take in its largest layer
    tick: Callable[[], None] = lambda: None  # called between chunks; may raise
    lines: dict[int, Relaxation] = field(default_factory=dict)
    reach: dict[int, Bounds] = field(default_factory=dict)  # an interval that contains every node's relaxed values
    tight: dict[int, Bounds] = field(default_factory=dict)  # per ReLU, the interval its lines were drawn on
    grids: Grids = field(default_factory=Grids)
    rows: int = 0  # rows that travelled, in all samples

    @property
    def samples(self) -> int:
        return self.box.center.shape[0]

    def prepare(self) -> None:
        """Compute the lines of all ReLUs."""
        for index in range(len(self.graph.nodes) - 1):
            if index not in self.reach:
                self.step(index)

    def prepare_exact(self) -> None:
        """Compute the lines of the first ReLUs, those whose intervals are exact without rows."""
        for index, node in enumerate(self.graph.nodes[:-1]):
            if node.kind == "relu" and not self.exact_interval(node.parents[0]):
                return
            self.step(index)

    def part(self, some: slice) -> "Propagation":
        """Return the same for some of the samples, with the lines known so far."""
        lines = {index: lines[some] for index, lines in self.lines.items()}
        reach = {index: (low[some], high[some]) for index, (low, high) in self.reach.items()}
        tight = {index: (low[some], high[some]) for index, (low, high) in self.tight.items()}
        return replace(
            self,
            box=self.box[some],
            lines=lines,
            reach=reach,
            tight=tight,
            grids=Grids(memory=self.grids.memory),
            rows=0,
        )

    def step(self, index: int) -> None:
        """Fill in what node `index` reaches, from the nodes before."""
        node = self.graph.nodes[index]
        if node.kind == "input":
            self.reach[index] = (self.box.low, self.box.high)
        elif node.kind == "linear" and self.grids.crowded(self, index):
            unknown = self.box.center.new_full((self.samples, *node.shape), math.inf)
            self.reach[index] = (-unknown, unknown)
        elif node.kind == "linear" and node.map is not None:
            self.reach[index] = interval_step(node.map, *self.reach[node.parents[0]])
        elif node.kind == "sum":
            first, second = (self.reach[parent] for parent in node.parents)
            self.reach[index] = (first[0] + second[0], first[1] + second[1])
        elif node.kind == "relu":
            low, high = self.tightened(node.parents[0])
            self.lines[index], self.tight[index] = relax(low, high, self.slopes), (low, high)
            self.reach[index] = hull(low, high, self.lines[index])

    def tightened(self, index: int) -> Bounds:
        """Return widened bounds [samples, *shape] of a node: by rows where it may be unstable, else the interval."""
        low, high = widen(*self.reach[index])
        if self.exact_interval(index):
            return low, high
        keep = self.grids.plan(self, index, high)
        proven = (high <= 0) if keep else (low >= 0) | (high <= 0)
        which, where = (~proven).flatten(1).nonzero(as_tuple=True)
        if which.numel() == 0:
            return low, high
        found = self.grids.bounds(self, index, where, keep) if self.samples == 1 else None
        found_low, found_high = widen(*(found if found is not None else self.neurons(index, which, where)))
        shape = low.shape
        low = low.flatten(1).index_put((which, where), found_low).view(shape)
        high = high.flatten(1).index_put((which, where), found_high).view(shape)
        return low, high

    def exact_interval(self, index: int) -> bool:
        """Whether a node is one linear layer on the input, scaled at most: its interval is already the exact one."""
        scaled = 0
        while index:
            node = self.graph.nodes[index]
            if node.kind != "linear":
                return False
            scaled += not getattr(node.map, "diagonal", False)
            index = node.parents[0]
        return scaled <= 1

    def neurons(self, index: int, which: Tensor, where: Tensor) -> Bounds:
        """Return bounds of single neurons: number `where` of node `index` in sample `which`."""
        node = self.graph.nodes[index]
        lows, highs = [], []
        for part in chunks(which.numel(), self.chunk(index)):
            self.tick()
            self.rows += len(part)
            samples, neurons = which[part.start : part.stop], where[part.start : part.stop]
            if isinstance(node.map, Conv):
                low, high = window_bounds(self, index, samples, neurons)
            elif isinstance(node.map, Linear):
                low, high = self.interval_of_rows(node.parents[0], node.map.weight[neurons], samples)
                if node.map.bias is not None:
                    low, high = low + node.map.bias[neurons], high + node.map.bias[neurons]
            else:
                low, high = self.interval_of_rows(index, self.unit_rows(index, neurons), samples)
            lows.append(low)
            highs.append(high)
        return torch.cat(lows), torch.cat(highs)

    def interval_of_rows(self, index: int, rows: Tensor, which: Tensor) -> Bounds:
        """Return both bounds of rows [rows, *shape] of a node."""
        if self.slopes == "equal":
            constant, spread = self.travel(index, rows, which)
            return constant - spread, constant + spread
        upper = sum(self.travel(index, rows, which))
        return -sum(self.travel(index, -rows, which)), upper  # type: ignore[operator]

    def upper_of_rows(self, index: int, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return (constant, spread) whose sum bounds rows of a node from above."""
        parts = [
            self.travel(index, rows[part.start : part.stop], which[part.start : part.stop])
            for part in chunks(rows.shape[0], self.chunk(index))
        ]
        self.rows += rows.shape[0]
        return torch.cat([constant for constant, _ in parts]), torch.cat([spread for _, spread in parts])

    def travel(self, index: int, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
        """Carry rows [rows, *shape] of node `index`, of samples `which`, to the input: (constant, spread) [rows]."""
        constant, spread = rows.new_zeros(rows.shape[0]), rows.new_zeros(rows.shape[0])
        pending = {index: rows}
        for at in range(index, 0, -1):
            if (rows := pending.pop(at, None)) is None:  # type: ignore[assignment]
                continue
            node = self.graph.nodes[at]
            if node.kind == "linear" and node.map is not None:
                if not pending and (arrived := self.grids.arrive(self, at, rows)) is not None:
                    return constant + arrived[0], spread + arrived[1]
                added = node.map.constants(rows)
                constant = constant if added is None else constant + added
                rows = node.map.transposed(rows)
            elif node.kind == "relu":
                rows, more, wider = self.through_relu(self.lines[at], rows, which)
                constant, spread = constant + more, spread + wider
            for parent in node.parents:
                pending[parent] = pending[parent] + rows if parent in pending else rows
        final = pending[0].flatten(1)
        constant = constant + self.dot(final, self.box.center, which)
        return constant, spread + self.dot(final.abs(), self.box.radius, which)

    def through_relu(self, lines: Relaxation, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (rows before the ReLU, what the constant gains, what the spread gains)."""
        flat = rows.flatten(1)
        if lines.equal:
            columns = self.columns(lines)
            if columns is not None:
                chosen = flat[:, columns] * lines.mu.flatten(1)[:, columns]
                gained, wider = chosen.sum(1), chosen.abs().sum(1)
            else:
                gained, wider = self.dot(flat, lines.mu, which), self.dot(flat.abs(), lines.mu, which)
            return rows * self.of(lines.lower, which), gained, wider
        positive = rows.clamp(min=0)
        lower, upper = self.of(lines.lower, which), self.of(lines.upper, which)
        gained = 2 * self.dot(positive.flatten(1), lines.mu, which)
        return rows * lower + positive * (upper - lower), gained, torch.zeros_like(gained)

    def columns(self, lines: Relaxation) -> Tensor | None:
        """Return the unstable neurons of the only sample where they are few: no other column adds to constants."""
        if self.samples != 1:
            return None
        columns = lines.unstable.flatten().nonzero()[:, 0]
        return columns if 3 * columns.numel() < lines.unstable.numel() else None

    def of(self, values: Tensor, which: Tensor) -> Tensor:
        """Return the values [samples, ...] of the rows' samples; one sample is broadcast rather than repeated."""
        return values if self.samples == 1 else values[which]

    def dot(self, rows: Tensor, values: Tensor, which: Tensor) -> Tensor:
        """Return the sum of rows [rows, numbers] times values of their samples."""
        flat = values.flatten(1)
        return rows @ flat[0] if self.samples == 1 else (rows * flat[which]).sum(1)

    def unit_rows(self, index: int, where: Tensor) -> Tensor:
        """Return rows that pick single numbers of a node."""
        node = self.graph.nodes[index]
        rows = self.box.center.new_zeros(where.numel(), node.size)
        rows[torch.arange(where.numel(), device=where.device), where] = 1
        return rows.view(-1, *node.shape)

    def chunk(self, index: int) -> int:
        """Return how many rows of node `index` may travel at once."""
        largest = max(node.size for node in self.graph.nodes[: index + 1])
        return max(1, self.working_set // (largest * self.box.center.element_size()))


def interval_step(linear: object, low: Tensor, high: Tensor) -> Bounds:
    """Return the interval of a linear map on an interval."""
    center, radius = (low + high) / 2, (high - low) / 2
    middle, spread = linear.values(center), linear.spread(radius)  # type: ignore[attr-defined]
    return middle - spread, middle + spread


def chunks(count: int, size: int) -> list[range]:
    pieces = max(1, math.ceil(count / size))
    even = math.ceil(count / pieces) if count else 1
    return [range(start, min(start + even, count)) for start in range(0, count, even)]
