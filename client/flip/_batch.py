"""All searches of an inversion as one batch of tensors, and one step of them: see `client.flip.inversion`."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.flip.triggers import HALF, NOISE, InversionSettings, Objective, Search, Triggers

SAMPLES_AT_ONCE = 256  # forward and backward pass of so many samples stay in a core's cache


@dataclass
class Batch:
    """All searches as tensors: places are pixels (or features), channels the values in one; images lie channels-last.

    `raw` ([searches, places, 1 + channels]) holds the unconstrained mask, then the pattern.
    """

    objective: Objective
    settings: InversionSettings
    inputs: Tensor  # [samples, places, channels]
    shape: tuple[int, ...]  # of one input
    owner: Tensor  # [samples]: the search of each sample
    labels: Tensor  # [samples]
    scale: Tensor  # [samples]: weight of a sample's cross-entropy
    counts: Tensor  # [searches]
    raw: Tensor
    first: Tensor  # Adam's moments
    second: Tensor
    alpha: Tensor  # [searches]
    initial_alpha: Tensor
    best_size: Tensor
    best: Tensor  # [searches, places, 1 + channels], in [0, 1]
    up: Tensor  # consecutive steps with success, and without
    down: Tensor
    stale: Tensor  # steps since the last improvement
    done: int = 0

    @staticmethod
    def of(
        objective: Objective, searches: Sequence[Search], masks: Tensor, patterns: Tensor, settings: InversionSettings
    ) -> "Batch":
        counts = torch.tensor([len(s.inputs) for s in searches])
        shape = tuple(patterns.shape[1:])
        inputs = _places(torch.cat([s.inputs for s in searches]), shape)
        device, dtype = inputs.device, inputs.dtype
        owner = torch.repeat_interleave(torch.arange(len(searches)), counts)
        targets = torch.tensor([s.target for s in searches])
        weight = torch.tensor([1.0 if s.summed else 1 / max(1, len(s.inputs)) for s in searches], dtype=dtype)
        begin = torch.cat([_places(masks, tuple(masks.shape[1:])), _places(patterns, shape)], 2).to(device, dtype)
        raw = torch.atanh((begin - 0.5) * HALF)
        alpha = torch.tensor([s.alpha for s in searches], dtype=dtype, device=device)
        zeros = torch.zeros(len(searches), dtype=torch.int64, device=device)
        return Batch(
            objective=objective,
            settings=settings,
            inputs=inputs,
            shape=shape,
            owner=owner.to(device),
            labels=targets[owner].to(device),
            scale=weight[owner].to(device),
            counts=counts.to(device),
            raw=raw,
            first=torch.zeros_like(raw),
            second=torch.zeros_like(raw),
            alpha=alpha,
            initial_alpha=alpha.clone(),
            best_size=torch.full_like(alpha, torch.inf),
            best=torch.cat([torch.zeros_like(begin[..., :1]), begin[..., 1:]], 2),
            up=zeros,
            down=zeros.clone(),
            stale=zeros.clone(),
        )

    @torch.no_grad()
    def step(self, generator: torch.Generator) -> None:
        """One step of every search: gradient, Adam, schedule of alpha, best so far."""
        squashed = torch.tanh(self.raw)
        values = squashed / HALF + 0.5
        mask, pattern = values[..., :1], values[..., 1:]
        total, weighted, hits = self._gradients(mask, pattern)
        gradient = torch.cat([(pattern * total - weighted).sum(2, keepdim=True), mask * total], 2)
        gradient[..., :1] += self.alpha[:, None, None]  # of |m|_1; masks are never negative
        gradient *= (1 - squashed.square()) / HALF
        self._adam(gradient)
        size = mask.sum((1, 2))
        success = (hits >= self.settings.threshold * self.counts) & (self.counts > 0)
        self._schedule(success)
        self._keep(success & (size < self.best_size), size, values, generator)

    def _gradients(self, mask: Tensor, pattern: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return, per search, the sums of g and of g x ([searches, places, channels]) and the number of hits.

        g is the gradient of the weighted cross-entropy at the stamped samples.
        """
        total, weighted = torch.zeros_like(pattern), torch.zeros_like(pattern)
        hits = torch.zeros_like(self.alpha)
        for part in _parts(len(self.inputs)):
            inputs, owner, labels = self.inputs[part], self.owner[part], self.labels[part]
            stamped = inputs + mask[owner] * (pattern[owner] - inputs)
            with torch.enable_grad():
                stamped.requires_grad_(True)
                losses, logits = self.objective(_samples(stamped, self.shape), owner, labels)
                (gradient,) = torch.autograd.grad((losses * self.scale[part]).sum(), stamped)
            total.index_add_(0, owner, gradient)
            weighted.index_add_(0, owner, gradient * inputs)
            hits.index_add_(0, owner, _hits(losses, logits, labels))
        return total, weighted, hits

    @torch.no_grad()
    def check(self) -> None:
        """Give up the best triggers that do not reach the threshold, as those of a rounded model may not."""
        mask, pattern, hits = self.best[..., :1], self.best[..., 1:], torch.zeros_like(self.alpha)
        for part in _parts(len(self.inputs)):
            inputs, owner, labels = self.inputs[part], self.owner[part], self.labels[part]
            stamped = inputs + mask[owner] * (pattern[owner] - inputs)
            losses, logits = self.objective(_samples(stamped, self.shape), owner, labels)
            hits.index_add_(0, owner, _hits(losses, logits, labels))
        kept = (hits >= self.settings.threshold * self.counts) & (self.counts > 0)
        self.best_size = self.best_size.masked_fill(~kept, torch.inf)

    def _adam(self, gradient: Tensor) -> None:
        """Adam without weight decay, as `torch.optim.Adam`; every search is at the same step."""
        self.done += 1
        (b1, b2), lr = self.settings.betas, self.settings.lr
        self.first.lerp_(gradient, 1 - b1)
        self.second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        spread = (self.second.sqrt() / (1 - b2**self.done) ** 0.5).add_(1e-8)
        self.raw.addcdiv_(self.first, spread, value=-lr / (1 - b1**self.done))

    def _schedule(self, success: Tensor) -> None:
        """Raise a search's alpha after `patience` successful steps in a row, lower it after as many others."""
        s = self.settings
        self.up = (self.up + 1) * success
        self.down = (self.down + 1) * ~success
        higher, lower = self.up >= s.patience, self.down >= s.patience
        self.alpha = torch.where(higher, self.alpha * s.factor, self.alpha)
        self.alpha = torch.where(lower, self.alpha / s.factor**1.5, self.alpha)
        self.alpha = torch.where(self.alpha == 0, self.initial_alpha, self.alpha)  # after an underflow
        self.up, self.down = self.up * ~higher, self.down * ~lower

    def _keep(self, improved: Tensor, size: Tensor, values: Tensor, generator: torch.Generator) -> None:
        """Keep improved triggers, and re-set their searches to them plus noise."""
        noise = torch.rand(values.shape[1:], generator=generator, dtype=values.dtype).to(values.device)
        self.stale = (self.stale + 1) * ~improved
        if not bool(improved.any()):
            return
        better = improved[:, None, None]
        self.best_size = torch.where(improved, size, self.best_size)
        self.best = torch.where(better, values, self.best)
        again = (values + (2 * noise - 1) * NOISE).clamp_(0, 1)
        self.raw = torch.where(better, torch.atanh((again - 0.5) * HALF), self.raw)

    def triggers(self, mask_shape: Sequence[int], shape: Sequence[int]) -> Triggers:
        """Return the best triggers; masks that never succeeded are zero."""
        found = torch.isfinite(self.best_size)
        best = self.best.clamp(0, 1)
        masks = _samples(best[..., :1], tuple(mask_shape)) * found.view(-1, *(1 for _ in mask_shape))
        return Triggers(masks, _samples(best[..., 1:], tuple(shape)), masks.flatten(1).sum(1), found)


def _parts(count: int) -> list[slice]:
    return [slice(begin, begin + SAMPLES_AT_ONCE) for begin in range(0, count, SAMPLES_AT_ONCE)]


def _hits(losses: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return 1 for each sample that is classified as wanted, else 0 ([samples], of the losses' type)."""
    return ((logits.argmax(1) == labels) & torch.isfinite(losses)).to(losses.dtype)


def _places(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View inputs ([n, *shape]) as [n, places, channels]; only images have channels."""
    return values.permute(0, 2, 3, 1).flatten(1, 2) if len(shape) == 3 else values.flatten(1).unsqueeze(2)


def _samples(values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `_places`; images come out channels-last in memory."""
    if len(shape) == 3:
        return values.unflatten(1, shape[1:]).permute(0, 3, 1, 2)
    return values.squeeze(2).view(-1, *shape)
