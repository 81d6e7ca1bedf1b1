"""Aggregation rules: what a rule is, and the few things every rule needs.

A rule is a pure function on the stack of client updates, ``[clients, params]`` to ``[params]``. There are three kinds,
one decorator each; all of them take a tensor or a `Stack`, which may be mixed:

* A *weight rule* decides how much each client counts. Its file defines a function from the stack to one float64
  weight per row; the result is one weighted sum of rows, and `.weights` gives the weights, which the run record keeps.
  A rule that adds noise, or anything else, returns a `Decision`.
* A *coordinate rule* (median, trimmed mean) treats every parameter on its own: a function of a tensor of columns.
* A *stack rule* needs both (Bulyan): a function of the stack.

What a rule needs besides the updates stands between them and the ``*``, under a name that `strategies.context`
knows: ``generator``, ``clients``, ``history``, ``previous``, ``root_update``.
Updates are finite: replies that are not are dropped, with a reason, before a rule sees them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from strategies.stack import Stack, weighted_sum
from tasks.errors import AggregationError, ConfigError

__all__ = [
    "CoordinateRule", "Decision", "Mixing", "Rule", "Stack", "StackRule", "WeightRule", "claimable", "coordinate_rule",
    "count_byzantine", "mixing", "require_clients", "stack_rule", "uniform_weights", "weight_rule", "weighted_sum",
]  # fmt: skip

P = ParamSpec("P")
N = TypeVar("N", bound="Named")


@dataclass(frozen=True)
class Decision:
    """What a weight rule decided: one float64 weight per row, and what is added to their sum.

    That may be a vector, such as a share of the previous aggregate, and Gaussian noise for every parameter.
    """

    weights: Tensor
    noise_std: float = 0.0
    generator: torch.Generator | None = None
    added: Tensor | None = None  # [params]

    def complete(self, total: Tensor) -> Tensor:
        """Return the weighted sum of rows ``[params]`` with all that is added to it.

        Noise is drawn in float32 on the CPU, so that every device adds the same.
        """
        if self.added is not None:
            total = total + self.added.to(total)
        if self.noise_std:
            drawn = torch.randn(len(total), generator=self.generator)
            drawn = drawn.double() if total.dtype == torch.float64 else drawn  # where noise_std may leave float32
            total = total + (drawn * self.noise_std).to(total)
        return total


class Named:
    """A function under the name, signature and annotations that `tasks.spec` reads; pickled by name, as one is."""

    def __init__(self, function: Callable[..., object]) -> None:
        functools.update_wrapper(cast(Callable[..., object], self), function)

    def __reduce__(self) -> str:
        return self.__name__

    __name__: str
    takes_claims = False  # see `claimable`


class Rule(Named):
    """An aggregation rule of any kind."""


class WeightRule(Rule, Generic[P]):
    """A rule whose result is a weighted sum of the updates; call it for the sum, `.weights` for the weights."""

    def __init__(self, function: Callable[Concatenate[Stack, P], Tensor | Decision]) -> None:
        super().__init__(function)
        self._function = function

    def decide(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Decision:
        """Return the weights per row, and the noise if the rule adds any."""
        decision = self._function(Stack.of(updates), *args, **kwargs)
        return decision if isinstance(decision, Decision) else Decision(decision)

    def weights(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Return the weight of every row (``[rows]``, float64)."""
        return self.decide(updates, *args, **kwargs).weights

    def __call__(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        stack = Stack.of(updates)
        decision = self.decide(stack, *args, **kwargs)
        return decision.complete(stack.weighted_sum(decision.weights))


class CoordinateRule(Rule, Generic[P]):
    """A rule that treats every parameter on its own; a mixed stack is mixed block by block."""

    def __init__(self, function: Callable[Concatenate[Tensor, P], Tensor]) -> None:
        super().__init__(function)
        self._function = function

    def __call__(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        stack = Stack.of(updates)
        if stack.matrix is None:
            return self._function(stack.updates, *args, **kwargs)
        result = torch.empty(stack.num_params, dtype=stack.dtype, device=stack.device)
        for columns, block in stack.blocks():
            result[columns] = self._function(block, *args, **kwargs)
        return result


class StackRule(Rule, Generic[P]):
    """A rule that returns the aggregate from the whole stack."""

    def __init__(self, function: Callable[Concatenate[Stack, P], Tensor]) -> None:
        super().__init__(function)
        self._function = function

    def __call__(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return self._function(Stack.of(updates), *args, **kwargs)


class Mixing(Named, Generic[P]):
    """What happens to updates before a rule, as a matrix; call it for the mixed tensor, `.matrix` for the matrix."""

    def __init__(self, function: Callable[Concatenate[Stack, P], Tensor]) -> None:
        super().__init__(function)
        self._function = function

    def matrix(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        """Return the mixing matrix (``[new rows, rows]``, float64)."""
        return self._function(Stack.of(updates), *args, **kwargs)

    def __call__(self, updates: Tensor | Stack, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        stack = Stack.of(updates)
        return stack.mixed(self.matrix(stack, *args, **kwargs)).columns(slice(None))


def weight_rule(function: Callable[Concatenate[Stack, P], Tensor | Decision]) -> WeightRule[P]:
    """Make a rule of a function from a stack to weights ``[rows]`` (float64), or to a `Decision`."""
    return WeightRule(function)


def claimable(component: N) -> N:
    """Say of a weight rule that it gives equal weights to those it admits, of a mixing that it keeps clients apart.

    Either may shorten updates. Then the samples that clients claim can scale the weights as they do in a weighted mean,
    and no claim undoes the shortening. Weights that fall with the distance from others would be undone by a claim.
    """
    component.takes_claims = True
    return component


def coordinate_rule(function: Callable[Concatenate[Tensor, P], Tensor]) -> CoordinateRule[P]:
    """Make a rule of a function from columns ``[rows, columns]`` to ``[columns]``."""
    return CoordinateRule(function)


def stack_rule(function: Callable[Concatenate[Stack, P], Tensor]) -> StackRule[P]:
    """Make a rule of a function from a stack to the aggregate ``[params]``."""
    return StackRule(function)


def mixing(function: Callable[Concatenate[Stack, P], Tensor]) -> Mixing[P]:
    """Make a mixing of a function from a stack to the matrix ``[new rows, rows]`` (float64)."""
    return Mixing(function)


def count_byzantine(num_byzantine: int | float, num_clients: int) -> int:
    """Return f: an int is the count itself, a float in [0, 0.5) a share of the clients present, rounded down."""
    if isinstance(num_byzantine, float):
        if not 0.0 <= num_byzantine < 0.5:
            raise ConfigError(
                f"num_byzantine as a share must be in [0, 0.5), got {num_byzantine}; a count is written without a point"
            )
        return math.floor(num_byzantine * num_clients + 1e-9)  # 0.3 * 10 is 3, not 2.9999...
    if num_byzantine < 0:
        raise ConfigError(f"num_byzantine must be at least 0, got {num_byzantine}")
    return num_byzantine


def require_clients(rule: str, bound: str, minimum: int, num_clients: int, num_byzantine: int) -> None:
    """Raise `AggregationError` unless n >= `minimum`, which `bound` spells in terms of f, such as "2f + 3"."""
    if num_clients < minimum:
        raise AggregationError(
            f"{rule} wants n >= {bound} = {minimum}, got n = {num_clients} with f = {num_byzantine}; "
            "lower num_byzantine or sample more clients"
        )


def uniform_weights(updates: Stack, chosen: Tensor | None = None) -> Tensor:
    """Return equal float64 weights (``[rows]``) that sum to 1, on all rows or on the `chosen` indices alone."""
    if chosen is None:
        return torch.full((len(updates),), 1 / len(updates), dtype=torch.float64, device=updates.device)
    weights = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    return weights.index_fill_(0, chosen, 1 / len(chosen))
