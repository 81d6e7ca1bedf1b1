"""Who takes part in `benchmarks/rules.py`: Hawthorn, its peers, and the limits of the machine; one file each.

A contestant's file defines ``prepare(row, case) -> Call | str``: what to run, or why it does not take part. Making the
input of a call is not timed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tasks.rng import generator


@dataclass(frozen=True)
class Case:
    """One stack of updates; the last f of the n clients are attackers, which lie apart."""

    updates: Tensor
    f: int

    @staticmethod
    def make(num_clients: int, num_params: int) -> "Case":
        """Return updates around 1, with a fifth of the clients around -3 and spread wider."""
        draws = generator(1, "benchmark", "rules")
        updates = torch.empty(num_clients, num_params)
        f = num_clients // 5
        for row in range(num_clients):
            attacks = row >= num_clients - f
            updates[row].normal_(-3.0 if attacks else 1.0, 2.0 if attacks else 0.5, generator=draws)
        return Case(updates, f)


@dataclass(frozen=True)
class Call:
    """`run(fresh())` is timed, without `fresh`; its result is the aggregate as a tensor, or None."""

    run: Callable[[Any], Tensor | None]
    fresh: Callable[[], Any]


class Contestant(Protocol):
    """What each file of this package defines."""

    def prepare(self, row: str, case: Case) -> Call | str: ...
