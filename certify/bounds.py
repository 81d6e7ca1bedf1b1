"""Confidence bounds on class probabilities from vote counts, in float64, each rounded to its safe side.

A smoothed classifier votes `num_draws` times per test point; `counts[..., c]` are the votes of class c.
A name ending in `_lower` is never above the quantity it bounds, one ending in `_upper` never below.

Sources: Hoeffding as in Xie et al., "CRFL" (ICML 2021), Algorithm CalculateBound; Clopper and Pearson
(Biometrika 1934), one-sided; selection before the bound as in Cohen et al., "Certified Adversarial Robustness
via Randomized Smoothing" (ICML 2019), Algorithm CERTIFY.

Deviations from CRFL: its printed pair bounds the two classes with most votes, each at alpha, on the draws that
chose them, so the pair fails with more than alpha and its pB covers the runner-up alone. `crfl_top_two` keeps that
for comparison; `two_stage` and `simultaneous` are the level-alpha certificates. All three abstain when pA <= pB,
which the released code does not. The released code also clamps pA up to 1e-8 and pB down to 1 - 1e-8; a clamp
above 0 is no bound any more, so it is off unless asked for.

The bound of one point holds with probability 1 - alpha. Noisy models shared by many points make their errors
dependent; `num_points=m` spends alpha/m on each, so that all m hold together under any dependence.
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from tasks.errors import CertificationError

ABSTAINED = -1  # the label of a point without a certificate
Interval = Literal["clopper_pearson", "hoeffding"]
Floats = NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# Where the incomplete beta function was compared with sums of 40-digit terms; its relative error stays below 1e-11.
_MAX_DRAWS = 10**7
_MIN_ALPHA = 1e-100
# Ten times that error, given away on alpha: it moves a bound by about 1e-12.
_TAIL_SLACK = 2.0**-33


@dataclass(frozen=True, eq=False)
class VoteBounds:
    """Per test point: the class certified to win, a lower bound of its probability, an upper bound of every other's."""

    label: NDArray[np.int64]  # ABSTAINED where pa_lower <= pb_upper
    pa_lower: Floats
    pb_upper: Floats
    alpha: float  # probability that the bounds of any of num_points points are wrong
    num_points: int
    method: str


def hoeffding_margin_upper(num_draws: int, alpha: float) -> float:
    """Return sqrt(ln(1/alpha) / (2 num_draws)), rounded up: Hoeffding's one-sided margin."""
    return math.sqrt(-math.log(_level(alpha)) / (2 * _draws(num_draws))) * (1 + 4 * _EPS)


def hoeffding_lower(successes: Any, num_draws: int, alpha: float, *, clamp: float = 0.0) -> Floats:
    """Return max(clamp, k/M - margin) per entry of `successes`; CRFL's code has clamp=1e-8, sound is 0."""
    share = _successes(successes, num_draws) / _draws(num_draws)
    return np.maximum(share - hoeffding_margin_upper(num_draws, alpha) - 2 * _EPS, _clamp(clamp))


def hoeffding_upper(successes: Any, num_draws: int, alpha: float, *, clamp: float = 0.0) -> Floats:
    """Return min(1 - clamp, k/M + margin) per entry of `successes`; CRFL's code has clamp=1e-8, sound is 0."""
    share = _successes(successes, num_draws) / _draws(num_draws)
    return np.minimum(share + hoeffding_margin_upper(num_draws, alpha) + 2 * _EPS, 1 - _clamp(clamp))


def clopper_pearson_lower(successes: Any, num_draws: int, alpha: float) -> Floats:
    """Return the one-sided Clopper-Pearson lower bound per entry: P(X >= k) <= alpha there; 0 for k=0."""
    counts, draws, level = _successes(successes, num_draws), _draws(num_draws), _level(alpha)
    values, inverse = np.unique(counts, return_inverse=True)  # at most num_draws + 1 inversions, however many points
    bound = np.zeros(values.shape)
    inner = (values > 0) & (values < draws)
    first, second = values[inner].astype(np.float64), (draws - values[inner] + 1).astype(np.float64)
    start = special.betaincinv(first, second, level * (1 - _TAIL_SLACK))
    bound[inner] = _retreat(start, -1, lambda p: special.betainc(first, second, p), level)
    exponent = math.log(level) / draws
    bound[values == draws] = math.exp(exponent) * (1 - _EPS * (4 - 2 * exponent))  # alpha^(1/M), its error taken off
    return np.maximum(bound, 0.0)[inverse].reshape(counts.shape)


