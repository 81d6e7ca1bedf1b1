"""Aggregation rules: what a rule is, and the few things every rule needs.

A rule is a pure function on the stack of client updates, ``[clients, params]`` to ``[params]``.
There are two kinds:

* A *weight rule* decides how much each client counts. Its file defines a function from the stack to
  one float64 weight per client, decorated with `weight_rule`; the result is one weighted sum of
  rows, and `.weights` gives the weights themselves, which the run record keeps.
* A *coordinate rule* (median, trimmed mean) treats every parameter on its own and is a plain function.

Updates are finite: replies that are not are dropped, with a reason, before a rule sees them.
"""

import functools
import math
from collections.abc import Callable
from typing import Concatenate, Generic, ParamSpec

import torch
from torch import Tensor

from tasks.errors import AggregationError, ConfigError

P = ParamSpec("P")

BLOCK_COLUMNS = 32768  # columns summed at once: 128 KiB of float32, so that the sums stay in the cache


class WeightRule(Generic[P]):
    """A rule whose result is a weighted sum of the updates; call it for the sum, `.weights` for the weights."""

    def __init__(self, weights: Callable[Concatenate[Tensor, P], Tensor]) -> None:
        functools.update_wrapper(self, weights)  # name, signature and annotations, which tasks.spec reads
        self.weights = weights

    def __call__(self, updates: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> Tensor:
        return weighted_sum(self.weights(updates, *args, **kwargs), updates)

    def __reduce__(self) -> str:
        return self.__name__  # pickled by name, as a function is: the module holds the rule under it

    __name__: str


def weight_rule(weights: Callable[Concatenate[Tensor, P], Tensor]) -> WeightRule[P]:
    """Make a rule of a function from updates ``[clients, params]`` to weights ``[clients]`` (float64)."""
    return WeightRule(weights)


def weighted_sum(weights: Tensor, updates: Tensor) -> Tensor:
    """Return sum_i weights[i] * updates[i] (``[params]``, in the dtype of `updates`).

    Fixed blocks of columns and, in each, clients in the order given: no difference was seen between numbers
    of threads, but the matrix product does not promise it, so a federation aggregates on one.
    Rows of weight 0 are not read, so that whatever they hold cannot reach the result.
    """
    num_clients, num_params = updates.shape
    if weights.shape != (num_clients,):
        raise AggregationError(f"wanted one weight per client, [{num_clients}], got {list(weights.shape)}")
    coefficients = weights.to(updates)
    total = updates.new_zeros(num_params)
    width = BLOCK_COLUMNS if updates.device.type == "cpu" else max(1, num_params)
    runs = _runs(weights)
    for start in range(0, num_params, width):
        part = total[start : start + width]
        block = updates[:, start : start + width]
        for run in runs:
            part.addmv_(block[run].t(), coefficients[run])
    return total


def _runs(weights: Tensor) -> list[slice]:
    """Return the runs of consecutive clients with a weight other than 0, so that views do and no row is copied."""
    runs: list[slice] = []
    for index in weights.nonzero().flatten().tolist():
        if runs and runs[-1].stop == index:
            runs[-1] = slice(runs[-1].start, index + 1)
        else:
            runs.append(slice(index, index + 1))
    return runs


def count_clients(updates: Tensor) -> int:
    """Return n of a stack ``[n, params]``; `AggregationError` if it is no such stack or has no client."""
    if updates.ndim != 2 or not updates.is_floating_point():
        came = f"{list(updates.shape)} of {updates.dtype}"
        raise AggregationError(f"a rule wants a floating-point stack [clients, params], got {came}")
    if not len(updates):
        raise AggregationError("a rule wants the update of at least one client, got none")
    return len(updates)


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


def uniform_weights(updates: Tensor, chosen: Tensor | None = None) -> Tensor:
    """Return equal float64 weights (``[clients]``) that sum to 1, on all clients or on the `chosen` indices alone."""
    if chosen is None:
        return torch.full((len(updates),), 1 / len(updates), dtype=torch.float64, device=updates.device)
    weights = torch.zeros(len(updates), dtype=torch.float64, device=updates.device)
    return weights.index_fill_(0, chosen, 1 / len(chosen))
