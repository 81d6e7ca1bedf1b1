"""How far an attack can move the released model: the bound behind the sound certificates, for the one run there was.

Take the run twice, with the same start, batches and noise, and let attackers change samples in one of them. A gradient
step of rate eta <= 2 / beta on a convex, beta-smooth loss brings two models no further apart, nor do averaging with
weights that sum to at most 1 and clipping to a ball. So the final models differ by at most

    Delta = sum_{i <= R} p_i gamma_i sum_steps eta_i (q_B / n_B) G_i,

G being a bound of the change of one sample's gradient. Where an attacker's scale differs between the worlds, gamma_i
is the larger of the two and p_i ||u_i|| times their difference is added, u_i being the recorded update: for an
attacker whose honest counterpart would not scale, and at the client level for everyone who was recorded with another
scale than the one he has in the other world. This is the argument of uniform stability (Hardt, Recht,
Singer, ICML 2016) in place of Theorem 2 of CRFL (Xie et al., ICML 2021): no factor 2, no Pi, no sqrt(R), and it speaks
of the released model, not of an average over trainings.

G for softmax regression (`certify.linear`): L ||d|| where features change by d, sqrt(2) X~ more where the label may
change too, 2 sqrt(2) X~ where the sample may be replaced by any other. L = sqrt(2) + rho X~ / 2 needs a bound rho of
the attacked run's local models: the recorded ones stay within the recorded norm of the start plus sum eta sqrt(2) X~,
and the attacked ones within their distance of these, which multiplies Delta by at most exp(||d|| sum eta (q_B / n_B)
X~ / 2). X bounds the inputs of the recorded run; the attacker's changed inputs may be longer (not where replaced).

Two things that are run are not quite non-expansive, and are charged to the shift that a prediction survives
(`survived_lower`): weights that sum to 1 + e as float32 has them multiply a distance by 1 + 2e, and the clip as it is
computed may lie `clip_error` rho off the exact one, in each round where either world is clipped at all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from certify.bounds import Floats
from certify.crfl.corollary import Attackers, armed_clients, largest_count, log_contractions
from certify.crfl.divergence import exp_or_infinity
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
    record: TrainingRecord, attackers: Sequence[ClientWork], start_norm: float, replaced: bool = False,
    any_training: bool = False,
) -> Deviation:  # fmt: skip
    """Return the bound of the distance between the models after the attacked round, recorded and attacked.

    `any_training`: for every training, not the recorded one alone, whose `update_norm` then says nothing.
    """
    parts = [_of_one(record, work, start_norm, replaced) for work in attackers]
    linear, constant = math.fsum(part.linear for part in parts), math.fsum(part.constant for part in parts)
    growth = max((part.growth for part in parts), default=0.0)
    constant += _scaled(record, attackers, any_training)
    up = 1 + _SLACK
    return Deviation(linear * up, constant * up, growth * up)


def _of_one(record: TrainingRecord, work: ClientWork, start_norm: float, replaced: bool) -> Deviation:
    """Return what the poisoned samples of one attacker move, sent with the larger scale of the two worlds."""
    norm, bias, rate = record.data_norm_bound, record.bias, work.learning_rate
    gradient, lifted = gradient_norm_upper(norm, bias), lifted_norm_upper(norm, bias)
    share = rate * work.poisoned_share
    sent = work.weight * record.server_lr * (work.scale if record.counterpart_scaled else max(work.scale, 1.0))
    moved = sent * share * gradient
    if replaced:
        return Deviation(0.0, 2 * moved, 0.0)
    parts = zip(_slopes(record, work, start_norm), work.poisoned, work.batch_sizes)
    change = rate * math.fsum(slope * count / size for slope, count, size in parts)
    least = math.ulp(0.0) if work.weight > 0 and share > 0 else 0.0  # no product below float64 makes an attacker idle
    return Deviation(max(sent * change, least), moved * record.label_flips, share * lifted / 2)


def _slopes(record: TrainingRecord, work: ClientWork, start_norm: float) -> list[float]:
    """Return L of every step: the local model has moved by rate sqrt(2) X~ per step at most."""
    reach = work.learning_rate * gradient_norm_upper(record.data_norm_bound, record.bias)
    norms = (start_norm + step * reach * (1 + _SLACK) for step in range(len(work.batch_sizes)))
    return [lipschitz_upper(norm, record.data_norm_bound, record.bias) for norm in norms]


def _scaled(record: TrainingRecord, attackers: Sequence[ClientWork], any_training: bool) -> float:
    """Return what attackers move by scaling updates that their honest counterparts would not scale."""
    if record.counterpart_scaled:
        return 0.0
    unlike = [work for work in attackers if work.scale != 1]
    moved = (work.weight * abs(work.scale - 1) * _update(record, work, any_training) for work in unlike)
    return record.server_lr * math.fsum(moved) * (1 + _SLACK)


def _update(record: TrainingRecord, work: ClientWork, any_training: bool) -> float:
    """Return the norm of a client's update before it is scaled: as recorded, or a bound over all trainings."""
    if any_training:
        if record.weight_decay > 0:
            raise CertificationError("with weight decay no norm of an update is known over all trainings")
        reach = len(work.batch_sizes) * work.learning_rate
        return reach * gradient_norm_upper(record.data_norm_bound, record.bias) * (1 + _SLACK)
    if work.update_norm is None:
        raise CertificationError(
            f"client {work.client} has no update_norm in the record, and its scale differs between the worlds"
        )
    return work.update_norm


