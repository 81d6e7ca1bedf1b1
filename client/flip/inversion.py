"""Trigger inversion: the smallest mask and pattern that turn samples of some classes into another, many at once.

Source: FLIP (Zhang et al., ICLR 2023), equations 1-2, which search as Neural Cleanse (Wang et al., S&P 2019) does:
``x' = (1 - m) x + m p``, minimise ``CE(f(x'), t) + alpha |m|_1``. Mask and pattern are ``tanh(u) / (2 - 1e-7) + 1/2``,
found by Adam (0.9 -> betas 0.5, 0.9; rate 0.1); alpha rises by 1.5 after ten successful steps in a row and falls by
1.5 ** 1.5 after ten others; the smallest successful mask so far is kept, and the search is re-set to it, plus noise of
0.01, whenever it improves.

A *search* is one trigger: its samples, its target and its mask. Any number of searches run as one batch: every step is
one forward and backward pass over all their samples, and each search has its own alpha, counters, Adam moments and
best mask. In evaluation mode samples do not influence each other, so a search ends with the same trigger whatever else
is in the batch, up to the rounding of the model's own arithmetic for other batch sizes; the noise of step k is the same
field for all searches. The gradient of mask and pattern is summed by hand from the one of the stamped inputs. With
the precision bfloat16 the search sees a model rounded to it, and its triggers are tried on the exact one at the end.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.flip._convolution import fast_input_gradients
from tasks.errors import SpecError

HALF = 2 - 1e-7  # of the tanh parametrisation; keeps the inverse finite at 0 and 1
NOISE = 0.01  # of a re-set search
SAMPLES_AT_ONCE = 256  # forward and backward pass of so many samples stay in a core's cache


@dataclass(frozen=True)
class Search:
    """What a trigger is sought on: samples ([n, ...], in the model's input range), and the class to turn them into."""

    inputs: Tensor
    target: int
    alpha: float = 1e-3  # initial weight of the mask's size
    summed: bool = False  # the cross-entropy is summed over the samples, not averaged (FLIP's joint searches)


@dataclass(frozen=True)
class Triggers:
    """Masks ([searches, 1, height, width], or [searches, features]) and patterns ([searches, *input shape]) in [0, 1].

    `sizes` ([searches]) are the masks' L1 norms: 0 where `found` ([searches], bool) is False and the mask is zero.
    """

    masks: Tensor
    patterns: Tensor
    sizes: Tensor
    found: Tensor

    def __len__(self) -> int:
        return len(self.sizes)

    def stamp(self, inputs: Tensor, which: Tensor | int) -> Tensor:
        """Return inputs ([n, ...]) with trigger `which` (one, or [n] of them) stamped on: ``(1 - m) x + m p``."""
        mask, pattern = self.masks[which], self.patterns[which]
        return inputs + mask * (pattern - inputs)

    def __getitem__(self, which: Tensor | slice | Sequence[int]) -> "Triggers":
        return Triggers(self.masks[which], self.patterns[which], self.sizes[which], self.found[which])


Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class InversionSettings:
    """The search's constants; the defaults are FLIP's for MNIST."""

    threshold: float = 0.9  # success rate from which a mask counts
    lr: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    patience: int = 10
    factor: float = 1.5
    early_exit: int = 0  # end when no search has improved for so many steps; 0: all steps, as in the paper
    precision: Precision = "float32"  # of the model's passes: bfloat16 is twice as fast where processors have it


DEFAULTS = InversionSettings()

# (model, searches, starts: masks and patterns, steps, generator) -> triggers
Inverter = Callable[[nn.Module, Sequence[Search], tuple[Tensor, Tensor], int, torch.Generator], Triggers]


class Objective(Protocol):
    """What a search minimises besides the mask's size: (stamped samples, their searches, targets) -> (losses, logits).

    Samples are ``[n, ...]``, searches, targets and losses ``[n]``, logits ``[n, classes]``; these tell success.
    """

    def __call__(self, stamped: Tensor, owner: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]: ...


def random_start(num_searches: int, input_shape: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return uniform masks and patterns in [0, 1): FLIP's start, without knowledge of any trigger."""
    mask_shape = (1, *input_shape[1:]) if len(input_shape) == 3 else tuple(input_shape)
    masks, patterns = [], []
    for _ in range(num_searches):  # search by search, so that a search's start does not depend on how many follow
        masks.append(torch.rand(mask_shape, generator=generator))
        patterns.append(torch.rand(tuple(input_shape), generator=generator))
    return torch.stack(masks), torch.stack(patterns)


def invert(
    model: nn.Module,
    searches: Sequence[Search],
    start: tuple[Tensor, Tensor],
    steps: int,
    generator: torch.Generator,
    settings: InversionSettings = DEFAULTS,
    objective: Objective | None = None,
) -> Triggers:
    """Run all searches for `steps` steps from `start` (masks, patterns) and return the best trigger of each.

    A search without samples, or that never reaches the threshold, ends not found with mask and size 0. The model's
    parameters are untouched; `objective` is the cross-entropy unless given. Starts that do not fit: `SpecError`.
    """
    masks, patterns = start
    if len(masks) != len(searches) or len(patterns) != len(searches):
        raise SpecError(f"invert wants a start for each of {len(searches)} searches, got {len(masks)}, {len(patterns)}")
    if not searches:
        return Triggers(masks, patterns, torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    with frozen(model):
        rough = settings.precision == "bfloat16"
        work = _Batch.of(objective or _cross_entropy(model, rough), searches, masks, patterns, settings)
        with rounded(model) if rough else contextlib.nullcontext(), fast_input_gradients(model):
            for _ in range(steps):
                work.step(generator)
                if settings.early_exit and int(work.stale.min()) >= settings.early_exit:
                    break
        if rough:
            work.objective = _cross_entropy(model)
            work.check()
    return work.triggers(masks.shape[1:], patterns.shape[1:])


def _cross_entropy(model: nn.Module, rough: bool = False) -> Objective:
    def objective(stamped: Tensor, owner: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = model(stamped.bfloat16()).to(stamped.dtype) if rough else model(stamped)
        return functional.cross_entropy(logits, targets, reduction="none"), logits

    return objective


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode without gradients of its parameters, and back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval()
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def rounded(model: nn.Module) -> Iterator[None]:
    """Round a frozen model's parameters and buffers to bfloat16, and put the exact ones back at the end."""
    exact = [(t, t.data) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    for tensor, values in exact:
        tensor.data = values.bfloat16()
    try:
        yield
    finally:
        for tensor, values in exact:
            tensor.data = values


@dataclass
class _Batch:
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
    ) -> "_Batch":
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
        return _Batch(
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
