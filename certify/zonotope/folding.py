"""Normalisations as linear maps: merged into the convolution or linear layer before, or a scale of their own.

What is bounded are then weights that were computed, not stored, and their rounding has to be bounded like that of
everything else: the shift -mean * scale + bias may be a small difference of large numbers, off by far more than its own
last bits. So each map carries an `Origin`, the magnitudes before anything cancels. Count the roundings, sqrt halving
errors: variance, eps and their sum 3 / 2; rsqrt at most 4 (CUDA's float32: 2 ulp); weight, twice; then the layer's own
weight or the mean, twice; two sums: less than 13.
"""

from dataclasses import replace

import torch
from torch import Tensor

from certify.layers import Layer, Tensors, scale_and_shift
from certify.zonotope.ops import Conv, Linear, Origin, Scale

FOLDED = 16  # roundings of a number that a normalisation was folded into, at most


def normalised(layer: Layer, tensors: Tensors, like: Tensor) -> Scale:
    """Return a layer `normalise`, `affine` or `batch_norm` as a map of its own."""
    scale, shift = scale_and_shift(layer, tensors, like)
    shape = (-1, *(1,) * (len(layer.input_shape) - 1))
    origin = None
    if layer.kind != "affine":  # whose numbers are stored
        origin = _origin(layer, tensors, scale, torch.ones_like(scale)[:, None], None)
    return Scale(scale.view(shape), shift.view(shape), origin)


def folded(before: Linear | Conv, layer: Layer, tensors: Tensors) -> Linear | Conv:
    """Return `before` with the `batch_norm` after it merged into it; `before` must have stored weights."""
    scale, shift = scale_and_shift(layer, tensors, before.weight)
    weight = before.weight * scale.view(-1, *(1,) * (before.weight.ndim - 1))
    bias = shift if before.bias is None else before.bias * scale + shift
    origin = _origin(layer, tensors, scale, before.weight, before.bias)
    return replace(before, weight=weight, bias=bias, origin=origin)


def _origin(layer: Layer, tensors: Tensors, scale: Tensor, weight: Tensor, bias: Tensor | None) -> Origin:
    """Return the magnitudes of what was scaled, weight [channels, ...] and bias, and of what was added."""
    scale, weight = scale.detach().abs(), weight.detach().abs().flatten(1)
    facts = torch.finfo(scale.dtype)
    added = torch.zeros_like(scale)
    if layer.kind == "normalise":
        mean, divisor = (scale.new_tensor(layer.options[key]).abs() for key in ("mean", "std"))
        lost = torch.ones_like(scale)
    else:
        mean = tensors[layer.names["running_mean"]].detach().abs()
        divisor = tensors[layer.names["running_var"]].detach() + layer.options["eps"]
        lost = 1 + divisor.rsqrt()  # the weight underflows before it is scaled, or after
        if (shift := layer.tensor(tensors, "bias")) is not None:
            added = shift.detach().abs()
    inside = mean if bias is None else mean + bias.detach().abs()
    count = weight.shape[1]
    # by underflow, times the smallest normal number: of what is scaled, of the scale itself, of the products
    loose = 2 * (scale * (2 * count + 4) + lost * (weight.sum(1) + inside) + count + 4)
    # a divisor that may have underflowed is off by any factor; NaN, of a negative variance, is not above either
    safe = divisor >= 8 * facts.tiny / facts.eps
    magnitude = torch.where(safe, inside * scale + added, torch.full_like(scale, torch.inf))
    return Origin(magnitude, loose, FOLDED)
