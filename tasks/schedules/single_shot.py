"""One attack per named round; FLIP's and DBA's "single-shot" attack: attacker i attacks in the i-th round only."""

from tasks.schedule import Schedule


def single_shot(*, rounds: tuple[int, ...], together: bool = False) -> Schedule:
    """Attacker i attacks in ``rounds[i]`` (more rounds than attackers: they take turns); `together`: all in each."""

    def attackers(round: int, num_attackers: int) -> frozenset[int]:
        if together:
            return frozenset(range(num_attackers)) if round in rounds else frozenset()
        return frozenset(i % num_attackers for i, when in enumerate(rounds) if when == round and num_attackers)

    return Schedule(attackers, forced=True)
