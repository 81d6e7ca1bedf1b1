"""How far rounding can have moved a bound: the difference between what was computed and real arithmetic, bounded.

A sum of k products computed in floating point is off by at most gamma_k times the sum of the products' magnitudes,
gamma_k = k u / (1 - k u), in whatever order it is taken (Higham, "Accuracy and Stability of Numerical Algorithms",
2002, section 3.1), and by k times the smallest normal number where products underflow. So with m >= |x| on the inputs
of a linear layer and s = |W| m + |b|:

* what a layer's interval or row bounds are off by, `errors`, follows by recursion, E = |W| E' + gamma s, where E' of a
  ReLU holds the E of its input once for the value and, where the neuron may be unstable, once more because its lines
  were drawn on an interval that is off by E (their slopes are in [0, 1], so they are off by no more than that);
* a row a that travels backwards through the layer adds at most gamma |a| s, whatever cancels in a W afterwards, as a
  is the row as computed; through a ReLU |a| times what its lines are off by.

All of it are sums of numbers that are not negative, computed in the precision of the bounds: such a sum is short by
gamma_k of itself at most, which is put on top. Large weights that cancel show in s and E before they cancel, so no
network can hide a dependence behind rounding: its error is large, its margin is decided again in float64, and is not
certified if that does not suffice either.
Assumed: products and sums round to nearest, or flush underflow to 0, and convolutions are sums of products (no
Winograd or Fourier algorithm, no TF32). Weights that a normalisation was folded into were themselves rounded: they are
charged with `FOLDED` roundings of the magnitudes that they were computed from, before those cancel (`folding.py`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.zonotope.backward import Propagation
from certify.zonotope.graph import Graph, Node
from certify.zonotope.ops import Conv, Gather, Linear, LinearMap, Origin, Scale
from certify.zonotope.relaxation import Box


@dataclass(frozen=True, eq=False)
class Rounding:
    """Per node what rounding can do, ``[samples, *shape]``; `floors` ``[samples]`` are for products that underflow."""

    graph: Graph
    unit: float  # relative error of one operation
    tiny: float  # absolute error of one product that underflows
    magnitudes: list[Tensor]  # |x| over the box in real arithmetic, at most
    errors: list[Tensor]  # of the bounds of single numbers of the node
    charges: list[Tensor]  # what a row picks up per unit of coefficient when it travels through the node
    floors: list[Tensor]  # what it picks up besides

    @staticmethod
    def of(graph: Graph, box: Box, run: Propagation | None = None, roundings: int = 0) -> "Rounding":
        """Return the rounding of bounds on `box`, computed in its type.

        With `run` its intervals limit the magnitudes; without, they multiply up. `roundings`: how many times a weight
        was rounded on its way from the stored network into `graph`, besides what its `Origin` says.
        """
        facts = torch.finfo(box.center.dtype)
        rounding = Rounding(graph, facts.eps / 2, facts.tiny, [], [], [], [])
        for index, node in enumerate(graph.nodes):
            rounding._add(index, node, box, run, roundings)
        return rounding

    def gamma(self, terms: int) -> float:
        """Return k u / (1 - k u) with room for its own rounding, infinite where k u is no longer small."""
        share = terms * self.unit
        return share / (1 - share) * (1 + 1e-6) if share < 0.25 else math.inf

    def _add(self, index: int, node: Node, box: Box, run: Propagation | None, roundings: int) -> None:
        if node.kind == "input":
            magnitude = (box.center.abs() + box.radius) * (1 + 4 * self.unit)
            self._put(node, magnitude, 4 * self.unit * magnitude, self.gamma(node.size + 4) * magnitude, node.size)
        elif node.kind == "sum":
            first, second = node.parents
            magnitude = (self.magnitudes[first] + self.magnitudes[second]) * (1 + 4 * self.unit)
            error = self.errors[first] + self.errors[second] + 4 * self.unit * magnitude
            self._put(node, magnitude, error, self.gamma(4) * magnitude, 1)
        elif node.kind == "relu":
            self._relu(index, node, run)
        else:
            assert node.map is not None
            self._linear(node, node.map, roundings)

    def _linear(self, node: Node, linear: LinearMap, roundings: int) -> None:
        before, origin = node.parents[0], _origin(linear)
        terms, single = _terms(linear, node), (1,) * len(node.shape)
        gamma, bias = self.gamma(terms), _bias(linear, node)
        rounded = (roundings + (0 if origin is None else origin.roundings)) * self.unit
        products = linear.spread(self.magnitudes[before])
        largest = (self.magnitudes[before] + self.errors[before]).flatten(1).amax(1)
        floor = terms * self.tiny * (2 + largest)
        lost = floor.view(-1, *single)  # of one number of the node, by underflow of products and of weights
        if origin is not None:
            lost = lost + (self.tiny * (2 + largest)).view(-1, *single) * origin.loose.view(-1, *single[1:])
        magnitude = (products + bias) * (1 + 2 * gamma + 2 * rounded) + lost
        # twice, of a centre and of a radius; a row's share of the bias is a sum over all numbers of the node
        charge = 2 * (gamma + rounded) * magnitude + self.gamma(node.size + 2) * bias + 2 * lost
        error = linear.spread(self.errors[before]) * (1 + 2 * gamma) + charge
        numbers = self.graph.nodes[before].size + node.size
        self._put(node, magnitude, error, charge, 1, numbers * floor)

    def _relu(self, index: int, node: Node, run: Propagation | None) -> None:
        before = node.parents[0]
        magnitude, error = self.magnitudes[before], self.errors[before]
        if run is None:
            charge = self.gamma(node.size + 8) * 2 * magnitude + error
            self._put(node, magnitude, error + charge, charge, node.size)
            return
        lines, (low, high) = run.lines[index], run.tight[index]
        reached = (torch.maximum(low.abs(), high.abs()) + error) * (1 + 8 * self.unit)
        magnitude = torch.minimum(magnitude, reached)
        # by how much the value may be outside of the interval that its lines were drawn on, on the side where it counts
        active = (error - low).clamp(min=0).where(low >= 0, error)
        inactive = (error + high).clamp(min=0).where(high <= 0, error)
        broken = torch.minimum(active, inactive) * (1 + 8 * self.unit)
        slope = torch.maximum(lines.lower, lines.upper)
        charge = self.gamma(node.size + 8) * (2 * lines.mu + slope * magnitude) + broken
        top = torch.minimum(magnitude, (high.clamp(min=0) + error) * (1 + 8 * self.unit))
        self._put(node, top, slope * error * (1 + 4 * self.unit) + charge, charge, node.size)

    def _put(
        self, node: Node, magnitude: Tensor, error: Tensor, charge: Tensor, terms: int, floor: Tensor | None = None
    ) -> None:
        own = terms * self.tiny * (1 + magnitude.flatten(1).amax(1))
        floor = own if floor is None else floor + own
        self.magnitudes.append(magnitude)
        self.errors.append(error + floor.view(-1, *(1,) * len(node.shape)))
        self.charges.append(charge)
        self.floors.append(floor)

    def logit_pairs(self, labels: Tensor) -> Tensor:
        """Return what bounds of z_q - z_y, made of bounds of the logits, may be off by (``[samples, classes]``)."""
        error = self.errors[-1] + 8 * self.unit * self.magnitudes[-1]
        return 2 * (error + error.gather(1, labels[:, None]))


def rows_with_error(run: Propagation, rounding: Rounding, rows: Tensor, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Carry rows of the last node to the input: (constant, spread, error), each ``[rows]``.

    As `Propagation.travel`, step by step and without its shortcuts, so that the rows that are charged are those used.
    """
    nodes = run.graph.nodes
    constant, spread = rows.new_zeros(rows.shape[0]), rows.new_zeros(rows.shape[0])
    error, met = rows.new_zeros(rows.shape[0]), rows.new_zeros(rows.shape[0])
    pending, terms = {len(nodes) - 1: rows}, 4
    for at in range(len(nodes) - 1, 0, -1):
        if (here := pending.pop(at, None)) is None:
            continue
        node, terms = nodes[at], terms + 4
        sizes = here.flatten(1).abs()
        error = error + run.dot(sizes, rounding.charges[at], which) + run.of(rounding.floors[at], which)
        met = met + run.dot(sizes, rounding.magnitudes[at], which)
        if node.kind == "linear" and node.map is not None:
            added = node.map.constants(here)
            constant = constant if added is None else constant + added
            here = node.map.transposed(here)
        elif node.kind == "relu":
            here, more, wider = run.through_relu(run.lines[at], here, which)
            constant, spread = constant + more, spread + wider
        for parent in node.parents:
            pending[parent] = pending[parent] + here if parent in pending else here
    final = pending[0].flatten(1)
    sizes = final.abs()
    error = error + run.dot(sizes, rounding.charges[0], which) + run.of(rounding.floors[0], which)
    met = met + run.dot(sizes, rounding.magnitudes[0], which)
    constant = constant + run.dot(final, run.box.center, which)
    spread = spread + run.dot(sizes, run.box.radius, which)
    longest = max(node.size for node in nodes)
    error = (error + rounding.gamma(terms) * (met + spread)) * (1 + 2 * rounding.gamma(longest + terms))
    return constant, spread, error


