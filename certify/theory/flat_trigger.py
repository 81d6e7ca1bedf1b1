"""Backdoors that gradients do not see: Theorem 3 of "Attack of the Tails" (Wang et al., NeurIPS 2020), made runnable.

Two networks g = 0 and f differ only on a set of tiny volume, and everywhere else f's gradient is 0, so that a search
that starts outside of the set has nothing to follow:

    corner: f(x) = K relu(sum x - n + s), s <= 1      differs on a corner of [0, 1]^n of volume s^n / n!
    mean:   f(x) = K relu(mean x - 1/2 - d)           differs where the mean of n uniform numbers is that large

The corner's volume is exact. The other's is at most exp(-2 n d^2) (Hoeffding), and exactly a tail of the Irwin-Hall
distribution, here in whole fractions, since its alternating sum loses all digits in floating point.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from certify.bounds import Floats
from tasks.errors import CertificationError


@dataclass(frozen=True)
class FlatTrigger:
    """f(x) = slope * relu(sum x - threshold) on [0, 1]^dimension; g is 0."""

    dimension: int
    threshold: float
    slope: float = 1.0

    @staticmethod
    def corner(dimension: int, size: float, slope: float = 1.0) -> "FlatTrigger":
        """Return the trigger of the corner of all ones; `size` from 0 to 1."""
        if not 0 < size <= 1 or dimension < 1:
            raise CertificationError(
                f"a corner has 0 < size <= 1 and a dimension of at least 1, got {size}, {dimension}"
            )
        return FlatTrigger(dimension, dimension - size, slope)

    @staticmethod
    def mean(dimension: int, excess: float, slope: float = 1.0) -> "FlatTrigger":
        """Return the trigger of a mean above 1/2 + `excess`."""
        if not 0 < excess < 0.5 or dimension < 1:
            raise CertificationError(
                f"wanted 0 < excess < 1/2 and a dimension of at least 1, got {excess}, {dimension}"
            )
        return FlatTrigger(dimension, dimension * (0.5 + excess), slope)

    def __call__(self, points: Floats) -> Floats:
        """Return f at points ``[points, dimension]``."""
        return self.slope * np.maximum(points.sum(axis=1) - self.threshold, 0.0)

    def gradient(self, points: Floats) -> Floats:
        """Return the gradient of f at points, ``[points, dimension]``: 0 wherever f is."""
        fires = points.sum(axis=1) > self.threshold
        return np.where(fires[:, None], self.slope, 0.0) * np.ones_like(points)

    def volume(self) -> float:
        """Return the share of the cube on which f differs from 0: P(sum of n uniform numbers > threshold), exactly."""
        rest = self.dimension - Fraction(self.threshold)
        terms = (
            (-1) ** k * math.comb(self.dimension, k) * (rest - k) ** self.dimension for k in range(math.floor(rest) + 1)
        )
        return float(sum(terms, Fraction(0)) / math.factorial(self.dimension))

    def volume_upper(self) -> float:
        """Return Hoeffding's bound on the volume, exp(-2 n d^2), for a threshold above n / 2; rounded up."""
        excess = self.threshold / self.dimension - 0.5
        return 1.0 if excess <= 0 else math.nextafter(math.exp(-2 * self.dimension * excess**2), 1.0) * (1 + 1e-12)
