"""Every attacker attacks in every round of a span; FLIP's and DBA's "continuous" or "multi-shot" attack."""

from tasks.errors import SpecError
from tasks.schedule import Schedule


def continuous(*, start: int = 1, stop: int | None = None, forced: bool = True) -> Schedule:
    """All attackers attack in rounds `start` to `stop` (inclusive; None: to the end)."""
    if stop is not None and stop < start:
        raise SpecError(f"continuous: stop must be at least start = {start}, got {stop}")

    def attackers(round: int, num_attackers: int) -> frozenset[int]:
        return frozenset(range(num_attackers)) if start <= round and (stop is None or round <= stop) else frozenset()

    return Schedule(attackers, forced)
