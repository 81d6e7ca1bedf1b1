"""Attackers that answer together: the server writes their rows once all replies of the round are in.

No defence sees more than with real replies, as an attacker that knows the updates of others could have sent these
very rows. What the attackers know is a setting: every benign update of the round (the omniscient attacker of most
papers), or only the updates of their own clients, honest ones unless these attack by themselves as well. Where they
know too little for their attack, they send what they have, and the record says so.
"""

from collections.abc import Callable

from torch import Tensor

from strategies.robust import Collude
from tasks.config import RunConfig
from tasks.rng import generator
from tasks.schedule import Schedule


def colluding(config: RunConfig, schedule: Schedule, malicious: Callable[[], set[int]]) -> Collude | None:
    """Return what overwrites the rows of attacking clients in a round, or None if nobody colludes."""
    if not config.collusion:
        return None
    attack = config.component("collusion")

    def collude(round: int, clients: list[int], stack: Tensor) -> list[int]:
        bad, listed = malicious(), config.malicious_ids
        rows = [row for row, c in enumerate(clients) if c in bad and schedule.attacks(c, listed, round)]
        if not rows:
            return []
        known = [row for row in range(len(clients)) if row not in set(rows)] if config.knowledge == "all" else rows
        draw = generator(config.seed, "collusion", "round", round)
        stack[rows] = attack(stack[known], len(rows), len(clients), draw).to(stack.dtype)
        return [clients[row] for row in rows]

    return collude
