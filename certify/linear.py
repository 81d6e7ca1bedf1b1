"""Softmax regression, the model whose certificates have closed forms: logits, exact margins, constants of its loss.

With z = W x + b and parameters w = (W, b) as one vector, a change of w by s in l2 changes z_A - z_c by at most
sqrt(2) s ||x~||, and some change attains it; x~ = (x, 1) where there is a bias and x otherwise. So the margin over
sqrt(2) ||x~|| is the exact distance, in parameters, to another prediction.

The loss is the cross entropy of one sample; its gradient is (p - e_y) x~^T. With ||x~|| <= X~ and ||w|| <= rho:
its norm is at most sqrt(2) X~, its Hessian at most X~^2 / 2, and a change of x by d changes it by at most
(sqrt(2) + rho X~ / 2) d, as the Jacobian of softmax has norm at most 1/2 and ||p - e_y|| <= sqrt(2).

Lemma 1 of Xie et al., "CRFL" (ICML 2021), has sqrt(2 + 2 rho + rho^2) for the last; that needs ||x|| <= 1, which is
not said there and does not hold for pixels: at rho = 3 MNIST's images reach 14, the lemma says 4.12.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify.bounds import ABSTAINED, Floats
from certify.network import Network
from tasks.errors import CertificationError

_UNIT = float(np.finfo(np.float64).eps) / 2
_TINY = float(np.finfo(np.float64).tiny)
SQRT2_UPPER = math.nextafter(math.sqrt(2.0), 2.0)


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Weights [classes, features] and bias [classes] (or None) of a softmax regression, in float64."""

    weight: Floats
    bias: Floats | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "weight", _float64(self.weight))
        shape = self.weight.shape
        if len(shape) != 2 or shape[0] < 2 or shape[1] < 1 or not np.isfinite(self.weight).all():
            raise CertificationError(f"weight must be finite numbers [2 classes or more, features], got shape {shape}")
        if self.bias is not None:
            object.__setattr__(self, "bias", _float64(self.bias))
            if self.bias.shape != shape[:1] or not np.isfinite(self.bias).all():
                raise CertificationError(f"bias must be {shape[0]} finite numbers, got shape {self.bias.shape}")

    @staticmethod
    def from_network(network: Network) -> "LinearModel":
        """Return the one linear layer of `network`; anything else in it but flatten raises `CertificationError`."""
        layers = [layer for layer in network.layers if layer.kind != "flatten"]
        if [layer.kind for layer in layers] != ["linear"]:
            kinds = ", ".join(layer.kind for layer in network.layers)
            raise CertificationError(f"a linear model is one linear layer after flatten, this one has: {kinds}")
        weight, bias = (layers[0].tensor(network.tensors(), role) for role in ("weight", "bias"))
        return LinearModel(_float64(weight), None if bias is None else _float64(bias))

    @property
    def num_classes(self) -> int:
        return self.weight.shape[0]

    @property
    def num_features(self) -> int:
        return self.weight.shape[1]

    def design(self, inputs: Any) -> Floats:
        """Return inputs [points, ...] as float64 [points, features]."""
        array = _float64(inputs)
        if array.ndim < 2 or math.prod(array.shape[1:]) != self.num_features or not np.isfinite(array).all():
            raise CertificationError(f"inputs must be finite, {self.num_features} numbers each, got {array.shape}")
        return array.reshape(len(array), -1)

    def logits(self, design: Floats) -> tuple[Floats, Floats]:
        """Return logits and upper bounds of their rounding errors, both [points, classes]."""
        logits = design @ self.weight.T
        if self.bias is not None:
            logits += self.bias
        # the absolute part: products and sums below the normal numbers, each off by less than the smallest of them
        return logits, self._roundings * self.norm_upper(design)[:, None] + 2 * (self.num_features + 2) * _TINY

    @cached_property
    def _roundings(self) -> Floats:
        """Per class, a bound of the rounding error by ||x~||: gamma_n sum |w_j x_j|, by Cauchy and Schwarz.

        n counts a logit's products and sums, and the subtractions that make a margin of it.
        """
        terms = (self.num_features + 4) * _UNIT
        rows = self.weight if self.bias is None else np.column_stack([self.weight, self.bias])
        return _row_norms_upper(rows) * (1.01 * terms / (1 - terms))

    def norm_upper(self, design: Floats) -> Floats:
        """Return ||x~|| per point, rounded up."""
        norms = _row_norms_upper(design)
        return norms if self.bias is None else np.hypot(norms, 1.0) * (1 + 4 * _UNIT)

    def shifts_lower(self, inputs: Any) -> tuple[NDArray[np.int64], Floats]:
        """Return per point the label and the l2 distance in parameters to another label, rounded down.

        No change of (W, b) shorter than that distance changes the label; without one it is ABSTAINED and 0, as for an
        input of zeros without bias, whose logits tie in every model.
        """
        design = self.design(inputs)
        logits, errors = self.logits(design)
        rows = np.arange(len(design))
        top = logits.argmax(axis=1)
        margins = (logits[rows, top] - errors[rows, top])[:, None] - logits - errors
        margins[rows, top] = np.inf
        least, norms = margins.min(axis=1), self.norm_upper(design)
        sure = (least > 0) & (norms > 0) & np.isfinite(norms)  # NaN, from logits beyond float64, is not
        with np.errstate(over="ignore"):
            shift = np.where(sure, least, 0.0) / np.where(sure, SQRT2_UPPER * norms, 1.0) * (1 - 8 * _UNIT)
        shift = np.nextafter(np.nan_to_num(shift, posinf=np.finfo(np.float64).max), 0.0)
        return np.where(shift > 0, top, ABSTAINED).astype(np.int64), shift


