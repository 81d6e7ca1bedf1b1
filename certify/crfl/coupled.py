"""How far an attack can move the released model: the bound behind the sound certificates, for the one run there was.

Take the run twice, with the same start, batches and noise, and let attackers change samples in one of them. A gradient
step of rate eta <= 2 / beta on a convex, beta-smooth loss brings two models no further apart, nor do averaging with
weights that sum to at most 1 and clipping to a ball. So the final models differ by at most

    Delta = sum_{i <= R} p_i gamma_i sum_steps eta_i (q_B / n_B) G_i,

G being a bound of the change of one sample's gradient; p_i |gamma_i - 1| ||u_i|| more per attacker whose honest
counterpart would not scale its update u_i. This is the argument of uniform stability (Hardt, Recht,
Singer, ICML 2016) in place of Theorem 2 of CRFL (Xie et al., ICML 2021): no factor 2, no Pi, no sqrt(R), and it speaks
of the released model, not of an average over trainings.

G for softmax regression (`certify.linear`): L ||d|| where features change by d, sqrt(2) X~ more where the label may
change too, 2 sqrt(2) X~ where the sample may be replaced by any other. L = sqrt(2) + rho X~ / 2 needs a bound rho of
the attacked run's local models: the recorded ones stay within the recorded norm of the start plus sum eta sqrt(2) X~,
and the attacked ones within their distance of these, which multiplies Delta by at most exp(||d|| sum eta (q_B / n_B)
X~ / 2). X bounds the inputs of the recorded run; the attacker's changed inputs may be longer (not where replaced).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from certify.bounds import Floats
from certify.crfl.corollary import log_contractions, with_poisoned, worst_clients
from certify.crfl.training_record import ClientWork, TrainingRecord
from certify.linear import gradient_norm_upper, lifted_norm_upper, lipschitz_upper
from tasks.errors import CertificationError

_SLACK = 1e-12  # relative; a sum of thousands of float64 terms errs by less


@dataclass(frozen=True)
class Deviation:
    """Delta as a function of ||d||: exp(growth ||d||) (linear ||d|| + constant)."""

    linear: float
    constant: float
    growth: float

    def upper(self, change_norm: Floats | float) -> Floats:
        """Return Delta for changes of norm `change_norm`, rounded up."""
        change = np.asarray(change_norm, dtype=np.float64)
        with np.errstate(over="ignore"):
            return np.exp(self.growth * change) * (self.linear * change + self.constant) * (1 + _SLACK)

    def change_lower(self, shift: Floats) -> Floats:
        """Return the largest ||d|| whose Delta is below `shift`, rounded down; 0 where even d = 0 reaches it."""
        shift = np.asarray(shift, dtype=np.float64)
        low = np.zeros(shift.shape)
        if self.linear == 0:
            return np.where(shift > self.upper(0.0), np.inf, 0.0)
        endless = np.isposinf(shift)
        high = np.where(endless, 0.0, np.maximum(shift - self.constant, 0.0) / self.linear)
        for _ in range(120):  # bisection; `low` always holds, and without growth the first middles close in on `high`
            middle = (low + high) / 2
            holds = self.upper(middle) < shift
            low, high = np.where(holds, middle, low), np.where(holds, high, middle)
        return np.where(endless, np.inf, np.where(self.upper(low) < shift, low, 0.0))


def deviation(
    record: TrainingRecord, attackers: Sequence[ClientWork], start_norm: float, replaced: bool = False
) -> Deviation:
    """Return the bound of the distance between the final models, recorded and attacked."""
    norm, bias = record.data_norm_bound, record.bias
    gradient, lifted = gradient_norm_upper(norm, bias), lifted_norm_upper(norm, bias)
    linear = constant = growth = 0.0
    for work in attackers:
        reach, change, growths = start_norm, 0.0, 0.0
        for count, size in zip(work.poisoned, work.batch_sizes, strict=True):
            part = work.learning_rate * count / size
            change += part * lipschitz_upper(reach, norm, bias)
            growths += part * lifted / 2
            reach += work.learning_rate * gradient
        sent = work.weight * record.server_lr * work.scale
        moved = sent * work.learning_rate * work.poisoned_share * gradient
        linear += 0.0 if replaced else sent * change
        constant += 2 * moved if replaced else moved * record.label_flips
        if not record.counterpart_scaled and work.scale != 1:
            if work.update_norm is None:
                raise CertificationError(f"client {work.client} has no update_norm in the record, and scales it")
            constant += work.weight * record.server_lr * abs(work.scale - 1) * work.update_norm
        growth = max(growth, 0.0 if replaced else growths)
    up = 1 + _SLACK
    return Deviation(linear * up, constant * up, growth * up)


def feature_radius(record: TrainingRecord, shift: Floats, start_norm: float) -> Floats:
    """Return per point the ||d|| below which the final model moves less than `shift`; 0: not even label flips."""
    return deviation(record, record.attacking, start_norm).change_lower(shift)


def sample_radius(
    record: TrainingRecord, shift: Floats, start_norm: float, change_norm: float | None
) -> NDArray[np.int64]:
    """Return the largest q_B per point, samples changed by `change_norm` or replaced at will (None) in each batch."""
    most = max(size for work in record.attacking for size in work.batch_sizes)
    groups = [[with_poisoned(work, count) for work in record.attacking] for count in range(1, most + 1)]
    return _largest(record, groups, shift, start_norm, change_norm)


def client_radius(
    record: TrainingRecord, shift: Floats, start_norm: float, change_norm: float | None
) -> NDArray[np.int64]:
    """Return the largest number of attackers per point, whichever clients they are, armed like the recorded ones."""

    def cost(work: ClientWork) -> float:
        return float(_moved(record, [work], start_norm, change_norm))

    return _largest(record, worst_clients(record, cost), shift, start_norm, change_norm)


def amplified_divergence_upper(record: TrainingRecord, deviation_upper: float) -> float:
    """Return a bound of the divergence between the laws of the noisy final models, over all trainings.

    Noise of later rounds hides the deviation ("privacy amplification by iteration", Feldman, Mironov, Talwar,
    Thakurta, FOCS 2018): Delta^2 / (2 sum_{tadv <= t <= k} sigma_t^2), times Theorem 2's contraction from round k on,
    for the best k. True of the marginal law alone: votes must come from independent trainings.
    """
    variance, best = 0.0, math.inf
    for number in range(record.attack_round, record.num_rounds + 1):
        variance += record.noise(number) ** 2
        if variance > 0:
            hidden = 2 * math.log(deviation_upper) - math.log(2 * variance) if deviation_upper > 0 else -math.inf
            best = min(best, hidden + log_contractions(record, number))
    return math.exp(best) * (1 + _SLACK) if best < 700 else math.inf


def amplified_shift_lower(record: TrainingRecord, divergence: Floats) -> Floats:
    """Return the deviation at which `amplified_divergence_upper` reaches `divergence`: it is quadratic in it."""
    unit = amplified_divergence_upper(record, 1.0)
    if not unit > 0:
        return np.where(divergence > 0, np.inf, 0.0)
    return np.sqrt(divergence / unit) * (1 - _SLACK)


def marginal_start_norm(record: TrainingRecord) -> float:
    """Return the root mean square norm of the attacked round's start over trainings: sqrt(rho^2 + sigma^2 d).

    Delta is affine in that norm, so its mean square is at most Delta^2 there (Minkowski), which is what a bound of
    the mean divergence needs. Round 1 starts from the recorded norm.
    """
    before = record.attack_round - 1
    if before == 0:
        if record.start_norm is None:
            raise CertificationError("a certificate of round 1 wants the norm of the initial model in the record")
        return record.start_norm
    last = record.rounds[before - 1]
    if last.clip_norm is None:
        raise CertificationError(f"round {before} was not clipped, so nothing bounds the model over all trainings")
    return math.sqrt(last.clip_norm**2 + last.noise**2 * record.num_params) * (1 + _SLACK)


def _moved(record: TrainingRecord, group: Sequence[ClientWork], start_norm: float, change_norm: float | None) -> Floats:
    return deviation(record, group, start_norm, change_norm is None).upper(change_norm or 0.0)


def _largest(
    record: TrainingRecord, groups: Sequence[Sequence[ClientWork]], shift: Floats, start_norm: float,
    change_norm: float | None,
) -> NDArray[np.int64]:  # fmt: skip
    if change_norm is not None and not (math.isfinite(change_norm) and change_norm >= 0):
        raise CertificationError(f"change_norm must be 0 or more, or None for any other sample, got {change_norm!r}")
    moved = np.maximum.accumulate([float(_moved(record, group, start_norm, change_norm)) for group in groups])
    return np.searchsorted(moved, shift, side="left")  # those strictly below