def _terms(linear: LinearMap, node: Node) -> int:
    """Return how many products at most are added up in one number, forwards or backwards, and two roundings more."""
    if isinstance(linear, Linear):
        return max(linear.weight.shape) + 2
    if isinstance(linear, Conv):
        outputs, inner, height, width = linear.weight.shape
        seen = 1  # outputs per channel that see one input pixel, at most
        for taps, stride, dilation in zip((height, width), linear.stride, linear.dilation, strict=True):
            period = stride // math.gcd(stride, dilation)  # taps so far apart reach places a multiple of stride apart
            seen *= -(-taps // period)
        return max(inner * height * width, outputs // linear.groups * seen) + 2
    return node.size + 2 if isinstance(linear, Gather) else 4


def _origin(linear: LinearMap) -> Origin | None:
    return linear.origin if isinstance(linear, Linear | Conv | Scale) else None


def _bias(linear: LinearMap, node: Node) -> Tensor | float:
    """Return the magnitude of the bias, or of all that it was computed from."""
    if (origin := _origin(linear)) is not None:
        bias = origin.bias
    elif isinstance(linear, Linear | Conv):
        bias = linear.bias
    else:
        bias = linear.shift if isinstance(linear, Scale) else None
    return 0.0 if bias is None else bias.abs().view(-1, *(1,) * (len(node.shape) - 1))