def _row_norms_upper(rows: Floats) -> Floats:
    """Return the l2 norm of each row, rounded up; 0 for a row of zeros alone, and no square under- or overflows."""
    peaks = np.abs(rows).max(axis=1)
    if ((peaks > 1e-140) & (peaks < 1e140) | (peaks == 0)).all():
        return np.sqrt(np.einsum("nd,nd->n", rows, rows)) * (1 + (rows.shape[1] + 4) * _UNIT)
    scaled = rows / np.where(peaks > 0, peaks, 1.0)[:, None]
    with np.errstate(over="ignore"):
        norms = np.sqrt(np.einsum("nd,nd->n", scaled, scaled)) * (1 + (rows.shape[1] + 8) * _UNIT) * peaks
    return np.where(peaks > 0, np.nextafter(norms, np.inf), 0.0)


def lifted_norm_upper(data_norm: float, bias: bool) -> float:
    """Return X~: the norm of (x, 1) where there is a bias, for ||x|| <= `data_norm`, rounded up."""
    return math.hypot(data_norm, 1.0) * (1 + 4 * _UNIT) if bias else data_norm


def gradient_norm_upper(data_norm: float, bias: bool) -> float:
    """Return sqrt(2) X~, a bound of the loss's gradient; twice that bounds the change by replacing a sample."""
    return SQRT2_UPPER * lifted_norm_upper(data_norm, bias)


def smoothness_upper(data_norm: float, bias: bool) -> float:
    """Return X~^2 / 2, a bound of the loss's second derivative in the parameters."""
    return lifted_norm_upper(data_norm, bias) ** 2 / 2 * (1 + 4 * _UNIT)


def lipschitz_upper(parameter_norm: float, data_norm: float, bias: bool) -> float:
    """Return sqrt(2) + rho X~ / 2: how much the gradient changes per unit of change of x, its label kept."""
    return (SQRT2_UPPER + parameter_norm * lifted_norm_upper(data_norm, bias) / 2) * (1 + 4 * _UNIT)


def lipschitz_as_printed(parameter_norm: float) -> float:
    """Return sqrt(2 + 2 rho + rho^2), CRFL's Lemma 1; a bound only where ||x|| <= 1."""
    return math.sqrt(2 + 2 * parameter_norm + parameter_norm**2)


def _float64(values: Any) -> Floats:
    """Return a numpy array or torch tensor as contiguous float64 on the CPU."""
    array = values.detach().cpu().numpy() if hasattr(values, "detach") else values
    return np.ascontiguousarray(array, dtype=np.float64)
