"""Exact votes of a softmax regression under parameter noise, by quadrature: nothing is drawn, so alpha is 0.

With W ~ N(w, sigma^2 I), bias included, the logits of one input are independent Gaussians N(z_c, s^2) with
s = sigma sqrt(||x||^2 + 1), and class c wins with probability

    p_c = int phi(v - z_c/s) prod_{k != c} Phi(v - z_k/s) dv.

This replaces the sampling of Xie et al., "CRFL" (ICML 2021), Algorithm 2, where the model is linear.

One grid serves all classes: v from max_c z_c/s - 9 to + 9. The leader lies below it with probability Phi(-9), and a
class that wins above it lies above the leader's mean by 9. The trapezoid rule with step h errs by at most
2 p_c / (exp(2 pi^2 / (h^2 C)) - 1): the integrand is entire, and a distance a off the real line each of its C factors
grows by at most exp(a^2 / 2), so that a = 2 pi / (h C) gives the bound; h is chosen for 1e-15. Errors are thus
relative, but for the ends of the grid, and pA is best taken from the others: 1 minus their sum.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import special

from certify.bounds import ABSTAINED, Floats, VoteBounds
from certify.linear import LinearModel
from tasks.errors import CertificationError

_REACH = 9.0  # half the width of the grid
_AHEAD = 17.0  # a logit this far behind the leader wins with probability Phi(-12), 2e-33
_QUADRATURE = 1e-15
_TAILS = 4 * float(special.ndtr(-_REACH))  # the ends of the grid, and the classes left out
_PHI = 4e-14  # relative error of scipy's ndtr and numpy's exp on the grid; a test holds them against 40 digits
_PAIRS = 1024  # (point, class) pairs at once: 0.6 MB per array, which stays in the cache
_UNIT = float(np.finfo(np.float64).eps) / 2


@dataclass(frozen=True, eq=False)
class ExactVotes:
    """Probabilities that each class wins a vote, and bounds of their errors, both [points, classes]."""

    probabilities: Floats
    error_upper: Floats
    sigma: float


def exact_votes(model: LinearModel, inputs: object, sigma: float) -> ExactVotes:
    """Return the vote probabilities of `model` under N(0, sigma^2) on every parameter, for inputs [points, ...]."""
    if not (math.isfinite(sigma) and sigma > 0):
        raise CertificationError(f"exact votes want sigma above 0, got {sigma!r}; without noise use margins")
    design = model.design(inputs)
    logits, errors = model.logits(design)
    scale = sigma * model.norm_upper(design)
    if not (scale > 0).all():
        raise CertificationError("an input of zeros gets no noise in a model without bias; its votes are not exact")
    probabilities = argmax_probabilities(logits, scale)
    relative, ends = quadrature_error_upper(model.num_classes)
    off = _gap_error_upper(model, logits, errors, scale)
    return ExactVotes(probabilities, probabilities * relative + (off + ends)[:, None], sigma)


def exact_bounds(votes: ExactVotes) -> VoteBounds:
    """Return pA and pB of exact votes, each on its safe side; alpha is 0."""
    probabilities, errors = votes.probabilities, votes.error_upper
    rows, top = np.arange(len(probabilities)), probabilities.argmax(axis=1)
    others = np.nextafter(probabilities + errors, 2.0)
    others[rows, top] = 0.0
    rest = others.sum(axis=1) * (1 + 2 * probabilities.shape[1] * _UNIT)
    direct = probabilities[rows, top] - errors[rows, top]
    lower = np.clip(np.nextafter(np.maximum(direct, 1.0 - rest), -1.0), 0.0, 1.0)
    upper = np.minimum(others.max(axis=1), 1.0)
    label = np.where(lower > upper, top, ABSTAINED).astype(np.int64)
    return VoteBounds(label, lower, upper, 0.0, len(label), "exact/quadrature")


def _gap_error_upper(model: LinearModel, logits: Floats, errors: Floats, scale: Floats) -> Floats:
    """Return per point how much rounded logits and scales move any probability.

    A gap of two logits that is off by e moves a probability by e times the density of a tie of the two for the lead,
    which is at most exp(-a^2 / 4) / (2 sqrt(pi)), a being the leader's gap to the second, in scales.
    """
    ranked = np.sort(logits, axis=1)
    lead = (ranked[:, -1] - ranked[:, -2]) / scale
    moved = 2 * errors.max(axis=1) / scale + _AHEAD * (model.num_features + 60) * _UNIT
    density = np.exp(-np.square(np.maximum(lead * (1 - 1e-9) - 2 * moved, 0.0)) / 4) / (2 * math.sqrt(math.pi))
    return model.num_classes * moved * density


def argmax_probabilities(logits: Floats, scale: Floats) -> Floats:
    """Return P(z_c + scale noise_c is the greatest) for logits [points, classes] and scale [points]."""
    grid, step = _grid(logits.shape[1])
    behind = (logits.max(axis=1, keepdims=True) - logits) / scale[:, None]
    points, classes = np.nonzero(behind < _AHEAD)
    probabilities = np.zeros(behind.shape)
    for first, last in _slices(points):
        rows, cols = points[first:last], classes[first:last]
        values = behind[rows, cols][:, None] + grid
        below = special.ndtr(values)
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        product = np.multiply.reduceat(below, starts, axis=0)[np.cumsum(np.diff(rows, prepend=rows[0]) != 0)]
        density = np.exp(-0.5 * values * values) / below  # below is at least Phi(-9)
        probabilities[rows, cols] = np.einsum("nj,nj->n", density, product)
    return np.minimum(probabilities * (step / math.sqrt(2 * math.pi)), 1.0)


def quadrature_error_upper(num_classes: int) -> tuple[float, float]:
    """Return bounds of the error of `argmax_probabilities`: relative (step, rounding), and absolute (ends)."""
    grid, _ = _grid(num_classes)
    left_out = num_classes * float(special.ndtr(_REACH - _AHEAD))  # factors that are not quite 1
    return 2 * _QUADRATURE + left_out + (num_classes + 1) * _PHI + (len(grid) + 4 * num_classes) * _UNIT, _TAILS


def _grid(num_classes: int) -> tuple[Floats, float]:
    """Return the nodes, relative to the leader, and the step for an error of at most 1e-15."""
    widest = math.pi * math.sqrt(2 / (num_classes * math.log(2 / _QUADRATURE)))
    nodes = math.ceil(2 * _REACH / widest) + 1
    return np.linspace(-_REACH, _REACH, nodes), 2 * _REACH / (nodes - 1)


def _slices(points: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return ranges of about `_PAIRS` pairs that never part the pairs of one point."""
    starts = np.append(np.flatnonzero(np.diff(points, prepend=-1)), len(points))
    cuts = [0]
    while cuts[-1] < len(points):
        place = int(np.searchsorted(starts, cuts[-1] + _PAIRS, side="right")) - 1
        cuts.append(int(starts[place]) if starts[place] > cuts[-1] else int(starts[place + 1]))
    return list(itertools.pairwise(cuts))
