"""Hardening: training on samples stamped with inverted triggers under their true labels, on benign clients.

Source: FLIP (Zhang et al., ICLR 2023), section 3 and appendix A.1. A pair of classes that are both present is hardened
symmetrically (triggers of both directions, samples of both classes stamped), a source whose target is absent
asymmetrically (the samples of the source only). Two variants:

- ``paper``: a class is present if the client has more than `min_images` images of it; triggers are inverted on images
  of the client; each batch is trained on as it is together with `extra` stamped samples, by SGD.
- ``released``: as the authors' published code does it: presence is counted in the batch, triggers are inverted on the
  batch's own images, a share of which is stamped in place, by Adam; a batch without a pair to harden is skipped.

Every pair is used for two batches, the second time after a short search from where the first ended. `pairs_at_once` is
our deviation: so many pairs are chosen and inverted as one batch before the model is trained on them in turn; with 1
the order is the authors'. Universal triggers of the warm-up are inverted in groups of the same size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from client.flip.distances import ClassDistances
from client.flip.triggers import Inverter, Search, Triggers, random_start
from client.trainer import LocalJob

Pair = tuple[int, int]  # source class, target class


@dataclass(frozen=True)
class HardeningSettings:
    """Constants of the hardening; see `client.training.flip` for FLIP's numbers."""

    variant: Literal["paper", "released"]
    batch_size: int
    limit: int  # optimiser steps in a round
    min_images: int
    portion: float
    extra: int
    samples: int
    warm_samples: int
    warm_steps: int
    first_steps: int
    second_steps: int
    alpha: float
    second_alpha: float
    max_size: float
    random_pairs: float
    pairs_at_once: int
    order: Literal["farthest", "closest"] = "farthest"
    warm_each_round: bool = False


@dataclass(frozen=True)
class Direction:
    """Samples of the classes `sources` ([classes], bool) are stamped with a trigger towards another class."""

    sources: Tensor
    trigger: int  # which of the triggers at hand


