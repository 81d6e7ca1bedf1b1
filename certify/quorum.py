"""How likely it is that attackers dominate the clients of a round, and of a run: exact hypergeometric arithmetic.

A round samples m of n clients without replacement, f of the n are malicious. A rule that withstands t attackers among
m replies is dominated where more than t are drawn. The coordinate-wise median withstands floor((m - 1) / 2): with an
odd m more than half must be malicious, with an even one half suffice, as the mean of the two middle values is then
partly theirs. Rounds draw independently, so of T rounds at least one is dominated with 1 - (1 - p)^T.

Source of the example: the certified federated adversarial training paper ("CFAT", NFFL 2021): 500 clients, 175 of them
malicious, 5 a round, coordinate-wise median.
"""

import math
from dataclasses import dataclass
from fractions import Fraction

from tasks.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Quorum:
    """Sizes of a federation and its sample; `tolerated` is how many attackers in a round the rule withstands."""

    num_clients: int
    malicious: int
    per_round: int
    tolerated: int

    def __post_init__(self) -> None:
        if not 1 <= self.per_round <= self.num_clients:
            raise ConfigError(f"a round samples from 1 to {self.num_clients} clients, got {self.per_round}")
        if not 0 <= self.malicious <= self.num_clients:
            raise ConfigError(f"malicious must be from 0 to {self.num_clients} clients, got {self.malicious}")
        if not 0 <= self.tolerated <= self.per_round:
            raise ConfigError(
                f"tolerated must be from 0 to {self.per_round} attackers in a round, got {self.tolerated}"
            )

    def drawn(self, number: int) -> Fraction:
        """Return the probability that a round has exactly `number` malicious clients."""
        if not 0 <= number <= self.per_round:
            return Fraction(0)
        benign = self.num_clients - self.malicious
        ways = math.comb(self.malicious, number) * math.comb(benign, self.per_round - number)
        return Fraction(ways, math.comb(self.num_clients, self.per_round))

    @property
    def dominated(self) -> Fraction:
        """Probability that a round has more malicious clients than the rule withstands."""
        return sum((self.drawn(number) for number in range(self.tolerated + 1, self.per_round + 1)), Fraction(0))

    def dominated_within(self, rounds: int) -> float:
        """Return the probability that at least one of `rounds` rounds is dominated."""
        if rounds < 0:
            raise ConfigError(f"rounds must be 0 or more, got {rounds}")
        chance = self.dominated
        if chance == 1:
            return float(rounds > 0)
        return -math.expm1(rounds * _log1p_of_minus(chance))

    def expected(self, rounds: int) -> float:
        """Return how many of `rounds` rounds are dominated on average."""
        return float(rounds * self.dominated)

    @property
    def rounds_until(self) -> float:
        """On average the first dominated round is this one; infinite where none can be."""
        return float(1 / self.dominated) if self.dominated else math.inf


def median_tolerates(per_round: int) -> int:
    """Return how many of the replies of a round may be malicious under a median."""
    return (per_round - 1) // 2


def _log1p_of_minus(chance: Fraction) -> float:
    """Return log(1 - chance) without losing a chance near 0 or near 1; `chance` is below 1."""
    return math.log1p(-float(chance)) if chance < Fraction(1, 2) else math.log(float(1 - chance))
