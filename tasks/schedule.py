"""When malicious clients attack: a fact of the experiment that server and clients agree on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """Which attackers attack in a round, and whether they are put into the round's sample.

    `attackers(round, num_attackers)` returns the ranks (0-based positions in the list of malicious
    clients) that attack. With `forced` those are always sampled, as FLIP and DBA do; otherwise an
    attacker attacks only when the seeded sampling draws it.
    """

    attackers: Callable[[int, int], frozenset[int]]
    forced: bool = True

    def attacks(self, client: int, malicious: Sequence[int], round: int) -> bool:
        """Whether a malicious client attacks in a round; one that the settings do not list attacks as if alone."""
        if client in malicious:
            return malicious.index(client) in self.attackers(round, len(malicious))
        return 0 in self.attackers(round, 1)