def expansion_upper(record: TrainingRecord) -> float:
    """Return by how much the rounds after the attacked one may multiply a distance: weights that sum above 1."""
    factor = 1.0
    for work in record.rounds[record.attack_round :]:
        total = math.nextafter(math.fsum(work.weights), math.inf) * record.server_lr * (1 + 2.0**-52)
        factor *= 1 + 2 * max(0.0, total - 1) + 2.0**-52
    return factor * (1 + 2.0**-50)


def clip_errors(record: TrainingRecord, shift: Floats | float = math.inf) -> Iterator[Floats]:
    """Yield per round, from the attacked one on, how far apart the clip as it is run may bring two models.

    Nothing in a round whose recorded model is so far inside the ball that no model within `shift` is clipped either.
    """
    shift = np.asarray(shift, dtype=np.float64)
    for work in record.rounds[record.attack_round - 1 :]:
        bound = work.clip_norm or 0.0
        inside = math.inf if work.model_norm is None else work.model_norm
        room = bound * (1 - 2.0**-18 - 2 * record.clip_error)
        clipped = (inside + shift >= room) & (work.clip_norm is not None)
        yield np.where(clipped, bound * record.clip_error * (1 + _SLACK), 0.0)


def survived_lower(record: TrainingRecord, shift: Floats) -> Floats:
    """Return the distance after the attacked round that stays below `shift` to the end, rounded down.

    While two worlds are nearer than `shift` only rounds near the clip add to their distance, so by induction over the
    rounds they stay nearer, if the distance after the attacked round and all that is added are.
    """
    shift = np.asarray(shift, dtype=np.float64)
    added = np.zeros(shift.shape)
    for error in clip_errors(record, shift):
        added += error * (1 + _SLACK)
    return np.maximum(shift / expansion_upper(record) - added, 0.0) * (1 - _SLACK)


def feature_radius(record: TrainingRecord, shift: Floats, start_norm: float, any_training: bool = False) -> Floats:
    """Return per point the ||d|| below which the model moves less than `shift` in the attacked round.

    0: not even label flips, or no sample is poisoned, which is no statement on poison.
    """
    if not any(any(work.poisoned) for work in record.attacking):
        return np.zeros(np.shape(shift))
    return deviation(record, record.attacking, start_norm, any_training=any_training).change_lower(shift)


