"""Interval bounds: the box that each layer's output stays in, from the box before (Gowal et al., "On the
Effectiveness of Interval Bound Propagation", 2018). Cheap, and far looser than zonotopes on deep networks.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from certify.layers import Layer, Tensors, run, scale_and_shift
from certify.network import Network
from certify.zonotope.relaxation import Box

Bounds = tuple[Tensor, Tensor]


def interval_margins(network: Network, box: Box, labels: Tensor) -> Tensor:
    """Return upper bounds of z_q - z_y [samples, classes], the last layer joined with the difference; 0 at q = y."""
    layers = network.layers
    last = layers[-1] if layers and layers[-1].kind == "linear" else None
    low, high = _through(layers[:-1] if last else layers, network.tensors(), box.low, box.high)
    if last is None:
        margins = high - low.gather(1, labels[:, None])
        return margins.scatter(1, labels[:, None], 0.0)
    weight, bias = network.parts[last.names["weight"]], last.tensor(network.parts, "bias")
    rows = weight[None] - weight[labels][:, None]  # [samples, classes, features]
    middle, radius = (low + high) / 2, (high - low) / 2
    margins = torch.einsum("bcf,bf->bc", rows, middle) + torch.einsum("bcf,bf->bc", rows.abs(), radius)
    return margins if bias is None else margins + bias - bias[labels][:, None]


def _through(layers: Sequence[Layer], parts: Tensors, low: Tensor, high: Tensor) -> Bounds:
    for layer in layers:
        low, high = _step(layer, parts, low, high)
    return low, high


def _step(layer: Layer, parts: Tensors, low: Tensor, high: Tensor) -> Bounds:
    kind = layer.kind
    if kind in ("relu", "flatten", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"):  # monotone
        return run([layer], parts, low), run([layer], parts, high)
    if kind == "residual":
        body, shortcut = (_through(branch, parts, low, high) for branch in (layer.body, layer.shortcut))
        return body[0] + shortcut[0], body[1] + shortcut[1]
    middle, radius = (low + high) / 2, (high - low) / 2
    if kind in ("linear", "conv2d"):
        center = run([layer], parts, middle)
        bare = Layer(kind, layer.input_shape, layer.output_shape, layer.options, {"weight": "weight"})
        spread = run([bare], {"weight": parts[layer.names["weight"]].abs()}, radius)
    else:
        scale, shift = scale_and_shift(layer, parts, low)
        shape = (-1, *(1,) * (low.ndim - 2))
        center, spread = middle * scale.view(shape) + shift.view(shape), radius * scale.abs().view(shape)
    return center - spread, center + spread
