"""FLIP's loss bounds: how much a defence can have changed the cross entropy, from logit differences alone.

Zhang et al., "FLIP: A Provable Defense Framework for Backdoor Mitigation in Federated Learning" (ICLR 2023), Theorem 1.
Let z be a sample's logits in the model without the defence, z' in the one with it, a = z' - z, and y the label; then

    min_j a_j - a_y  <=  L' - L  <=  max_j a_j - a_y          L' - L = lse_j(a_j + log p_j) - a_y

with p = softmax(z). On backdoored samples, y being the attacker's target, the lower bound wants to be 0: it can be no
more, since j = y is among the j. On clean samples the upper bound says what the defence costs at most.

Deviations. The paper states it for softmax regression, a = dW x; it holds for the logits of any network. The proof is
the mediant inequality on the two softmax denominators, the printed Cauchy-Schwarz is not needed. Two tighter bounds
come from the same identity: E_p[a] - a_y below (Jensen), and (max a - min a)^2 / 8 above that (Hoeffding's lemma).

Everything is float64, every lower bound rounded down and every upper bound rounded up, for the logits as given.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import logsumexp

from certify.bounds import Floats
from certify.flip.arrays import TINY, UNIT, bias, dot_error_upper, labels, logits, matrix
from tasks.errors import CertificationError


@dataclass(frozen=True, eq=False)
class LossBounds:
    """Bounds of the change of each sample's cross entropy [samples]; `tight_*` equal the others where p is unknown."""

    lower: Floats  # Theorem 1
    upper: Floats
    tight_lower: Floats
    tight_upper: Floats
    target_least: np.ndarray  # [samples] bool: the label is surely an argmin of a, so that lower is 0

    @property
    def sum_lower(self) -> float:
        """The sum of the lower bounds, as in the paper, rounded down."""
        return _outwards(self.lower, -math.inf)

    @property
    def sum_upper(self) -> float:
        """The sum of the upper bounds, rounded up."""
        return _outwards(self.upper, math.inf)

    @property
    def sum_tight_lower(self) -> float:
        """The sum of the tighter lower bounds, rounded down."""
        return _outwards(self.tight_lower, -math.inf)

    @property
    def sum_tight_upper(self) -> float:
        """The sum of the tighter upper bounds, rounded up."""
        return _outwards(self.tight_upper, math.inf)


def loss_bounds(before: Any, after: Any, label: Any) -> LossBounds:
    """Return the bounds for logits [samples, classes] of two models; `label` is one per sample or one for all.

    Raises `CertificationError` for shapes that do not fit and for numbers that are not finite.
    """
    first = logits("before", before)
    second = logits("after", after, first)
    change = second - first
    return _bounds(change, UNIT * np.abs(change) * 1.01, label, first)


def linear_loss_bounds(change: Any, inputs: Any, label: Any, *, bias_change: Any = None) -> LossBounds:
    """Return Theorem 1 as printed: `change` is W' - W [classes, features], `inputs` are [samples, ...].

    The model without the defence is not needed, so the tighter bounds are those of the theorem.
    """
    shift, errors = linear_change(change, inputs, bias_change)
    return _bounds(shift, errors, label, None)


def linear_change(change: Any, inputs: Any, bias_change: Any = None) -> tuple[Floats, Floats]:
    """Return a = dW x + db and upper bounds of its rounding errors, both [samples, classes]."""
    rows = logits("change", np.swapaxes(matrix("change", change), 0, 1)).T  # two classes or more
    design = matrix("inputs", inputs, rows.shape[1])
    offset = bias(bias_change, len(rows))
    sizes = np.abs(design) @ np.abs(rows).T + np.abs(offset)
    return design @ rows.T + offset, dot_error_upper(rows.shape[1] + 1, sizes)


def exact_loss_change(before: Any, after: Any, label: Any) -> Floats:
    """Return L' - L per sample by the identity above; log p comes from log-softmax, so nothing underflows."""
    first = logits("before", before)
    second = logits("after", after, first)
    at = labels(label, *first.shape)
    change = second - first
    log_p = first - np.asarray(logsumexp(first, axis=1, keepdims=True))
    return np.asarray(logsumexp(change + log_p, axis=1)) - change[np.arange(len(at)), at]


def _outwards(values: Floats, towards: float) -> float:
    """Return a sum rounded outwards; `fsum` rounds the exact sum once, and only a sum of 0 rounds to 0."""
    total = math.fsum(values)
    return math.nextafter(total, towards) if total else 0.0


def _bounds(change: Floats, errors: Floats, label: Any, before: Floats | None) -> LossBounds:
    at = labels(label, *change.shape)
    if not len(at):
        raise CertificationError("loss bounds want at least one sample, got none")
    rows = np.arange(len(at))
    gaps = change - change[rows, at][:, None]  # a_j - a_y
    off = errors + errors[rows, at][:, None] + 1.01 * UNIT * np.abs(gaps) + TINY
    off[rows, at] = gaps[rows, at] = 0.0
    low, high = np.nextafter(gaps - off, -np.inf), np.nextafter(gaps + off, np.inf)
    low[rows, at] = high[rows, at] = 0.0
    lower, upper = low.min(axis=1), high.max(axis=1)
    below, above = lower, upper
    if before is not None:
        mean, mean_off = _mean_gap(before, gaps, off)
        width = np.nextafter(high.max(axis=1) - low.min(axis=1), np.inf)
        spread = np.nextafter(width * width * (1 + 4 * UNIT) / 8, np.inf)
        below = np.maximum(lower, np.nextafter(mean - mean_off, -np.inf))
        above = np.minimum(upper, np.nextafter(np.nextafter(mean + mean_off, np.inf) + spread, np.inf))
    return LossBounds(lower, upper, below, above, np.asarray((low >= 0).all(axis=1)))


def _mean_gap(before: Floats, gaps: Floats, off: Floats) -> tuple[Floats, Floats]:
    """Return E_p[a_j - a_y] and a bound of its error.

    The exponent z_j - max z is off by one rounding, so p_j is off by |z_j - max z| roundings and a few more, relative;
    sum_j p_j |z_j - max z| <= log C, as an entropy is. What underflows is below the smallest normal number.
    """
    shifted = before - before.max(axis=1, keepdims=True)
    weights = np.exp(shifted)
    p = weights / weights.sum(axis=1, keepdims=True)
    num_classes = before.shape[1]
    relative = 4 * (2 * math.log(num_classes) + num_classes + 16) * UNIT
    worst = (np.abs(gaps) + off).max(axis=1)
    return (p * gaps).sum(axis=1), worst * (relative + num_classes * TINY) + (p * off).sum(axis=1) * 1.01 + TINY