def sample_radius(
    record: TrainingRecord, shift: Floats, start_norm: float, change_norm: float | None, any_training: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """Return the largest q_B per point, samples changed by `change_norm` or replaced at will (None) in each batch."""
    change, replaced = _change(change_norm), change_norm is None
    scaled = _scaled(record, record.attacking, any_training)
    whole = [replace(work, poisoned=work.batch_sizes) for work in record.attacking]
    slopes = [_slopes(record, work, start_norm) for work in whole]
    full = [_of_one(record, work, start_norm, replaced) for work in whole]
    sloped = Attackers.of(whole, slopes)
    plain = Attackers.of(whole, [[1.0] * len(own) for own in slopes])
    # shares of what an attacker moves whose batches are poisoned whole
    linear = np.array([math.nextafter(part.linear / math.fsum(own), math.inf) for part, own in zip(full, slopes)])
    linear *= np.array([part.linear > 0 for part in full])
    constant = np.array([part.constant / len(own) for part, own in zip(full, slopes)])
    growth = np.array([part.growth / len(own) for part, own in zip(full, slopes)])

    def holds(counts: NDArray[np.int64], asked: Floats) -> NDArray[np.bool_]:
        shares = plain.shares(counts)
        moved = linear @ sloped.shares(counts) * change + constant @ shares
        with np.errstate(over="ignore"):
            moved = np.exp((growth[:, None] * shares).max(axis=0) * change * (1 + _SLACK)) * (moved + scaled)
        return moved * (1 + 4 * _SLACK) < asked

    return largest_count(holds, shift, plain.most, at_once=plain.at_once, should_stop=should_stop)


def client_radius(
    record: TrainingRecord, shift: Floats, start_norm: float, change_norm: float | None, any_training: bool = False,
    should_stop: Callable[[], bool] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """Return of how many clients the data may differ per point, whichever they are, armed like the recorded attackers.

    A recorded attacker whose data would be others counts as well: he is one of those whose data differ.
    In the other world they scale as any recorded attacker does, everybody else does not scale; who was recorded with
    another scale is charged for the difference. Nothing is certified where the recorded attackers poison nothing.
    """
    change, armed = _change(change_norm), armed_clients(record)
    if not any(any(work.poisoned) for work in armed):
        return np.zeros(np.shape(shift), dtype=np.int64)
    costs, idle = np.zeros(len(armed)), np.zeros(len(armed))
    for place, (work, own) in enumerate(zip(armed, record.work, strict=True)):
        if should_stop is not None and place % 1024 == 0 and should_stop():
            raise CertificationError("stopped before every client was looked at")
        poison = _of_one(record, work, start_norm, change_norm is None).upper(change)
        scaled, honest = (_rescaled(record, own, attacks, any_training) for attacks in (True, False))
        costs[place], idle[place] = float(poison) + scaled, honest
    # those who attack cost `costs`, the others `idle`; the worst of R attackers are those where it adds most
    added = np.cumsum(np.sort(costs - idle)[::-1])
    moved = (np.maximum.accumulate(np.maximum(added, 0.0)) + math.fsum(idle)) * (1 + 4 * _SLACK)
    return np.searchsorted(moved, np.asarray(shift), side="left")  # those strictly below


def _rescaled(record: TrainingRecord, work: ClientWork, attacks: bool, any_training: bool) -> float:
    """Return what a client's update moves when it is scaled otherwise than recorded, as an attacker or not."""
    before = {work.scale} if record.counterpart_scaled else {work.scale, 1.0}
    after = {other.scale for other in record.attacking} if attacks else {1.0}
    if attacks and not record.counterpart_scaled:
        after.add(1.0)
    apart = max(abs(a - b) for a in after for b in before)
    if apart == 0:
        return 0.0
    return work.weight * record.server_lr * apart * _update(record, work, any_training) * (1 + _SLACK)


def _change(change_norm: float | None) -> float:
    if change_norm is not None and not (math.isfinite(change_norm) and change_norm >= 0):
        raise CertificationError(f"change_norm must be 0 or more, or None for any other sample, got {change_norm!r}")
    return change_norm or 0.0


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
    """Return the deviation at which the divergence, clip errors and all, reaches `divergence`.

    Each round's noise hides the round's clip error c_t beside its share sigma_t^2 / V of the deviation Delta, so the
    divergence after round k is at most (Delta / sqrt(2 V) + sqrt(sum c_t^2 / (2 sigma_t^2)))^2.
    """
    roots, variance, errors, best = np.sqrt(divergence), 0.0, 0.0, np.zeros(np.shape(divergence))
    clip = [float(error) for error in clip_errors(record)]
    for number, error in zip(range(record.attack_round, record.num_rounds + 1), clip, strict=True):
        noise = record.noise(number)
        variance += noise**2
        errors += (error / noise) ** 2 / 2 if noise > 0 else math.inf if error > 0 else 0.0
        if variance > 0 and errors < math.inf:
            later = exp_or_infinity(-log_contractions(record, number) / 2)  # what later rounds shrink, as a root
            with np.errstate(invalid="ignore"):
                left = np.where(divergence > 0, roots * later, 0.0) - math.sqrt(errors) * (1 + _SLACK)
            best = np.maximum(best, left * math.sqrt(2 * variance))
    return best / expansion_upper(record) * (1 - _SLACK)


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