def clopper_pearson_upper(successes: Any, num_draws: int, alpha: float) -> Floats:
    """Return the one-sided Clopper-Pearson upper bound per entry: P(X <= k) <= alpha there; 1 for k=M."""
    counts, draws, level = _successes(successes, num_draws), _draws(num_draws), _level(alpha)
    values, inverse = np.unique(counts, return_inverse=True)
    bound = np.ones(values.shape)
    inner = (values > 0) & (values < draws)
    first, second = (values[inner] + 1).astype(np.float64), (draws - values[inner]).astype(np.float64)
    start = special.betainccinv(first, second, level * (1 - _TAIL_SLACK))
    bound[inner] = _retreat(start, +1, lambda p: special.betaincc(first, second, p), level)
    bound[values == 0] = -math.expm1(math.log(level) / draws) * (1 + 8 * _EPS)  # 1 - alpha^(1/M), its error added
    return np.minimum(bound, 1.0)[inverse].reshape(counts.shape)


def alpha_share_lower(alpha: float, num_claims: int) -> float:
    """Return alpha / num_claims rounded down: what each of num_claims may fail with so that all hold at 1 - alpha."""
    return _level(math.nextafter(_level(alpha) / _whole("num_claims", num_claims), 0.0))


def two_stage(
    selection: Any, counts: Any, num_draws: int, alpha: float, *,
    num_points: int = 1, interval: Interval = "clopper_pearson",
) -> VoteBounds:  # fmt: skip
    """Return bounds of the class that leads `selection`, from independent `counts` ([..., classes]); pB = 1 - pA.

    Raises `CertificationError` when both arrays are the same memory: draws that choose the class must not bound it.
    """
    if np.shares_memory(_array(selection), _array(counts)):
        raise CertificationError("two_stage wants counts of fresh draws, got the selection itself; draw twice")
    votes = _votes(counts, num_draws)
    chosen = _votes(selection, _MAX_DRAWS)
    if chosen.shape != votes.shape or not (chosen.sum(axis=-1) > 0).all():
        wanted = f"at least one selection draw per point in the shape of the counts {votes.shape}"
        raise CertificationError(f"two_stage wants {wanted}, got shape {chosen.shape}")
    top = chosen.argmax(axis=-1)
    lower, _ = _interval(interval)
    pa_lower = lower(_at(votes, top), num_draws, alpha_share_lower(alpha, num_points))
    return _decide(top, pa_lower, _complement_upper(pa_lower), alpha, num_points, f"two_stage/{interval}")


def simultaneous(
    counts: Any, num_draws: int, alpha: float, *, num_points: int = 1, interval: Interval = "clopper_pearson"
) -> VoteBounds:
    """Return bounds from one sample, both sides of all C classes at alpha / 2C; pB = min(max of the others, 1 - pA)."""
    votes = _votes(counts, num_draws)
    level = alpha_share_lower(alpha, 2 * votes.shape[-1] * _whole("num_points", num_points))
    lower, upper = _interval(interval)
    top = votes.argmax(axis=-1)
    others = upper(votes, num_draws, level)
    np.put_along_axis(others, top[..., None], 0.0, axis=-1)
    pa_lower = lower(_at(votes, top), num_draws, level)
    pb_upper = np.minimum(others.max(axis=-1), _complement_upper(pa_lower))
    return _decide(top, pa_lower, pb_upper, alpha, num_points, f"simultaneous/{interval}")


def crfl_top_two(counts: Any, num_draws: int, alpha: float, *, num_points: int = 1, clamp: float = 0.0) -> VoteBounds:
    """Return CRFL's printed pair, Hoeffding at alpha for the top two classes: not a level-alpha certificate."""
    votes = _votes(counts, num_draws)
    level = _level(alpha) if num_points == 1 else alpha_share_lower(alpha, num_points)
    ranked = np.sort(votes, axis=-1)
    pa_lower = hoeffding_lower(ranked[..., -1], num_draws, level, clamp=clamp)
    pb_upper = hoeffding_upper(ranked[..., -2], num_draws, level, clamp=clamp)
    return _decide(votes.argmax(axis=-1), pa_lower, pb_upper, alpha, num_points, "crfl_top_two/hoeffding")


