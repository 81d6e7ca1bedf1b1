"""The numbers of CRFL's theorems: what divergence a vote tolerates, and how noise shrinks divergence round by round.

Xie et al., "CRFL" (ICML 2021). Theorem 3: predictions agree while the Kullback-Leibler divergence of the two models'
laws is at most eps(pA, pB) = -log(1 - (sqrt(pA) - sqrt(pB))^2). Theorem 2: clipping to rho and noise sigma multiply a
divergence by at most 2 Phi(rho / sigma) - 1.

Deviation: the square in eps is symmetric, so the released code gives pA < pB a positive radius; here it is 0. Products
are sums of logarithms, as a radius may exceed 1e308 and 2 Phi(x) - 1 is 1.0 in float64 from x = 8.3 on.
"""

import math
from typing import Any

import numpy as np
from scipy import special

from certify.bounds import Floats
from tasks.errors import CertificationError

_UNIT = float(np.finfo(np.float64).eps) / 2


def divergence_budget_lower(pa_lower: Any, pb_upper: Any) -> Floats:
    """Return Theorem 3's eps(pA, pB), rounded down; 0 where pA <= pB, 34 and not infinite at pA = 1, pB = 0."""
    pa, pb = np.asarray(pa_lower, dtype=np.float64), np.asarray(pb_upper, dtype=np.float64)
    if not (((pa >= 0) & (pa <= 1)).all() and ((pb >= 0) & (pb <= 1)).all()):
        raise CertificationError("pA and pB must be probabilities")
    # (pa - pb) / (sqrt pa + sqrt pb) is the difference of the roots without their cancellation
    gap = np.maximum(pa - pb, 0.0) / np.maximum(np.sqrt(pa) + np.sqrt(pb), np.finfo(np.float64).tiny)
    with np.errstate(divide="ignore"):
        return -np.log1p(-np.square(gap * (1 - 4 * _UNIT))) * (1 - 4 * _UNIT)


def neyman_pearson_shift_lower(pa_lower: Any, pb_upper: Any) -> Floats:
    """Return (Phi^-1(pA) - Phi^-1(pB)) / 2, rounded down: the shift of a Gaussian, in its deviations, that keeps A."""
    pa, pb = np.asarray(pa_lower, dtype=np.float64), np.asarray(pb_upper, dtype=np.float64)
    high, low = special.ndtri(pa), special.ndtri(pb)
    with np.errstate(invalid="ignore"):
        shift = (high - low) / 2 - 32 * _UNIT * (np.abs(high) + np.abs(low))
    shift = np.where(np.isinf(high) & np.isinf(low) & (high > low), np.inf, shift)
    return np.where(pa > pb, np.maximum(np.nan_to_num(shift, nan=0.0, posinf=np.inf), 0.0), 0.0)


def log_contraction_upper(clip_norm: float | None, noise: float) -> float:
    """Return log(2 Phi(rho / sigma) - 1), rounded up to at most 0; 0 without a clip or without noise."""
    if clip_norm is None or noise == 0:
        return 0.0
    ratio = clip_norm / noise / math.sqrt(2)
    exact = math.log(math.erf(ratio)) if ratio < 0.5 else math.log1p(-math.erfc(ratio))
    roundings = 16 + 4 * min(ratio, 40.0) ** 2  # erfc turns a relative error of x into one of 2 x^2
    return min(0.0, exact + abs(exact) * roundings * _UNIT + 1e-300)


def exp_or_infinity(logarithm: Any) -> Floats:
    """Return exp, and infinity where float64 has no room."""
    with np.errstate(over="ignore"):
        return np.exp(np.asarray(logarithm, dtype=np.float64))
