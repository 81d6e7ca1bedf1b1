"""How little a network must change for an edge-case backdoor: Theorem 1 of "Attack of the Tails", corrected.

Wang et al., NeurIPS 2020, section 3.

For a ReLU network f_W(x) = W_L relu(... relu(W_1 x)) let f_W(x + e(x)) be what the attacker wants on an edge case x: e
is an adversarial change of x. Changing the weights of one layer l alone does the same without touching x. With X the
inputs of layer l, a row for each clean sample and each edge case, of independent rows, and T the rows
W_l ((x + e)^(l) - x^(l)) for edge cases and 0 for clean samples, the change Delta of least norm that

    f_{W + Delta}(x) = f_W(x) on clean samples,    f_{W + Delta}(x) = f_W(x + e(x)) on edge cases

is Delta^T = X^T (X X^T)^{-1} T, and

    max |T_x| / |x^(l) - x'^(l)|  <=  |Delta|_2  <=  |Delta|_F
                                  <=  |T|_F / rho  <=  eps sqrt(edge cases) prod_{i<=l} |W_i|_2 / rho

where x runs over edge cases and x' over clean samples, rho is the least singular value of X and eps the longest e. The
lower bound holds for every change of layer l that does both, the upper ones for this one.

What the paper prints differs in two places, and as printed it does not hold: its lower bound has |W_l (x + e)^(l)| for
the numerator rather than the difference's norm, and its upper bound lacks the product of the layers' norms, so that it
needs all of them to be at most 1.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from certify.bounds import Floats
from tasks.errors import CertificationError

WORST_CONDITION = 1e8  # of X: beyond it the change that is found is not the one of the theorem


@dataclass(frozen=True)
class EdgeChange:
    """The least change of a layer that plants the backdoor, its norms and the bounds on them."""

    layer: int  # from 1
    change: Floats  # [outputs, inputs] of that layer
    lower: float  # for every change that does the same, in the spectral norm
    spectral: float
    frobenius: float
    upper: float  # |T|_F / rho, for this change
    upper_by_norms: float  # eps sqrt(edge cases) prod |W_i| / rho, which does not ask for e itself
    rho: float

    @property
    def holds(self) -> bool:
        """Whether the chain of inequalities holds, to nine digits."""
        chain = (self.lower, self.spectral, self.frobenius, self.upper, self.upper_by_norms)
        return all(a <= b * (1 + 1e-9) + 1e-12 for a, b in itertools.pairwise(chain))


def forward(weights: Sequence[Floats], inputs: Floats) -> Floats:
    """Return the outputs ``[samples, outputs]`` of a ReLU network without biases for ``[samples, inputs]``."""
    return layer_inputs(weights, inputs, len(weights)) @ weights[-1].T


def layer_inputs(weights: Sequence[Floats], inputs: Floats, layer: int) -> Floats:
    """Return what layer number `layer` (from 1) is given, ``[samples, its inputs]``."""
    values = np.asarray(inputs, np.float64)
    for weight in weights[: layer - 1]:
        values = np.maximum(values @ weight.T, 0.0)
    return values


def smallest_change(weights: Sequence[Floats], clean: Floats, edge: Floats, shifts: Floats, layer: int) -> EdgeChange:
    """Return the least change of a layer that gives each edge case the output of edge case + shift.

    `clean` [samples, inputs], `edge` and `shifts` [edge cases, inputs]. Raises `CertificationError` where the layer's
    inputs are not independent: it must have at least as many as there are samples.
    """
    if not 1 <= layer <= len(weights):
        raise CertificationError(f"the network has layers 1 to {len(weights)}, got {layer}")
    if edge.shape != shifts.shape or not len(edge) or not len(clean):
        raise CertificationError(
            f"wanted clean samples, and a shift for each edge case; got {clean.shape}, {edge.shape}"
        )
    weight = np.asarray(weights[layer - 1], np.float64)
    below, above = layer_inputs(weights, clean, layer), layer_inputs(weights, edge, layer)
    wanted = (layer_inputs(weights, edge + shifts, layer) - above) @ weight.T
    rows = np.concatenate([below, above])
    targets = np.concatenate([np.zeros((len(below), weight.shape[0])), wanted])
    singular = np.linalg.svd(rows, compute_uv=False)
    rho = float(singular[-1]) if len(rows) <= rows.shape[1] else 0.0
    if rho * WORST_CONDITION <= singular[0]:
        raise CertificationError(
            f"the {len(rows)} inputs of layer {layer} ({rows.shape[1]} wide) are not independent; take fewer samples "
            "or a wider layer"
        )
    change = np.asarray(np.linalg.lstsq(rows, targets, rcond=None)[0].T, np.float64)
    lengths = np.linalg.norm(wanted, axis=1)
    apart = np.linalg.norm(above[:, None] - below[None], axis=2)
    products = math.prod(float(np.linalg.norm(w, 2)) for w in weights[:layer])
    longest = float(np.linalg.norm(shifts, axis=1).max())
    return EdgeChange(
        layer=layer,
        change=change,
        lower=float((lengths / apart.min(axis=1)).max()),
        spectral=float(np.linalg.norm(change, 2)),
        frobenius=float(np.linalg.norm(change)),
        upper=float(np.linalg.norm(wanted)) / rho,
        upper_by_norms=longest * math.sqrt(len(edge)) * products / rho,
        rho=rho,
    )


def printed_bounds(
    weights: Sequence[Floats], clean: Floats, edge: Floats, shifts: Floats, layer: int, rho: float
) -> tuple[float, float]:
    """Return (lower, upper) as the paper prints them, to show where they fail."""
    below, above = layer_inputs(weights, clean, layer), layer_inputs(weights, edge, layer)
    moved = np.linalg.norm(layer_inputs(weights, edge + shifts, layer) @ np.asarray(weights[layer - 1]).T, axis=1)
    apart = np.linalg.norm(above[:, None] - below[None], axis=2)
    longest = float(np.linalg.norm(shifts, axis=1).max())
    return float((moved / apart.min(axis=1)).max()), longest * math.sqrt(len(edge)) / rho
