"""How the radius grows with the rounds after an attack, for votes that are given: the contraction of noise and clip.

Xie et al., "CRFL" (ICML 2021), figure 9(b): Corollary 1 at pA = 0.7, pB = 0.1 and a constant rho / sigma after the
attacked round. The attacked round, what its attackers did and sigma are those of a run's training record.

Beside it stands what holds for the same law, that of models over trainings: noise of later rounds hides the deviation
("amplified", see `certify.crfl.coupled`), with relabelled samples and the length of inputs charged. It grows with
every round, also where rho / sigma is so large that the paper's product is 1.
"""

from dataclasses import dataclass, replace

import numpy as np

from certify.crfl import corollary, coupled
from certify.crfl.divergence import divergence_budget_lower
from certify.crfl.training_record import TrainingRecord
from hawthorn.reproduce.figure import Line
from tasks.errors import RecordError


@dataclass(frozen=True, eq=False)
class ByRounds:
    """The radii of one curve by T, (T, printed, amplified), or why there are none."""

    line: Line
    seed: int
    radii: tuple[tuple[int, float, float], ...] = ()
    problem: str = ""


def radii_by_rounds(
    record: TrainingRecord, ratio: float, pa: float, pb: float, last: int
) -> list[tuple[int, float, float]]:
    """Return (T, Corollary 1's radius, amplified radius) for every T from the attacked round to `last`.

    After the attacked round models are clipped to `ratio` sigma. Raises `RecordError` for a run without noise.
    """
    first, sigma = record.attack_round, record.smoothing_sigma
    if not sigma > 0 or last < first:
        raise RecordError(f"the radius by rounds wants noise and rounds from {first} on; got {sigma:g} and {last}")
    attacked = replace(record.rounds[first - 1], noise=sigma, model_norm=None)
    later = replace(attacked, clip_norm=ratio * sigma)
    budget = divergence_budget_lower(np.array([pa]), np.array([pb]))
    found: list[tuple[int, float, float]] = []
    for number in range(first, last + 1):
        rounds = (*record.rounds[: first - 1], attacked, *[later] * (number - first))
        shaped = replace(record, rounds=rounds)
        shift = coupled.amplified_shift_lower(shaped, budget)
        amplified = coupled.feature_radius(shaped, shift, coupled.marginal_start_norm(shaped), any_training=True)
        found.append((number, float(corollary.feature_radius(shaped, budget)[0]), float(amplified[0])))
    return found
