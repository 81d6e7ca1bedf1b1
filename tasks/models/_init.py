"""Initial parameters from an explicit generator: PyTorch's default distributions, without its global one."""

import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # the common base of BatchNorm1d to 3d has no public name
from torch.nn.modules.conv import _ConvNd

from tasks.errors import ConfigError


def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Draw all parameters of `model` anew, in the order of named_parameters, and reset batch-norm statistics.

    With a generator of the same seed the values equal those that PyTorch's constructors draw from the
    global generator. A layer that is not known here may bring ``initialise(generator)``; a layer with
    parameters and without it raises `ConfigError`, since its values would depend on the global generator.
    """
    done: set[int] = set()
    with torch.no_grad():
        for name, module in model.named_modules():
            own = [p for p in module.parameters(recurse=False) if id(p) not in done]
            if own:
                _draw(name, module, own, generator)
                done.update(map(id, own))
            elif isinstance(module, _BatchNorm):
                module.reset_running_stats()


def _draw(name: str, module: nn.Module, own: list[nn.Parameter], generator: torch.Generator) -> None:
    custom = getattr(module, "initialise", None)
    if callable(custom):
        custom(generator)
    elif isinstance(module, nn.Linear | _ConvNd):
        _draw_affine(module.weight, module.bias, own, generator)
    elif isinstance(module, nn.RNNBase):
        bound = 1 / math.sqrt(module.hidden_size)
        for parameter in own:
            parameter.uniform_(-bound, bound, generator=generator)
    elif isinstance(module, nn.Embedding):
        module.weight.normal_(generator=generator)
        if module.padding_idx is not None:
            module.weight[module.padding_idx].zero_()
    elif isinstance(module, _BatchNorm | nn.LayerNorm | nn.GroupNorm):
        module.reset_parameters()  # ones and zeros: no draws
    else:
        kind = type(module).__name__
        raise ConfigError(f"layer {name or 'model'} ({kind}) has parameters; give it a method initialise(generator)")


def _draw_affine(weight: Tensor, bias: Tensor | None, own: list[nn.Parameter], generator: torch.Generator) -> None:
    if any(p is weight for p in own):  # otherwise it is tied to a layer that has drawn it
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    if bias is not None:
        bound = 1 / math.sqrt(weight[0].numel())
        bias.uniform_(-bound, bound, generator=generator)
