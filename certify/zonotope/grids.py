"""The shortest way into the first fully connected layer: generators of the convolution before it, as windows.

A generator of a convolution's neuron is not 0 only on the neuron's window. To bound the neurons of a linear layer
that follows, the layer's weights at one place of the convolution's output are multiplied by the windows of that place
alone and added where these windows lie; stable ReLUs have no new generator and inactive neurons no windows, so both
drop out. Carrying the layer's rows back through all convolutions gives the same numbers with several times the work
where windows are small; `plan` counts the multiplications of both ways before choosing.
"""

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from certify.zonotope.canvas import Memory, image_of
from certify.zonotope.graph import Graph, Node
from certify.zonotope.ops import Conv, Linear, Reshape, Scale
from certify.zonotope.relaxation import Relaxation
from certify.zonotope.windows import WindowRows, Windows, can_follow, travel_windows

if TYPE_CHECKING:
    from certify.zonotope.backward import Propagation

MAX_KEPT = 64 << 20  # bytes of windows kept for one layer
ROWS_AT_ONCE = 1024  # rows of the linear layer whose generators are summed together
_CROWDED = 8  # where more than one in so many neurons is unstable, an interval proves little about the next layer


@dataclass(eq=False)
class Grids:
    """Windows kept on the way of one sample: node of the convolution -> (its neurons, sorted by place; their rows)."""

    kept: dict[int, tuple[Tensor, WindowRows]] = field(default_factory=dict)
    ready: dict[int, "_Generators"] = field(default_factory=dict)  # the same, after their ReLU
    memory: Memory = field(default_factory=Memory)  # what batch after batch may use again

    def plan(self, run: "Propagation", index: int, high: Tensor) -> bool:
        """Whether the windows of convolution `index`, whose neurons reach up to `high`, are worth keeping."""
        linear = _linear_after(run.graph, index)
        if linear is None or run.samples > 1 or run.slopes != "equal" or torch.is_grad_enabled():
            return False
        node = run.graph.nodes[linear]
        assert isinstance(node.map, Linear)
        sizes = _window_sizes(run.graph, index, run.lines)
        active = int((high > 0).sum())
        if sizes is None or active * sizes * high.element_size() > MAX_KEPT:
            return False
        return active * sizes < sum(_work(before) for before in run.graph.nodes[1 : index + 1])

    def bounds(self, run: "Propagation", index: int, where: Tensor, keep: bool) -> tuple[Tensor, Tensor] | None:
        """Return bounds of neurons `where` of node `index` if windows are to be kept or were; None otherwise."""
        if keep:
            return self._keep(run, index, where)
        node = run.graph.nodes[index]
        before = _convolution_before(run.graph, index)
        if not isinstance(node.map, Linear) or before not in self.kept:
            return None
        run.rows += where.numel()
        generators = self.after(run, before)
        parts, weights = [], generators.of(node.map)
        if few := 3 * where.numel() < 2 * node.size:
            weights = weights.index_select(1, where)
        for some in weights.split(ROWS_AT_ONCE, 1):
            run.tick()
            parts.append(generators.through(some, self.memory))
        center, spread = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        if not few and where.numel() < node.size:
            center, spread = center[where], spread[where]
        center = center if node.map.bias is None else center + node.map.bias[where]
        return center - spread, center + spread

    def crowded(self, run: "Propagation", index: int) -> bool:
        """Whether rows for all of linear layer `index` are the better start: its interval would prove few signs."""
        before = _convolution_before(run.graph, index)
        if before not in self.kept or run.graph.nodes[index + 1].kind != "relu":
            return False
        unstable = run.lines[before + 1].unstable
        return _CROWDED * int(unstable.sum()) > unstable.numel()

    def after(self, run: "Propagation", index: int) -> "_Generators":
        """Return the generators after the ReLU that follows convolution `index`, whose windows were kept."""
        if index not in self.ready:
            self.ready[index] = _Generators(run, index, *self.kept[index])
        return self.ready[index]

    def arrive(self, run: "Propagation", index: int, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return (constant, spread) of rows [rows, outputs] of node `index`, if windows were kept for it."""
        before, linear = _convolution_before(run.graph, index), run.graph.nodes[index].map
        if before not in self.kept or not isinstance(linear, Linear):
            return None
        generators = self.after(run, before)
        parts = [generators.through(generators.of(linear) @ some.T, self.memory) for some in rows.split(ROWS_AT_ONCE)]
        center, spread = (torch.cat([part[side] for part in parts]) for side in (0, 1))
        added = linear.constants(rows)
        return center if added is None else center + added, spread

    def _keep(self, run: "Propagation", index: int, where: Tensor) -> tuple[Tensor, Tensor]:
        run.rows += where.numel()
        channels, *_ = run.graph.nodes[index].shape
        places = run.graph.nodes[index].size // channels
        order = (where % places * channels + where // places).argsort()
        found = travel_windows(run, index, torch.zeros_like(where), where[order], 1, keep=True)
        self.kept[index] = (where[order], found)
        back = order.argsort()
        return (found.constant - found.spread)[back], (found.constant + found.spread)[back]


class _Generators:
    """The zonotope after the ReLU that follows a convolution, one sample, with window generators."""

    def __init__(self, run: "Propagation", index: int, where: Tensor, rows: WindowRows) -> None:
        lines = run.lines[index + 1]
        slope, mu = lines.lower.flatten()[where], lines.mu.flatten()[where]
        active = slope.nonzero()[:, 0]  # and NaN, which must be seen
        self.where, slope, mu = where[active], slope[active], mu[active]
        self.center = rows.constant[active] * slope + mu
        self.unstable = lines.unstable.flatten()[self.where].nonzero()[:, 0]
        self.fresh = mu[self.unstable]
        _, height, width = run.graph.nodes[index].shape
        counts = torch.bincount(self.where % (height * width), minlength=height * width).view(height, width).tolist()
        self.images = []
        for part in rows.spreads:
            shape = run.graph.nodes[part.node].shape
            geometry = run.grids.memory.geometry(part.windows, shape, (height, width), slope.device)
            coefficients = part.coefficients.index_select(0, active).mul_(slope[:, None, None, None])
            kept = run.lines[part.node].unstable[0] if part.node else None
            self.images.append(image_of(coefficients, geometry, counts, kept))
        self.weights: tuple[Linear, Tensor] | None = None

    def of(self, linear: Linear) -> Tensor:
        """Return the layer's weights of active neurons: [active, outputs]."""
        if self.weights is None or self.weights[0] is not linear:
            self.weights = linear, linear.turned.index_select(0, self.where)
        return self.weights[1]

    def through(self, weights: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """Return centre and spread of the outputs that have `weights` [active, outputs] on the flattened zonotope."""
        center, spread = self.center @ weights, self.fresh @ weights.index_select(0, self.unstable).abs_()
        for image in self.images:
            spread = spread + image.spread(weights, memory)
        return center, spread


def _linear_after(graph: Graph, index: int) -> int | None:
    """Return the linear layer that follows convolution `index`, one ReLU and one flattening; None for all else."""
    chain = graph.nodes[index : index + 4]
    kinds = [node.kind if node.map is None else type(node.map) for node in chain]
    in_row = all(node.parents == (index + step,) for step, node in enumerate(chain[1:]))
    return index + 3 if kinds == [Conv, "relu", Reshape, Linear] and in_row else None


def _convolution_before(graph: Graph, index: int) -> int:
    return index - 3 if index >= 3 and _linear_after(graph, index - 3) == index else -1


def _window_sizes(graph: Graph, index: int, lines: dict[int, Relaxation]) -> int | None:
    """Return how many generators a neuron's windows hold in all images, None where windows cannot reach the input."""
    node, none = graph.nodes[index], torch.zeros(0, dtype=torch.int64)
    assert isinstance(node.map, Conv)
    at = Windows(none, none, none, (0, 0), (1, 1), (0, 0), (1, 1)).before(node.map)
    total = 0
    while before := node.parents[0]:
        node = graph.nodes[before]
        if not can_follow(node, at):
            return None
        if node.kind == "relu":
            places = math.prod(node.shape[1:])
            total += math.ceil(math.prod(at.size) * int(lines[before].unstable.sum()) / places)
        elif isinstance(node.map, Conv):
            at = at.before(node.map)
    return total + math.prod(at.size) * graph.nodes[0].shape[0]


def _work(node: Node) -> int:
    """Return the multiplications that one row takes on its way back through `node`."""
    if isinstance(node.map, Conv):
        return math.prod(node.shape[1:]) * node.map.weight.numel()
    if isinstance(node.map, Linear):
        return node.map.weight.numel()
    return node.size if isinstance(node.map, Scale) else 0
