"""The ways to get triggers, behind one interface: two searches, and the triggers that FLIP compares them with.

- ``neural_cleanse``: the search of `client.flip.inversion`, FLIP's own.
- ``neuron_stimulation``: after ABS (Liu et al., CCS 2019), as FLIP's appendix A.7 combines it: the neuron of the last
  hidden layer whose stimulation moves the samples most towards the target is found first, then a trigger is sought
  that excites this neuron and leaves the others as they are. Deviation: one neuron per search, and the mask's size is
  held down by the same schedule as in the other search. A.7 makes ten triggers a round: `steps=10` of the training.
- ``oracle``, ``random_white``, ``random_colour`` (appendix A.12): the attack's own trigger, which a defence cannot
  know; a white or coloured square at a random place. Nothing is inverted; every search gets such a trigger.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from client.attack import read_attack
from client.flip.inversion import frozen, invert
from client.flip.triggers import InversionSettings, Inverter, Objective, Search, Triggers
from client.trainer import LocalJob
from tasks.errors import SpecError

STIMULUS = 3.0  # a neuron is set to so many times its largest activation on the samples
REST = 1.0  # weight of the other neurons' mean change, in units of a neuron's mean activation
SIDE = 1 / 7  # of a random square, as a share of the image's shorter side: 4 of 28 pixels, the size of FLIP's trigger


def inverter(name: str, settings: InversionSettings, job: LocalJob) -> Inverter:
    """Return a technique by its name, for one client's work in one round."""
    if name == "neural_cleanse":
        return functools.partial(invert, settings=settings)
    if settings.precision != "float32":
        raise SpecError(f"inversion {name!r} has no precision {settings.precision!r}; that is neural_cleanse's alone")
    if name == "neuron_stimulation":
        return functools.partial(stimulate, settings=settings)
    if name == "oracle":
        return functools.partial(_repeat, *true_trigger(job))
    return functools.partial(random_squares, colour=name == "random_colour")


def stimulate(
    model: nn.Module,
    searches: Sequence[Search],
    start: tuple[Tensor, Tensor],
    steps: int,
    generator: torch.Generator,
    settings: InversionSettings,
) -> Triggers:
    """Seek triggers that excite, for each search, the neuron that stands for its target; as `invert` in the rest."""
    if not any(len(search.inputs) for search in searches):
        return invert(model, searches, start, steps, generator, settings)
    last = last_linear(model)
    kept: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, arguments: kept.append(arguments[0]))
    try:
        with frozen(model), torch.no_grad():
            known = [_neuron(model, last, search, kept) for search in searches]
        objective = _stimulation(model, kept, known)
        return invert(model, searches, start, steps, generator, settings, objective)
    finally:
        hook.remove()


def last_linear(model: nn.Module) -> nn.Linear:
    """Return a model's output layer; `SpecError` if its last linear layer is not one."""
    found = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not found:
        raise SpecError("inversion by neuron stimulation needs a model that ends in a linear layer; this one has none")
    return found[-1]


def _neuron(model: nn.Module, last: nn.Linear, search: Search, kept: list[Tensor]) -> tuple[int, Tensor, Tensor]:
    """Return (neuron, scale of activations [neurons], mean activations [neurons]) of a search.

    The neuron is the one that, set to STIMULUS times its largest activation, gives the target the largest mean margin.
    """
    width = last.in_features
    if not len(search.inputs):
        return 0, last.weight.new_ones(width), last.weight.new_zeros(width)
    kept.clear()
    logits = model(search.inputs)
    features = kept.pop()
    level = STIMULUS * features.amax(0).clamp_min(1e-6)  # [neurons]
    moved = logits[:, None, :] + (level - features)[:, :, None] * last.weight.T  # [samples, neurons, classes]
    target = moved[..., search.target].clone()
    moved[..., search.target] = -torch.inf
    neuron = int((target - moved.amax(2)).mean(0).argmax())
    return neuron, features.abs().mean(0) + features.abs().mean() + 1e-6, features.mean(0)


def _stimulation(model: nn.Module, kept: list[Tensor], known: Sequence[tuple[int, Tensor, Tensor]]) -> Objective:
    neurons = torch.tensor([neuron for neuron, _, _ in known])
    scales, rest = torch.stack([scale for _, scale, _ in known]), torch.stack([mean for _, _, mean in known])

    def objective(stamped: Tensor, owner: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        kept.clear()
        logits = model(stamped)
        relative = kept.pop() / scales[owner]
        excited = relative.gather(1, neurons.to(owner.device)[owner, None]).squeeze(1)
        changed = (relative - rest[owner] / scales[owner]).abs().mean(1)
        return REST * changed - excited, logits

    return objective


def true_trigger(job: LocalJob) -> tuple[Tensor, Tensor]:
    """Return (mask, pattern) of the run's attack; `SpecError` if it has no trigger that replaces input values."""
    attack = job.settings.attack if job.settings is not None else ""
    triggered = read_attack(attack).triggered
    if triggered is None:
        raise SpecError(f"inversion by oracle needs an attack with a trigger, got attack {attack!r}")
    blank = torch.zeros(1, *job.dataset.input_shape)
    labels = torch.zeros(1, dtype=torch.int64)
    dark, light = (triggered(blank + v, labels, job.dataset.num_classes)[0][0] for v in (0.25, 0.75))
    replaced = (dark == light).to(torch.float32)
    mask = replaced.amin(0, keepdim=True) if replaced.ndim == 3 else replaced
    if not bool(mask.any()):
        raise SpecError(f"inversion by oracle needs a trigger that replaces input values, which {attack!r} does not")
    return mask, dark


def random_squares(
    model: nn.Module,
    searches: Sequence[Search],
    start: tuple[Tensor, Tensor],
    steps: int,
    generator: torch.Generator,
    *,
    colour: bool,
) -> Triggers:
    """Return for each search a square at a random place, white or of one random colour; images only."""
    masks, patterns = torch.zeros_like(start[0]), torch.ones_like(start[1])
    if masks.ndim != 4:
        raise SpecError(f"random triggers are squares in images, but inputs have shape {tuple(patterns.shape[1:])}")
    height, width = masks.shape[-2:]
    side = max(1, round(SIDE * min(height, width)))
    for i in range(len(searches)):
        draw = torch.rand(2 + patterns.shape[1], generator=generator)
        row, column = int(draw[0] * (height - side + 1)), int(draw[1] * (width - side + 1))
        masks[i, 0, row : row + side, column : column + side] = 1.0
        if colour:
            patterns[i] = draw[2:, None, None]
    return _triggers(masks, patterns)


def _repeat(mask: Tensor, pattern: Tensor, model: nn.Module, searches: Sequence[Search], *_: object) -> Triggers:
    return _triggers(mask.expand(len(searches), *mask.shape), pattern.expand(len(searches), *pattern.shape))


def _triggers(masks: Tensor, patterns: Tensor) -> Triggers:
    return Triggers(masks, patterns, masks.flatten(1).sum(1), torch.ones(len(masks), dtype=torch.bool))