@dataclass
class Hardening:
    """One client's hardening in one round; `run` trains the job's model."""

    job: LocalJob
    settings: HardeningSettings
    distances: ClassDistances
    inverter: Inverter
    optimizer: torch.optim.Optimizer
    losses: list[Tensor] = field(default_factory=list)
    sizes: list[float] = field(default_factory=list)  # of the triggers that were trained with
    num_pairs: int = 0

    def __post_init__(self) -> None:
        job = self.job
        self.num_classes = job.dataset.num_classes
        self.labels = job.dataset.train_labels[job.indices]
        self.draw, self.poison = job.generator("flip"), job.generator("poison")
        self.released = self.settings.variant == "released"
        self.present = self._present(self.labels)

    def run(self) -> None:
        """Train for the round: warm-up until every class has a universal trigger, then pairs."""
        batches, position, k = self._plan(), 0, self.settings.pairs_at_once
        if self.settings.warm_each_round and len(batches) >= self.num_classes + 2:
            self.distances.cool()  # a client with fewer batches would never come to a pair
        while position < len(batches):
            cold = self.distances.cold
            part = batches[position : position + (min(k, len(cold)) if cold else 2 * k)]
            if cold:
                self._warm_up(part, cold[: len(part)])
            else:
                self._harden(part)
            position += len(part)

    def metrics(self) -> dict[str, float]:
        """Return what the client says about its hardening: pairs tried, triggers trained with, their mean size."""
        mean = sum(self.sizes) / len(self.sizes) if self.sizes else 0.0
        return {"flip-pairs": float(self.num_pairs), "flip-triggers": float(len(self.sizes)), "flip-size": mean}

    def _plan(self) -> list[Tensor]:
        """Return the round's batches as indices into the training split."""
        shuffle, s = self.job.generator("shuffle"), self.settings
        batches: list[Tensor] = []
        while len(self.job.indices) and len(batches) < s.limit:
            order = self.job.indices[torch.randperm(len(self.job.indices), generator=shuffle)]
            batches += order.split(s.batch_size)
        return batches[: s.limit]

    def _warm_up(self, batches: Sequence[Tensor], targets: Sequence[int]) -> None:
        """Invert universal triggers, from every other class to a batch's target, and train on the batches with them."""
        images = {c: self._images(c, self.settings.warm_samples) for c in range(self.num_classes) if self.present[c]}
        searches = [Search(self._join([images[c] for c in images if c != t]), t, self.settings.alpha) for t in targets]
        starts = random_start(len(searches), self.job.dataset.input_shape, self.draw)
        triggers = self.inverter(self.job.model, searches, starts, self.settings.warm_steps, self.draw)
        everyone = torch.arange(self.num_classes)
        for i, (batch, target) in enumerate(zip(batches, targets, strict=True)):
            self.distances.warm(target, float(triggers.sizes[i]), self.present)
            usable = float(triggers.sizes[i]) <= self.settings.max_size
            self._train(*self._read(batch), triggers, [Direction(everyone != target, i)] if usable else [])

    def _harden(self, batches: Sequence[Tensor]) -> None:
        """Choose a pair for every two batches; invert all and train on the first batches, then again on the second."""
        num = (len(batches) + 1) // 2
        read = [self._read(batch) for batch in batches[:num]]
        pairs: list[Pair | None] = []
        for _, labels in read:
            present = self._present(labels) if self.released else self.present
            taken = [pair for pair in pairs if pair is not None]
            closest = self.settings.order == "closest"
            pairs.append(self.distances.choose(present, self.settings.random_pairs, self.draw, taken, closest))
        self.num_pairs += sum(pair is not None for pair in pairs)
        self._visit(read, pairs, self.settings.first_steps, self.settings.alpha)
        read = [self._read(batch) for batch in batches[num:]]
        for visit in self._visit(read, pairs[: len(read)], self.settings.second_steps, self.settings.second_alpha):
            self.distances.update({way: size for way, size in visit.items() if size is not None}, len(visit) == 1)

    def _visit(
        self, read: Sequence[tuple[Tensor, Tensor]], pairs: Sequence[Pair | None], steps: int, alpha: float
    ) -> list[dict[Pair, float | None]]:
        """Invert the pairs of all batches at once, then train on the batches in turn.

        Returns the size of each direction that a batch's pair was inverted in, None where no trigger was found.
        """
        searches: list[Search] = []
        ways: list[list[Pair]] = []
        for (inputs, labels), pair in zip(read, pairs, strict=True):
            ways.append(self._ways(pair, labels))
            for source, target in ways[-1]:
                images = inputs[labels == source] if self.released else self._images(source, self.settings.samples)
                searches.append(Search(images, target, alpha, summed=len(ways[-1]) == 2))
        flat = [way for part in ways for way in part]
        triggers = self.inverter(self.job.model, searches, self._starts(flat), steps, self.draw)
        for i, way in enumerate(flat):
            self.distances.remember(*way, triggers, i)
        visits: list[dict[Pair, float | None]] = []
        first = 0
        for (inputs, labels), part in zip(read, ways, strict=True):
            which = range(first, first + len(part))
            usable = [i for i in which if float(triggers.sizes[i]) <= self.settings.max_size]
            classes = torch.arange(self.num_classes)
            directions = [Direction(classes == flat[i][0], i) for i in usable]
            if directions or not self.released:
                self._train(inputs, labels, triggers, directions)
            visits.append({flat[i]: float(triggers.sizes[i]) if bool(triggers.found[i]) else None for i in which})
            first += len(part)
        return visits

    def _ways(self, pair: Pair | None, labels: Tensor) -> list[Pair]:
        """Return the directions that a pair is inverted in, given who is present: both, one or none."""
        if pair is None:
            return []
        present = self._present(labels) if self.released else self.present
        source, target = pair
        if not present[source]:
            return []
        return [(source, target), (target, source)] if present[target] else [(source, target)]

    def _starts(self, ways: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        """Return the directions' last triggers, uniform ones where there are none."""
        masks, patterns = random_start(max(1, len(ways)), self.job.dataset.input_shape, self.draw)
        masks, patterns = masks[: len(ways)], patterns[: len(ways)]
        for i, way in enumerate(ways):
            if (start := self.distances.start(*way)) is not None:
                masks[i], patterns[i] = start
        return masks, patterns

    def _train(self, inputs: Tensor, labels: Tensor, triggers: Triggers, directions: Sequence[Direction]) -> None:
        """One step on a batch, stamped in place or joined by stamped samples; true labels throughout."""
        usable = [d for d in directions if bool(triggers.found[d.trigger])]
        self.sizes += [float(triggers.sizes[d.trigger]) for d in usable]
        stamp = self._stamp_in_place if self.released else self._add_stamped
        inputs, labels = stamp(inputs, labels, triggers, usable)
        for transform in self.job.late_transforms:
            inputs, labels = transform(inputs, labels, self.poison, self.job)
        self.optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(self.job.model(inputs), labels)
        loss.backward()
        self.optimizer.step()
        per_epoch = max(1, -(-len(self.job.indices) // self.settings.batch_size))
        for change in self.job.after_step:
            change(len(self.losses) % per_epoch, per_epoch, self.job)
        self.losses.append(loss.detach())

    def _stamp_in_place(
        self, inputs: Tensor, labels: Tensor, triggers: Triggers, directions: Sequence[Direction]
    ) -> tuple[Tensor, Tensor]:
        """Stamp, for each direction, the same share of the samples in the batch."""
        candidates = [d.sources[labels].nonzero().flatten() for d in directions]
        count = int(min((len(c) for c in candidates), default=0) * self.settings.portion)
        for direction, found in zip(directions, candidates, strict=True):
            chosen = found[torch.randperm(len(found), generator=self.draw)[:count]]
            inputs[chosen] = triggers.stamp(inputs[chosen], direction.trigger)
        return inputs, labels

    def _add_stamped(
        self, inputs: Tensor, labels: Tensor, triggers: Triggers, directions: Sequence[Direction]
    ) -> tuple[Tensor, Tensor]:
        """Join `extra` stamped samples of the client's data, in equal parts per direction, to the batch."""
        all_inputs, all_labels = [inputs], [labels]
        for direction in directions:
            pool = self.job.indices[direction.sources[self.labels]]
            if len(pool):
                draw = torch.randint(len(pool), (self.settings.extra // len(directions),), generator=self.draw)
                images, true = self.job.dataset.batch("train", pool[draw])
                all_inputs.append(triggers.stamp(images, direction.trigger))
                all_labels.append(true)
        return torch.cat(all_inputs), torch.cat(all_labels)

    def _present(self, labels: Tensor) -> Tensor:
        """Return which classes ([classes], bool) have more than `min_images` among the labels."""
        return torch.bincount(labels, minlength=self.num_classes) > self.settings.min_images

    def _read(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        inputs, labels = self.job.dataset.batch("train", batch)
        for transform in self.job.batch_transforms:
            inputs, labels = transform(inputs, labels, self.poison, self.job)
        return inputs, labels

    def _images(self, label: int, count: int) -> Tensor:
        """Return up to `count` random images of a class of this client."""
        pool = self.job.indices[self.labels == label]
        chosen = pool[torch.randperm(len(pool), generator=self.draw)[:count]]
        return self.job.dataset.batch("train", chosen)[0]

    def _join(self, images: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(images)) if images else self.job.dataset.batch("train", self.job.indices[:0])[0]
