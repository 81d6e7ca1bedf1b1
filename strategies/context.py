"""What a round offers to rules, mixings, optimisers and transforms besides the updates, by the name of a parameter.

A component asks for it with a positional parameter before its ``*``; the pure function gets plain values and a
caller with no federation can pass its own:

    clients       the ids of the clients that the rows belong to, a list
    round         the number of the round, from 1
    generator     the component's own generator of this round
    history       per row, the sum of all updates its client has sent up to now, ``[rows, params]``, float32
    previous      the aggregate of the round before, ``[params]``, float32; 0 in the first
    root_update   the server's own update from data it trusts, ``[params]``, float32
    memory        a dictionary of tensors that is the component's own, kept from round to round

What has to outlast a round is in `memory`, which goes into the checkpoint of the run. A transform that gives clients
another model than the one that is evaluated and kept leaves it there under `BROADCAST`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tasks.errors import AggregationError, ConfigError
from tasks.params import Layout
from tasks.rng import generator
from tasks.spec import Component

NAMES = ("clients", "round", "generator", "history", "previous", "root_update", "memory")
BROADCAST = "broadcast"  # in memory: what clients get in the next round in place of the model, ``[params]``
PER_CLIENT = ("clients", "history")  # what is known of a client has no meaning for a mixture of several


@dataclass
class RoundContext:
    """What is known in a round; `memory` is changed only by a round that succeeds, see `Pipeline`."""

    clients: Sequence[int]
    round: int = 1
    seed: int = 0
    layout: Layout | None = None
    root: Callable[[], Tensor] | None = None  # trains the server's own update
    memory: dict[str, Tensor] = field(default_factory=dict)

    def generator(self, purpose: str) -> torch.Generator:
        """Return this round's generator for one purpose, such as the name of a component."""
        return generator(self.seed, "server", "round", self.round, purpose)


def needs(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names that a component wants besides what it works on; an unknown name raises `ConfigError`."""
    positional = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ][1:]
    if unknown := [name for name in positional if name not in NAMES]:
        raise ConfigError(f"{function.__name__} wants {unknown[0]!r}, but a round offers: {', '.join(NAMES)}")
    return tuple(positional)


def supply(component: Component, context: RoundContext, updates: Tensor, place: str = "") -> tuple[Any, ...]:
    """Return what a component wants besides the updates ``[clients, params]`` of this round, in its order.

    `place` in a chain gives two components of one name generators of their own.
    """
    return tuple(_supply(name, component, context, updates, place) for name in needs(component.function))


def _supply(name: str, component: Component, context: RoundContext, updates: Tensor, place: str) -> Any:
    if name == "clients":
        return list(context.clients)
    if name == "round":
        return context.round
    if name == "generator":
        return context.generator(f"{place} {component.name}".strip())
    if name == "memory":
        return context.memory
    if name == "previous":
        return context.memory.get("previous", updates.new_zeros(updates.shape[1]))
    if name == "history":
        return _history(component, context, updates)
    if context.root is None:
        raise AggregationError(f"{component.name} wants data of the server's own: set root-samples, for example to 100")
    return context.root()


def _history(component: Component, context: RoundContext, updates: Tensor) -> Tensor:
    """Return the sums of the updates that these clients have sent, this round's included, and remember them."""
    columns = feature_columns(component, context.layout, updates.shape[1])
    known = context.memory.get("history.clients", torch.empty(0, dtype=torch.int64)).tolist()
    sums = context.memory.get("history", torch.empty(0, columns.stop - columns.start))
    place = {client: row for row, client in enumerate(known)}
    new = [client for client in context.clients if client not in place]
    place.update({client: len(known) + row for row, client in enumerate(new)})
    sums = torch.cat([sums, torch.zeros(len(new), sums.shape[1])])
    rows = torch.tensor([place[client] for client in context.clients], dtype=torch.int64)
    sums.index_add_(0, rows, updates[:, columns].to(sums))
    context.memory["history.clients"] = torch.tensor([*known, *new], dtype=torch.int64)
    context.memory["history"] = sums
    return sums[rows]


def feature_columns(component: Component, layout: Layout | None, num_params: int) -> slice:
    """Return the columns that a rule with the argument ``features`` looks at: all, or the output layer's weight."""
    features = component.arguments.get("features", _default(component, "features"))
    if features != "output" or layout is None:
        return slice(0, num_params)
    start, found = 0, slice(0, num_params)
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        size = torch.Size(shape).numel()
        if len(shape) >= 2 and name.endswith("weight"):
            found = slice(start, start + size)
        start += size
    return found


def _default(component: Component, name: str) -> Any:
    parameter = inspect.signature(component.function).parameters.get(name)
    return None if parameter is None else parameter.default