def _decide(
    top: NDArray[np.int64], pa_lower: Floats, pb_upper: Floats, alpha: float, num_points: int, method: str
) -> VoteBounds:
    label = np.where(pa_lower > pb_upper, top, ABSTAINED).astype(np.int64)
    return VoteBounds(label, pa_lower, pb_upper, alpha, num_points, method)


def _retreat(start: Floats, sign: int, tail: Callable[[Floats], Floats], alpha: float) -> Floats:
    """Step from `start` towards 0 (sign -1) or 1 (+1), doubling the step, until the binomial tail is below alpha."""
    limit = alpha * (1 - _TAIL_SLACK / 2)
    edge = 0.0 if sign < 0 else 1.0
    bound = np.nextafter(np.where(np.isnan(start), edge, start), edge)
    for step in range(60):
        wrong = ~(tail(bound) <= limit)
        if not wrong.any():
            return bound
        bound = np.where(wrong, np.clip(bound + sign * np.spacing(bound) * 2.0**step, 0.0, 1.0), bound)
    return np.full_like(bound, edge)  # says nothing, so it is right whatever the tail is


def _interval(name: str) -> tuple[Callable[..., Floats], Callable[..., Floats]]:
    if name == "clopper_pearson":
        return clopper_pearson_lower, clopper_pearson_upper
    if name == "hoeffding":
        return hoeffding_lower, hoeffding_upper
    raise CertificationError(f"unknown interval {name!r}; there are: clopper_pearson, hoeffding")


def _complement_upper(lower: Floats) -> Floats:
    """Return 1 - lower rounded up; the difference is exact from 1/2 on (Sterbenz)."""
    rest = 1.0 - lower
    return np.where(lower >= 0.5, rest, np.minimum(np.nextafter(rest, 2.0), 1.0))


def _at(votes: NDArray[np.int64], index: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.take_along_axis(votes, index[..., None], axis=-1)[..., 0]


def _array(counts: Any) -> NDArray[Any]:
    """Return counts as a numpy array; a torch tensor is recognised by its methods, so torch need not be installed."""
    return counts.detach().cpu().numpy() if hasattr(counts, "detach") else np.asarray(counts)


def _successes(counts: Any, num_draws: int) -> NDArray[np.int64]:
    """Return counts as int64 after checking that each is a whole number from 0 to num_draws."""
    array, draws = _array(counts), _draws(num_draws)
    if array.dtype.kind not in "iuf":
        raise CertificationError(f"counts must be whole numbers, got an array of {array.dtype}")
    if array.dtype.kind == "f" and not (np.isfinite(array) & (array == np.floor(array))).all():
        raise CertificationError("counts must be whole numbers, got NaN, infinity or a fraction")
    if array.size and not (array.min() >= 0 and array.max() <= draws):
        raise CertificationError(f"counts must be from 0 to {draws} draws, got {array.min()} to {array.max()}")
    return array.astype(np.int64)


def _votes(counts: Any, num_draws: int) -> NDArray[np.int64]:
    """Return counts [..., classes] after checking that no point has more votes than draws; fewer only loosen bounds."""
    votes = _successes(counts, num_draws)
    if votes.ndim < 1 or votes.shape[-1] < 2:
        raise CertificationError(f"counts must be [samples, classes] with 2 classes or more, got shape {votes.shape}")
    if votes.size and votes.sum(axis=-1).max() > num_draws:
        raise CertificationError(f"counts of a point sum to {votes.sum(axis=-1).max()}, more than {num_draws} draws")
    return votes


def _whole(name: str, value: Any, most: int = _MAX_DRAWS) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if isinstance(value, bool) or not 1 <= number <= most:
        raise CertificationError(f"{name} must be a whole number from 1 to {most}, got {value!r}")
    return number


def _draws(num_draws: int) -> int:
    return _whole("num_draws", num_draws)


def _level(alpha: float) -> float:
    if isinstance(alpha, bool) or not (isinstance(alpha, int | float) and _MIN_ALPHA <= alpha < 1):
        raise CertificationError(f"alpha must be inside (0, 1) and at least {_MIN_ALPHA}, got {alpha!r}")
    return float(alpha)


def _clamp(clamp: float) -> float:
    if not 0 <= clamp < 0.5:
        raise CertificationError(f"clamp must be at least 0 (sound) and below 1/2, got {clamp!r}")
    return clamp
