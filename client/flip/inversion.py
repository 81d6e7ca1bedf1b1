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
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from client.flip._batch import Batch
from client.flip._convolution import fast_input_gradients
from client.flip.triggers import DEFAULTS, InversionSettings, Objective, Search, Triggers, check_inputs
from tasks.errors import SpecError


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
    check_inputs(searches[0].inputs)
    with frozen(model):
        rough = settings.precision == "bfloat16"
        work = Batch.of(objective or _cross_entropy(model, rough), searches, masks, patterns, settings)
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
