"""CRFL's own certificate, as printed: Corollary 1 and the three levels of Theorem 1.

Xie, Chen, Chen, Li, "CRFL: Certifiably Robust Federated Learning against Backdoor Attacks" (ICML 2021):

    RAD = sqrt( eps(pA, pB) sigma_tadv^2 / (2 R L_Z^2 sum_{i <= R} (p_i gamma_i tau_i eta_i q_Bi/n_Bi)^2 Pi) ),
    Pi = prod_{t > tadv} (2 Phi(rho_t / sigma_t) - 1),   L_Z = sqrt(2 + 2 rho_tadv + rho_tadv^2).

Kept for comparison with the paper. Its premises rarely hold (see `certify.crfl.assumptions`), and with them the
claim: labels that change, or inputs longer than 1, break it. `certify.crfl.coupled` has the bound that stands.

tau_i q_Bi / n_Bi is the sum over the steps that were taken. The last round's sigma is the smoothing's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from certify.bounds import Floats
from certify.crfl.divergence import exp_or_infinity, log_contraction_upper
from certify.crfl.training_record import ClientWork, TrainingRecord
from certify.linear import lipschitz_as_printed
from tasks.errors import CertificationError


def log_contractions(record: TrainingRecord, after: int) -> float:
    """Return log prod_{t > after} (2 Phi(rho_t / sigma_t) - 1)."""
    rounds = range(after + 1, record.num_rounds + 1)
    return math.fsum(log_contraction_upper(record.rounds[t - 1].clip_norm, record.noise(t)) for t in rounds)


def log_budget(record: TrainingRecord, divergence: Floats) -> Floats:
    """Return log K per point, K = eps sigma_tadv^2 / (2 L_Z^2 Pi): what R sum (c_i r_i ||d_i||)^2 may reach."""
    clip_norm = record.rounds[record.attack_round - 1].clip_norm
    if clip_norm is None:
        raise CertificationError("Corollary 1 wants the clipping norm of the attacked round; the record has none")
    noise = record.noise(record.attack_round)
    with np.errstate(divide="ignore"):
        shared = 2 * np.log(np.float64(noise)) - math.log(2) - 2 * math.log(lipschitz_as_printed(clip_norm))
        return np.log(divergence) + shared - log_contractions(record, record.attack_round)


def coefficient(work: ClientWork) -> float:
    """Return p_i gamma_i tau_i eta_i q_Bi / n_Bi of one attacker."""
    return work.weight * work.scale * work.learning_rate * work.poisoned_share


def feature_radius(record: TrainingRecord, divergence: Floats) -> Floats:
    """Return RAD per point, for `divergence` eps(pA, pB); infinite where float64 has no room."""
    return exp_or_infinity(log_feature_radius(record, divergence))


def log_feature_radius(record: TrainingRecord, divergence: Floats) -> Floats:
    """Return log RAD per point; it is finite where RAD is beyond 1e308."""
    total = _cost(record.attacking)
    if not any(any(work.poisoned) for work in record.attacking):
        return np.full(np.shape(divergence), -np.inf)  # a statement on the change of no sample: nothing is certified
    if total == 0:
        return np.where(divergence > 0, np.inf, -np.inf)
    return (log_budget(record, divergence) - math.log(total)) / 2


def sample_radius(record: TrainingRecord, divergence: Floats, change_norm: float) -> NDArray[np.int64]:
    """Return the largest q_B per point: poisoned samples in each batch of each attacker, changed by `change_norm`."""
    attackers = Attackers.of(record.attacking, [[1.0] * len(work.batch_sizes) for work in record.attacking])
    known = [work.weight * work.scale * work.learning_rate for work in record.attacking]

    def cost(counts: NDArray[np.int64]) -> Floats:
        return len(known) * np.square(np.array(known)[:, None] * attackers.shares(counts)).sum(axis=0)

    return _largest(record, divergence, change_norm, cost, attackers.most, attackers.at_once)


def client_radius(record: TrainingRecord, divergence: Floats, change_norm: float) -> NDArray[np.int64]:
    """Return the largest R per point: attackers like the recorded ones, whichever clients they are."""
    armed = armed_clients(record)
    if not any(any(work.poisoned) for work in armed):
        return np.zeros(np.shape(divergence), dtype=np.int64)
    squares = np.sort(np.array([coefficient(work) ** 2 for work in armed]))[::-1]
    costs: Floats = np.arange(1.0, len(armed) + 1) * np.cumsum(squares)
    return _largest(record, divergence, change_norm, lambda counts: costs[counts - 1], len(armed))


def armed_clients(record: TrainingRecord) -> list[ClientWork]:
    """Return every participant's work as if it poisoned and scaled like the worst attacker."""
    count = max(count for work in record.attacking for count in work.poisoned)
    scale = max(work.scale for work in record.attacking)
    return [
        replace(work, scale=scale, poisoned=tuple(min(count, size) for size in work.batch_sizes))
        for work in record.work
    ]


