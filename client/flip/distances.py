"""Class distances of one client: how small a trigger turns one class into another, and which pair to harden next.

Source: FLIP (Zhang et al., ICLR 2023), section 3 and appendix A.1: universal triggers give a first distance for every
class (warm-up); pairs are then inverted one by one, with probability 0.3 a random one, else the most promising, and
each second visit updates the pair's distance and priority. Priority is the distance divided by the largest one, later
the running mean of its relative changes, as in the authors' released code; the paper's text speaks of the variance of
the loss per source, which that code computes and never reads.

What is kept between rounds (distances, priorities, the best trigger of each direction) lives in a client's state; masks
and patterns are kept as float16, because they only start the next search.
"""

import dataclasses
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from client.flip.triggers import Triggers

PREFIX = "flip."


@dataclass
class ClassDistances:
    """Distances and priorities ([classes, classes], source by target) of one client, and its triggers so far."""

    sizes: Tensor
    priority: Tensor  # -inf: not warmed up
    previous: int = -1  # the last promising pair's source
    cache: dict[tuple[int, int], tuple[Tensor, Tensor]] = field(default_factory=dict)  # -> mask, pattern (float16)

    @staticmethod
    def new(num_classes: int) -> "ClassDistances":
        """Return the state of a client that has never taken part."""
        zeros = torch.zeros(num_classes, num_classes)
        return ClassDistances(zeros, torch.full_like(zeros, -torch.inf))

    @property
    def num_classes(self) -> int:
        return len(self.sizes)

    def cool(self) -> None:
        """Forget all distances, not the triggers: the next round begins with a warm-up again."""
        self.sizes.zero_()
        self.priority.fill_(-torch.inf)

    @property
    def cold(self) -> list[int]:
        """The target classes whose universal trigger is still to be inverted."""
        return torch.isinf(self.priority).all(0).nonzero().flatten().tolist()

    def warm(self, target: int, size: float, present: Tensor) -> None:
        """Take a universal trigger's size: the distance to `target` from every class `present` ([classes], bool)."""
        self.sizes[:, target] = size * present
        self.priority[:, target] = size * present
        if not self.cold and float(largest := self.priority.max()) > 0:
            self.priority /= largest

    def choose(
        self,
        present: Tensor,
        random_pairs: float,
        generator: torch.Generator,
        taken: Collection[tuple[int, int]] = (),
        closest: bool = False,
    ) -> tuple[int, int] | None:
        """Return (source, target) to harden next: a random pair or the most promising; None if there is none.

        The source is one of the classes `present` ([classes], bool); pairs in `taken` are left out, either way round.
        The most promising is the one of the largest priority, or with `closest` that of the smallest distance.
        """
        sources = [c for c in range(self.num_classes) if bool(present[c])]
        draw = torch.rand(3, generator=generator, dtype=torch.float64)  # always three, so that choices stay aligned
        if not sources or self.num_classes < 2:
            return None
        if float(draw[0]) < random_pairs:
            source = sources[int(draw[1] * len(sources))]
            target = int(draw[2] * (self.num_classes - 1))
            pair = (source, target + (target >= source))
            if pair not in taken and pair[::-1] not in taken:
                return pair
        best, size = None, 0.0
        for source in sources:
            promise = 1 / self.sizes[source] if closest else self.priority[source]
            for target, value in enumerate(promise.nan_to_num(0.0, posinf=0.0).tolist()):  # no distance: no promise
                free = (source, target) not in taken and (target, source) not in taken
                if source not in (self.previous, target) and free and (value > size or best is None) and value != 0:
                    best, size = (source, target), value
        if best is not None:
            self.previous = best[0]
        return best

    def update(self, found: Mapping[tuple[int, int], float], target_absent: bool = False) -> None:
        """Take the sizes that a pair's second visit found, by (source, target): each direction gets their mean.

        A direction that was not found keeps its distance. Where the target is absent, the reverse has no priority.
        """
        size = sum(found.values()) / max(1, len(found))
        for source, target in found:
            old = float(self.sizes[source, target])
            change = (size - old) / old if old > 0 else 0.0
            self.priority[source, target] = (float(self.priority[source, target]) + change) / 2
            self.sizes[source, target] = size
            if target_absent:
                self.priority[target, source] = 0.0

    def remember(self, source: int, target: int, triggers: Triggers, which: int) -> None:
        """Keep a found trigger as the start of the direction's next search."""
        if bool(triggers.found[which]):
            self.cache[source, target] = (triggers.masks[which].half(), triggers.patterns[which].half())

    def start(self, source: int, target: int) -> tuple[Tensor, Tensor] | None:
        """Return (mask, pattern) to start a direction's search from, None if it has not been found before."""
        kept = self.cache.get((source, target))
        return None if kept is None else (kept[0].float(), kept[1].float())

    def save(self, state: MutableMapping[str, Tensor]) -> None:
        """Write everything into a client's state."""
        state[PREFIX + "sizes"], state[PREFIX + "priority"] = self.sizes, self.priority
        state[PREFIX + "previous"] = torch.tensor(self.previous)
        if self.cache:
            state[PREFIX + "pairs"] = torch.tensor(list(self.cache))
            state[PREFIX + "masks"] = torch.stack([mask for mask, _ in self.cache.values()])
            state[PREFIX + "patterns"] = torch.stack([pattern for _, pattern in self.cache.values()])

    @staticmethod
    def load(state: MutableMapping[str, Tensor], num_classes: int, input_shape: tuple[int, ...]) -> "ClassDistances":
        """Read a client's state; one that is empty, or of another task, gives a new one."""
        fresh = ClassDistances.new(num_classes)
        sizes = state.get(PREFIX + "sizes")
        if sizes is None or sizes.shape != fresh.sizes.shape:
            return fresh
        loaded = dataclasses.replace(
            fresh,
            sizes=sizes.clone(),
            priority=state[PREFIX + "priority"].clone(),
            previous=int(state[PREFIX + "previous"]),
        )
        if PREFIX + "pairs" in state and tuple(state[PREFIX + "patterns"].shape[1:]) == input_shape:
            kept = zip(state[PREFIX + "pairs"].tolist(), state[PREFIX + "masks"], state[PREFIX + "patterns"])
            loaded.cache = {(source, target): (mask, pattern) for (source, target), mask, pattern in kept}
        return loaded
