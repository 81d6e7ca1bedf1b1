"""An attack every so many rounds; "Attack of the Tails" (NeurIPS 2020, section 4), where the period is 10."""

from tasks.errors import SpecError
from tasks.schedule import Schedule


def fixed_frequency(*, period: int = 10, start: int = 1, num_attackers: int = 1) -> Schedule:
    """In rounds start, start + period, ... the next `num_attackers` attackers in turn attack."""
    if period < 1 or num_attackers < 1:
        raise SpecError(f"fixed_frequency: period and num_attackers must be at least 1, got {period}, {num_attackers}")
    per_round = num_attackers

    def attackers(round: int, num_attackers: int) -> frozenset[int]:
        if round < start or (round - start) % period or not num_attackers:
            return frozenset()
        turn = (round - start) // period * per_round
        return frozenset((turn + i) % num_attackers for i in range(min(per_round, num_attackers)))

    return Schedule(attackers, forced=True)
