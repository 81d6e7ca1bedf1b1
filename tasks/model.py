"""Building a model whose parameters depend on an explicit generator alone."""

from typing import Protocol

import torch
from torch import nn

from tasks.models._init import initialise
from tasks.models._layers import SeededDropout, set_dropout_generator

__all__ = ["Builder", "SeededDropout", "build", "initialise", "set_dropout_generator"]


class Builder(Protocol):
    """A model component with its hyper-parameters bound, such as `tasks.spec.Component`."""

    def __call__(self, input_shape: tuple[int, ...], num_classes: int, /) -> nn.Module: ...


def build(component: Builder, input_shape: tuple[int, ...], num_classes: int, generator: torch.Generator) -> nn.Module:
    """Return the model, on the CPU and in training mode, its parameters drawn from `generator`.

    The global generator is left as it was, and nothing depends on it.
    """
    # PyTorch's constructors draw from the global generator; those draws are thrown away.
    with torch.random.fork_rng(devices=[]):
        model = component(input_shape, num_classes)
    initialise(model, generator)
    return model.train()
