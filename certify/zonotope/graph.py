"""A network as a graph of linear maps, sums and ReLUs: the only three things that bound propagation has to know.

A maximum is written with ReLUs, max(a, b) = b + relu(a - b), a pooling window as a tree of such pairs: exact, so the
relaxation of the ReLU is the only one. As max(relu(x)) = relu(max(x)), a ReLU before a max pooling is moved behind it,
where there are fewer numbers and differences of pre-activations keep more of the dependence between inputs.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from certify.layers import Layer
from certify.network import Network
from certify.zonotope.folding import folded, normalised
from certify.zonotope.ops import Conv, Gather, Linear, LinearMap, Reshape, Shape

Kind = Literal["input", "linear", "sum", "relu"]


@dataclass(frozen=True, eq=False)
class Node:
    """One value of the network: what it is made of (`parents`, earlier in the list) and how."""

    kind: Kind
    shape: Shape
    parents: tuple[int, ...] = ()
    map: LinearMap | None = None  # of kind linear

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in the order of computation; the first is the input, the last the logits."""

    nodes: tuple[Node, ...]

    @property
    def relus(self) -> list[int]:
        """Indices of the ReLUs, in order."""
        return [index for index, node in enumerate(self.nodes) if node.kind == "relu"]


def build_graph(network: Network) -> Graph:
    """Return the graph of `network`, batch normalisation folded; differentiable in the network's tensors."""
    parts = network.tensors()
    like = next(iter(parts.values()), torch.zeros(1))
    builder = _Builder(parts, like)
    builder.nodes.append(Node("input", network.input_shape))
    builder.layers(network.layers, 0)
    return Graph(tuple(builder.nodes))


class _Builder:
    def __init__(self, parts: dict[str, Tensor], like: Tensor) -> None:
        self.parts, self.like = parts, like
        self.nodes: list[Node] = []

    def add(self, kind: Kind, shape: Shape, parents: tuple[int, ...], linear: LinearMap | None = None) -> int:
        self.nodes.append(Node(kind, shape, parents, linear))
        return len(self.nodes) - 1

    def layers(self, layers: Sequence[Layer], at: int) -> int:
        """Append the nodes of `layers` after node `at` and return the index of the last."""
        layers = list(layers)
        for first, (before, after) in enumerate(itertools.pairwise(layers)):
            if before.kind == "relu" and after.kind == "max_pool2d":
                pooled = Layer("relu", after.output_shape, after.output_shape)
                layers[first], layers[first + 1] = after, pooled
        merged = False  # once: a second normalisation is a map of its own
        for layer, after in itertools.zip_longest(layers, layers[1:]):
            if merged:
                merged = False
            elif layer.kind in ("linear", "conv2d") and after is not None and after.kind == "batch_norm":
                linear, merged = folded(self.weighted(layer), after, self.parts), True
                at = self.add("linear", layer.output_shape, (at,), linear)
            else:
                at = self.layer(layer, at)
        return at

    def layer(self, layer: Layer, at: int) -> int:
        if layer.kind == "relu":
            return self.add("relu", layer.output_shape, (at,))
        if layer.kind == "max_pool2d":
            return self.max_pool(layer, at)
        if layer.kind == "residual":
            branches = (self.layers(layer.body, at), self.layers(layer.shortcut, at))
            return self.add("sum", layer.output_shape, branches)
        return self.add("linear", layer.output_shape, (at,), self.linear_map(layer))

    def linear_map(self, layer: Layer) -> LinearMap:
        options = layer.options
        if layer.kind in ("linear", "conv2d"):
            return self.weighted(layer)
        if layer.kind == "flatten":
            return Reshape(layer.input_shape, layer.output_shape)
        if layer.kind == "avg_pool2d":
            return self.average(layer.input_shape, options["kernel"], options["stride"], options["padding"])
        if layer.kind == "adaptive_avg_pool2d":
            _, height, width = layer.input_shape
            kernel = (height // options["output"][0], width // options["output"][1])
            return self.average(layer.input_shape, kernel, kernel, (0, 0))
        return normalised(layer, self.parts, self.like)

    def weighted(self, layer: Layer) -> Linear | Conv:
        weight, bias = self.parts[layer.names["weight"]], layer.tensor(self.parts, "bias")
        if layer.kind == "linear":
            return Linear(weight, bias)
        return Conv(weight, bias, **layer.options, input_shape=layer.input_shape)

    def average(
        self, shape: Shape, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
    ) -> LinearMap:
        weight = self.like.new_full((shape[0], 1, *kernel), 1 / math.prod(kernel))
        return Conv(weight, None, stride, padding, (1, 1), shape[0], shape)

    def max_pool(self, layer: Layer, at: int) -> int:
        """Append the maximum over every window, as a tree of max(a, b) = b + relu(a - b)."""
        windows = pool_windows(layer).to(self.like.device)
        shape = layer.input_shape
        while (members := windows.shape[0]) > 1:
            half = (members + 1) // 2  # an odd member is compared twice, which changes no maximum
            first, second = windows[:half].reshape(-1), windows[members - half :].reshape(-1)
            size = first.numel()
            difference = self.add("linear", (size,), (at,), Gather(first, second, shape))
            positive = self.add("relu", (size,), (difference,))
            kept = self.add("linear", (size,), (at,), Gather(second, None, shape))
            at, shape = self.add("sum", (size,), (kept, positive)), (size,)
            windows = torch.arange(size, device=self.like.device).view(half, -1)
        if shape == layer.input_shape:  # windows of one pixel
            at = self.add("linear", (windows.numel(),), (at,), Gather(windows.reshape(-1), None, shape))
        return self.add("linear", layer.output_shape, (at,), Reshape((windows.numel(),), layer.output_shape))


def pool_windows(layer: Layer) -> Tensor:
    """Return for every pooled pixel the indices of its window in the flattened input: [members, outputs].

    Padding is left out by naming the nearest pixel of the window twice: a maximum does not change by that.
    """
    (channels, height, width), options = layer.input_shape, layer.options
    _, rows, columns = layer.output_shape
    axes = []
    for axis, (length, count) in enumerate(((height, rows), (width, columns))):
        start = torch.arange(count) * options["stride"][axis] - options["padding"][axis]
        axes.append((start[None] + torch.arange(options["kernel"][axis])[:, None]).clamp(0, length - 1))
    vertical, horizontal = axes
    window = vertical[:, None, :, None] * width + horizontal[None, :, None, :]  # [kernel, kernel, rows, columns]
    offsets = torch.arange(channels) * height * width
    members = window.reshape(-1, 1, rows, columns) + offsets[None, :, None, None]
    return members.reshape(window.shape[0] * window.shape[1], -1)
