"""From the updates of a round to its aggregate: mixings, then a rule; from the aggregate to the new model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from strategies.context import PER_CLIENT, RoundContext, needs, supply
from strategies.rule import Mixing, Stack, WeightRule, weighted_sum
from tasks.errors import AggregationError, ConfigError
from tasks.spec import Component, find, names


@dataclass(frozen=True)
class Aggregate:
    """The aggregate ``[params]``, and the weight that every client has in it, None where coordinates are weighed."""

    vector: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class Pipeline:
    """Mixings and a rule; `check` refuses those that cannot go together."""

    rule: Component
    mixing: Sequence[Component] = ()

    def check(self, claimed: bool = False) -> None:
        """Raise `ConfigError` if the rule looks at single clients but would be given mixtures of several.

        With `claimed` also if the samples that clients claim cannot scale its weights.
        """
        rule = self.rule.function
        if claimed and not isinstance(rule, WeightRule):
            raise ConfigError(f"client-weights = claimed needs a rule that weighs clients; {self.rule.name} does not")
        if claimed and isinstance(rule, WeightRule) and not rule.takes_claims:
            raise ConfigError(
                f"client-weights = claimed does not go with {self.rule.name}: it gives every client a weight of its "
                f"own, which a claim would undo; it goes with {', '.join(_claimable('rule'))}"
            )
        for mixing in self.mixing if claimed else ():
            if not cast(Mixing[...], mixing.function).takes_claims:
                raise ConfigError(
                    f"client-weights = claimed does not go with mixing {mixing.name}, which hands the rule mixtures of "
                    f"clients; it goes with {', '.join(_claimable('mixing'))}"
                )
        wanted = [name for name in needs(self.rule.function) if name in PER_CLIENT]
        if self.mixing and wanted:
            raise ConfigError(
                f"{self.rule.name} looks at single clients ({', '.join(wanted)}), but mixing "
                f"{' | '.join(map(str, self.mixing))} hands it mixtures of them; leave mixing empty"
            )

    def aggregate(
        self, updates: Tensor, context: RoundContext, claims: Sequence[float] | None = None, exposed: int = 0
    ) -> Aggregate:
        """Return the aggregate of ``[clients, params]``; `claims` of samples scale the weights that a rule gives.

        `exposed` Byzantine clients have shown themselves by replies that were dropped; as many fewer of the
        num_byzantine assumed are left, so that an attacker cannot use up a rule's margin by sending garbage.
        What the round remembers is written to `context.memory`; raises `AggregationError` if a precondition is broken.
        """
        if len(context.clients) != len(updates):
            raise AggregationError(f"{len(updates)} updates came with {len(context.clients)} client ids")
        self.check(claims is not None)
        stack = Stack.of(updates)
        for place, mixing in enumerate(self.mixing):
            offered = supply(mixing, context, updates, f"mixing {place}")
            matrix = cast(Mixing[...], mixing.function).matrix
            stack = stack.mixed(matrix(stack, *offered, **left_of(mixing, exposed)))
        offered = supply(self.rule, context, updates)
        rule = self.rule.function
        if not isinstance(rule, WeightRule):
            result = Aggregate(rule(stack, *offered, **left_of(self.rule, exposed)))
        else:
            decision = rule.decide(stack, *offered, **left_of(self.rule, exposed))
            weights = stack.client_weights(decision.weights)
            if claims is not None:
                weights = _scaled(weights, torch.tensor(claims, dtype=torch.float64))
            result = Aggregate(decision.complete(weighted_sum(weights, updates)), weights)
        if "previous" in needs(rule):
            context.memory["previous"] = result.vector.to(torch.float32)
        return result


def left_of(component: Component, exposed: int) -> dict[str, Any]:
    """Return a component's arguments with the count num_byzantine less those exposed; a share is of those present."""
    assumed = component.arguments.get("num_byzantine")
    if not isinstance(assumed, int):
        return component.arguments
    return {**component.arguments, "num_byzantine": max(0, assumed - exposed)}


def _scaled(weights: Tensor, claims: Tensor) -> Tensor:
    """Return weights times claims, these in units of their mean over all who count; unchanged where that is 0.

    Weights that are 1/m (m admitted) times a factor of shortening become claim / all admitted claims times that factor.
    """
    counted = claims[weights > 0]
    return weights * (claims / counted.mean()) if counted.sum() > 0 else weights


def _claimable(kind: str) -> list[str]:
    return [name for name in names(kind) if getattr(find(kind, name), "takes_claims", False)]


@dataclass(frozen=True)
class ServerStep:
    """model <- transforms(model + eta * optimizer(aggregate))."""

    optimizer: Component
    transforms: Sequence[Component] = ()
    server_lr: float = 1.0

    def __call__(self, model: Tensor, aggregate: Tensor, context: RoundContext) -> Tensor:
        """Return the new model ``[params]``, float32; optimisers and transforms keep state in `context.memory`."""
        direction = self.optimizer(aggregate.to(torch.float32), *supply(self.optimizer, context, model))
        model = torch.add(model, direction, alpha=self.server_lr)
        for place, transform in enumerate(self.transforms):
            model = transform(model, *supply(transform, context, model, f"transform {place}"))
        return model
