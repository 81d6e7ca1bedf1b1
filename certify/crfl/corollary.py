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
from dataclasses import replace

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
    if total == 0:
        return np.where(divergence > 0, np.inf, -np.inf)
    return (log_budget(record, divergence) - math.log(total)) / 2


def sample_radius(record: TrainingRecord, divergence: Floats, change_norm: float) -> NDArray[np.int64]:
    """Return the largest q_B per point: poisoned samples in each batch of each attacker, changed by `change_norm`."""
    most = max(size for work in record.attacking for size in work.batch_sizes)
    costs = [_cost([with_poisoned(work, count) for work in record.attacking]) for count in range(1, most + 1)]
    return _largest(record, divergence, change_norm, costs)


def client_radius(record: TrainingRecord, divergence: Floats, change_norm: float) -> NDArray[np.int64]:
    """Return the largest R per point: attackers like the recorded ones, whichever clients they are."""
    costs = [_cost(worst) for worst in worst_clients(record, coefficient)]
    return _largest(record, divergence, change_norm, costs)


def with_poisoned(work: ClientWork, count: int) -> ClientWork:
    """Return the work with `count` poisoned samples in each batch, all of a smaller one."""
    return replace(work, poisoned=tuple(min(count, size) for size in work.batch_sizes))


def worst_clients(record: TrainingRecord, cost: Callable[[ClientWork], float]) -> list[list[ClientWork]]:
    """Return for R = 1, 2, ... the R costliest participants, if each poisons and scales like the worst attacker."""
    count = max(count for work in record.attacking for count in work.poisoned)
    scale = max(work.scale for work in record.attacking)
    armed = [with_poisoned(replace(work, scale=scale), count) for work in record.work]
    armed.sort(key=cost, reverse=True)
    return [armed[:number] for number in range(1, len(armed) + 1)]


def _cost(attackers: Sequence[ClientWork]) -> float:
    return len(attackers) * math.fsum(coefficient(work) ** 2 for work in attackers)


def _largest(record: TrainingRecord, divergence: Floats, change_norm: float, costs: Sequence[float]) -> NDArray:
    if not (math.isfinite(change_norm) and change_norm > 0):
        raise CertificationError(f"Theorem 1 wants the size of each sample's change, above 0, got {change_norm!r}")
    with np.errstate(divide="ignore"):
        needed = np.log(np.asarray(costs)) + 2 * math.log(change_norm)
    return np.searchsorted(needed, log_budget(record, divergence), side="right")
