"""Which clients take part in a round: seeded, over client names, the same on every engine.

Flower's own sampling uses the global `random` over node ids, which are random themselves; here the draw is over
clients sorted by name, from a generator derived from (seed, round).
"""

from collections.abc import Iterable, Sequence

import torch

from tasks.rng import generator
from tasks.schedule import Schedule


def sample_clients(
    available: Sequence[int], count: int, *, seed: int, round: int, forced: Iterable[int] = ()
) -> list[int]:
    """Return `count` of the available clients, sorted: the forced ones, then a uniform draw without replacement.

    More forced clients than `count` are drawn from uniformly.
    """
    wanted = set(forced)
    first = [client for client in sorted(available) if client in wanted]
    rest = [client for client in sorted(available) if client not in wanted]
    draws = generator(seed, "sampling", round)
    if len(first) > count:
        return sorted(first[i] for i in torch.randperm(len(first), generator=draws)[:count].tolist())
    order = torch.randperm(len(rest), generator=draws)[: count - len(first)].tolist()
    return sorted(first + [rest[i] for i in order])


def forced_clients(schedule: Schedule, malicious: Sequence[int], round: int) -> list[int]:
    """Return the malicious clients that the schedule puts into this round's sample."""
    if not schedule.forced:
        return []
    return [malicious[rank] for rank in sorted(schedule.attackers(round, len(malicious)))]