@dataclass(frozen=True, eq=False)
class Attackers:
    """Steps of attackers by batch size: what a number of poisoned samples per batch costs, without a walk over steps.

    Batches of one attacker that are equally large are one group; a batch that is smaller than the number asked for
    counts as poisoned whole.
    """

    sizes: Floats  # [groups]
    weights: Floats  # [groups], summed over the steps of a group
    starts: NDArray[np.int64]  # of each attacker's first group
    most: int

    @staticmethod
    def of(works: Sequence[ClientWork], weights: Sequence[Sequence[float]]) -> "Attackers":
        """Return the groups of `works`, with one weight per step."""
        sizes, sums, starts = [], [], []
        for work, own in zip(works, weights, strict=True):
            distinct, place = np.unique(np.array(work.batch_sizes, dtype=np.int64), return_inverse=True)
            starts.append(sum(map(len, sizes)))
            sizes.append(distinct.astype(np.float64))
            sums.append(np.bincount(place, weights=np.asarray(own, dtype=np.float64)))
        most = max(size for work in works for size in work.batch_sizes)
        return Attackers(np.concatenate(sizes), np.concatenate(sums), np.array(starts), most)

    @property
    def at_once(self) -> int:
        """How many counts to ask for at once: `shares` works on [groups, counts]."""
        return max(1, 2**20 // len(self.sizes))

    def shares(self, counts: NDArray[np.int64]) -> Floats:
        """Return the weighted sums of q_B / n_B over the steps, [attackers, counts], for `counts` poisoned samples."""
        parts = np.minimum(counts[None, :] / self.sizes[:, None], 1.0) * self.weights[:, None]
        return np.add.reduceat(parts, self.starts, axis=0)


def largest_count(
    holds: Callable[[NDArray[np.int64], Floats], NDArray[np.bool_]], limits: Floats, most: int, *,
    at_once: int = 4096, should_stop: Callable[[], bool] | None = None,
) -> NDArray[np.int64]:  # fmt: skip
    """Return per limit the largest of 0 to `most` that holds, by bisection; 0 always does, and order is kept.

    `holds` gets counts and the limits they are asked for, both [asked], `at_once` of them at most.
    `CertificationError` where `should_stop` says so.
    """
    flat = np.atleast_1d(np.asarray(limits, dtype=np.float64)).ravel()
    low, high = np.zeros(flat.shape, dtype=np.int64), np.full(flat.shape, most, dtype=np.int64)
    while (low < high).any():
        if should_stop is not None and should_stop():
            raise CertificationError("stopped before the largest number was found")
        middle = (low + high + 1) // 2
        pieces = [slice(first, first + at_once) for first in range(0, len(flat), at_once)]
        good = np.concatenate([holds(middle[piece], flat[piece]) for piece in pieces])
        low, high = np.where(good, middle, low), np.where(good, high, middle - 1)
    return low.reshape(np.shape(limits))


def _cost(attackers: Sequence[ClientWork]) -> float:
    return len(attackers) * math.fsum(coefficient(work) ** 2 for work in attackers)


def _largest(
    record: TrainingRecord, divergence: Floats, change_norm: float,
    cost: Callable[[NDArray[np.int64]], Floats], most: int, at_once: int = 4096,
) -> NDArray[np.int64]:  # fmt: skip
    if not (math.isfinite(change_norm) and change_norm > 0):
        raise CertificationError(f"Theorem 1 wants the size of each sample's change, above 0, got {change_norm!r}")

    def holds(counts: NDArray[np.int64], budget: Floats) -> NDArray[np.bool_]:
        with np.errstate(divide="ignore"):
            return np.log(cost(counts)) + 2 * math.log(change_norm) <= budget

    return largest_count(holds, log_budget(record, divergence), most, at_once=at_once)
