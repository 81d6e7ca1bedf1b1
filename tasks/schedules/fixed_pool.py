"""A fixed pool of attackers that attack whenever the sampling draws them; "Attack of the Tails", section 4."""

from tasks.schedule import Schedule


def fixed_pool(*, start: int = 1) -> Schedule:
    """Every attacker attacks from round `start` on, but only in rounds it is sampled in."""

    def attackers(round: int, num_attackers: int) -> frozenset[int]:
        return frozenset(range(num_attackers)) if round >= start else frozenset()

    return Schedule(attackers, forced=False)
