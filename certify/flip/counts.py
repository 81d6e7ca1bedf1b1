"""FLIP's counts of rejected samples, and what can be said of them: Corollary 1 and the statement that holds.

Zhang et al., "FLIP" (ICLR 2023), Corollary 1: with n_s backdoored samples whose largest confidence is below tau in the
model without the defence and n'_s in the one with it, the defence rejects n'_s - n_s more, a number meant to be at
least 0 where Theorem 2's condition holds. It is not: as mass leaves the target it may gather in another class, and a
sample that was rejected is then accepted with a label that is no attack.

What holds wherever the target is an argmin of the logit differences a (so inside the recovery radius), at every tau:

    accepted attacks {argmax p = t and p_t >= tau}: those after are among those before
    #{p_t < tau} does not fall

Both follow from p'_t / p'_j <= p_t / p_j for every j. A loss that rises (p'_t <= p_t) is enough for tau > 1/2 only, and
a sum of losses that rises says nothing about any one sample. Counts are of float64 softmax values.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify.flip.arrays import labels, logits
from certify.flip.bounds import loss_bounds
from tasks.errors import CertificationError


@dataclass(frozen=True)
class Counts:
    """One model on one set of samples, at one tau."""

    samples: int
    accepted_wanted: int  # argmax is the wanted label and confidence >= tau: ACC's or ASR's numerator
    rejected: int  # confidence < tau: the paper's n
    wanted_below: int  # p of the wanted label < tau


@dataclass(frozen=True)
class Comparison:
    """Counts of the backdoored samples without and with the defence, and of what the statement above covers."""

    before: Counts
    after: Counts
    covered: int  # samples whose target is surely an argmin of the logit differences
    new_attacks: int  # accepted attacks after that were none before, of all samples
    new_attacks_covered: int  # of the covered ones: 0 by the statement, up to ties within rounding
    newly_above: int  # covered samples with p_t < tau before and not after: 0 likewise
    newly_accepted: int  # covered samples rejected before and accepted after: what the printed corollary rules out


def count(values: Any, wanted: Any, tau: float) -> Counts:
    """Count samples by their logits [samples, classes] and the wanted label of each (or of all)."""
    p, top, at = _softmax("logits", values, wanted, tau)
    return _count(p, top, at, tau)


def compare(before: Any, after: Any, target: Any, tau: float) -> Comparison:
    """Compare the logits [samples, classes] of backdoored samples without and with the defence."""
    p, top, at = _softmax("before", before, target, tau)
    q, top_after, _ = _softmax("after", after, target, tau)
    covered = loss_bounds(before, after, target).target_least
    rows = np.arange(len(at))
    attack = (top == at) & (p[rows, at] >= tau)
    attack_after = (top_after == at) & (q[rows, at] >= tau)
    new = attack_after & ~attack
    above = (p[rows, at] < tau) & ~(q[rows, at] < tau)
    accepted = (p.max(axis=1) < tau) & ~(q.max(axis=1) < tau)
    return Comparison(
        before=_count(p, top, at, tau),
        after=_count(q, top_after, at, tau),
        covered=int(covered.sum()),
        new_attacks=int(new.sum()),
        new_attacks_covered=int((new & covered).sum()),
        newly_above=int((above & covered).sum()),
        newly_accepted=int((accepted & covered).sum()),
    )


def _count(p: NDArray[np.float64], top: NDArray[np.int64], at: NDArray[np.int64], tau: float) -> Counts:
    rows, sure = np.arange(len(at)), p.max(axis=1) >= tau
    return Counts(len(at), int(((top == at) & sure).sum()), int((~sure).sum()), int((p[rows, at] < tau).sum()))


def _softmax(
    name: str, values: Any, wanted: Any, tau: float
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    if isinstance(tau, bool) or not (isinstance(tau, int | float) and 0 <= tau <= 1):
        raise CertificationError(f"tau must be from 0 to 1, got {tau!r}")
    array = logits(name, values)
    at = labels(wanted, *array.shape)
    p = np.exp(array - array.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return p, array.argmax(axis=1).astype(np.int64), at
