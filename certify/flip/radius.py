"""How far a recovered trigger may be from the true one: the radius that replaces FLIP's Theorem 2.

Zhang et al., "FLIP" (ICLR 2023), Theorem 2, gives r <= F(0) / (sqrt(d) ||g||_2) with F(0) = sum_s(min_j a_sj - a_st).
As printed it certifies nothing: F(0) <= 0 always, and where it is 0 for every sample, the only useful case, g is 0 too.
It also keeps argmin_j fixed while the trigger moves, which is unsound.

What holds, per sample: let x^ be the sample with the recovered trigger, dW the fixed difference of the two models'
weights (db of their biases), t the target. For every x with ||x^ - x||_inf <= r,

    r = min over j != t of  [(dW x^ + db)_j - (dW x^ + db)_t] / ||dW_j - dW_t||_1

the target is an argmin of dW x + db. Hence Theorem 1's lower bound is 0 at the true trigger, the loss towards the
target does not fall, p'_t <= p_t, and a sample that was no accepted attack before is none after, at any tau. The l1
norm is dual to the l-infinity ball, so r is the largest such number; sqrt(d) ||.||_2 in its place is valid and smaller.
Where the trigger can only be inside some cells, the norm runs over those (`support`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify.bounds import Floats
from certify.flip.arrays import TINY, UNIT, bias, dot_error_upper, labels, logits, matrix
from tasks.errors import CertificationError


@dataclass(frozen=True, eq=False)
class RecoveryRadius:
    """Per sample the radius, rounded down (infinite where no trigger can matter), and the class that limits it."""

    radius: Floats  # [samples], l-infinity, the ball closed; 0: no certificate
    limiting: NDArray[np.int64]  # [samples]
    target: NDArray[np.int64]  # [samples]

    @property
    def certified(self) -> NDArray[np.bool_]:
        """Which samples have a radius above 0."""
        return self.radius > 0


def recovery_radius(
    change: Any, recovered: Any, target: Any, *, bias_change: Any = None, support: Any = None
) -> RecoveryRadius:
    """Return the radius of samples with the recovered trigger [samples, ...] under `change` = W' - W [classes, ...].

    `support` ([features] bool): the cells in which the true input may differ. Raises `CertificationError`.
    """
    gaps, off, norms, to = _terms(change, recovered, target, bias_change, support, 1)
    return _smallest(gaps, off, norms, to)


def printed_norm_radius(change: Any, recovered: Any, target: Any, *, bias_change: Any = None) -> RecoveryRadius:
    """Return the radius with the paper's denominator sqrt(d) ||.||_2: valid, and never above `recovery_radius`."""
    gaps, off, norms, to = _terms(change, recovered, target, bias_change, None, 2)
    return _smallest(gaps, off, norms, to)


def worst_errors(change: Any, found: RecoveryRadius, radius: Any, *, support: Any = None) -> Floats:
    """Return, per sample, the error x^ - x of size `radius` [samples] that favours the limiting class the least.

    It is a vertex of the cube: radius times the sign of dW_j - dW_t, j the limiting class.
    """
    rows = matrix("change", change)
    allowed = _support(support, rows.shape[1])
    signs = np.sign(rows[found.limiting] - rows[found.target]) * allowed
    return signs * np.asarray(radius, dtype=np.float64).reshape(-1, 1)


def _terms(
    change: Any, recovered: Any, target: Any, bias_change: Any, support: Any, order: int
) -> tuple[Floats, Floats, Floats, NDArray[np.int64]]:
    """Return a_j - a_t, bounds of its error, and norms of dW_j - dW_t rounded up, all [samples, classes]; targets."""
    rows = logits("change", matrix("change", change).T).T
    num_classes, num_features = rows.shape
    design, offset = matrix("recovered", recovered, num_features), bias(bias_change, num_classes)
    to, allowed = labels(target, len(design), num_classes), _support(support, num_features)
    gaps, off, norms = (np.zeros((len(design), num_classes)) for _ in range(3))
    for each in np.unique(to):  # all samples of one target at once
        chosen = to == each
        difference, moved = rows - rows[each], offset - offset[each]
        gaps[chosen] = design[chosen] @ difference.T + moved
        sizes = np.abs(design[chosen]) @ np.abs(difference).T + np.abs(moved)
        same = ~difference.any(axis=1) & (moved == 0)  # as of the target itself: a gap of exactly 0
        off[chosen] = np.where(same, 0.0, dot_error_upper(num_features + 1, sizes))
        norms[chosen] = _norms_upper(difference * allowed, order)
    return gaps, off, norms, to


def _norms_upper(difference: Floats, order: int) -> Floats:
    """Return ||.||_1, or sqrt(d) ||.||_2, of each row, rounded up; 0 for a row of zeros alone."""
    num_features = difference.shape[1]
    if order == 1:
        return np.abs(difference).sum(axis=1) * (1 + (num_features + 4) * UNIT)
    peak = np.abs(difference).max(axis=1, keepdims=True)
    scaled = difference / np.where(peak > 0, peak, 1.0)
    squares = np.sqrt(num_features * (scaled**2).sum(axis=1)) * peak[:, 0]
    return np.where(peak[:, 0] > 0, squares * (1 + (2 * num_features + 8) * UNIT) + TINY, 0.0)


def _smallest(gaps: Floats, off: Floats, norms: Floats, to: NDArray[np.int64]) -> RecoveryRadius:
    sure = gaps - off
    sure -= np.abs(sure) * 2 * UNIT
    with np.errstate(divide="ignore", over="ignore"):
        quotients = np.nextafter(np.where(norms > 0, sure, 0.0) / np.where(norms > 0, norms, 1.0), -np.inf)
    # without a denominator the class's lead over the target is the same for every trigger
    quotients = np.where(norms > 0, quotients, np.where(sure >= 0, np.inf, -np.inf))
    quotients[np.arange(len(to)), to] = np.inf
    limiting = quotients.argmin(axis=1).astype(np.int64)
    least = quotients[np.arange(len(to)), limiting]
    return RecoveryRadius(np.maximum(least, 0.0), limiting, to)


def _support(support: Any, num_features: int) -> NDArray[np.bool_]:
    if support is None:
        return np.ones(num_features, dtype=bool)
    array = np.asarray(support.detach().cpu().numpy() if hasattr(support, "detach") else support)
    if array.dtype != np.bool_ or array.size != num_features:
        raise CertificationError(f"support must be {num_features} truth values, got {array.dtype} {array.shape}")
    return array.reshape(-1)
