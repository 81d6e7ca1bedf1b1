"""The updates of a round as rules see them: the rows of a tensor, or mixtures of them that never exist in memory.

A mixing (nearest neighbours, bucketing, clipping) is a matrix: row i of the mixed stack is sum_j matrix[i, j] x_j. What
distance-based rules need of the mixed rows follows from n x n numbers about the updates themselves; what they return,
one weight per mixed row, is carried back to one weight per client by the transposed matrix. So a chain of
mixings and a rule still ends in one weighted sum of the updates. Coordinate-wise rules mix block by block of columns.

With v the difference of two rows of a matrix whose rows sum to 1, and E the squared distances of the updates, the mixed
rows are sqrt(-1/2 v^T E v) apart (Schoenberg 1935): what the updates have in common cancels before it is rounded. Where
rows do not sum to 1, as after clipping, the origin is one more point, and v^T G v with the Gram matrix G of all points
around a central update is used: it holds the direction of an outlier, however far it is, which its distances do not.
"""

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from strategies.distances import dots, gram, majority_gram, norms, squared_distances
from tasks.errors import AggregationError

BLOCK_COLUMNS = 32768  # columns summed or mixed at once: 128 KiB of float32 a row, so that sums stay in the cache
LARGEST = 1e300  # stands for squared distances that no float64 holds: 0 times it is 0
CANCELLED = 1e-7  # share of its terms below which a squared distance of mixed rows is computed again, exactly
BALANCED = 1e-12  # a mixed row whose coefficients sum to 1, but for rounding


class Stack:
    """Updates ``[rows, params]``, finite, plain or mixed; what is computed from all of them is kept."""

    def __init__(
        self,
        updates: Tensor,
        matrix: Tensor | None = None,
        source: "Stack | None" = None,
        chosen: Tensor | None = None,
    ) -> None:
        self.updates = updates
        self.matrix = matrix  # [rows, clients], float64; None: the updates themselves
        self._source = source  # the plain stack, whose distances are computed once
        self._chosen = chosen  # where the matrix does nothing but choose updates: which

    @staticmethod
    def of(updates: "Tensor | Stack") -> "Stack":
        """Return `updates` as a stack; `AggregationError` if they are no floating-point ``[clients, params]``."""
        if isinstance(updates, Stack):
            return updates
        if updates.ndim != 2 or not updates.is_floating_point():
            came = f"{list(updates.shape)} of {updates.dtype}"
            raise AggregationError(f"a rule wants a floating-point stack [clients, params], got {came}")
        if not len(updates):
            raise AggregationError("a rule wants the update of at least one client, got none")
        return Stack(updates.detach())

    def __len__(self) -> int:
        return len(self.updates if self.matrix is None else self.matrix)

    @property
    def num_params(self) -> int:
        return self.updates.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.updates.dtype

    @property
    def device(self) -> torch.device:
        return self.updates.device

    @cached_property
    def squared_distances(self) -> Tensor:
        """||x_i - x_j||^2 of the rows (``[rows, rows]``, float64): symmetric, zero diagonal, never negative."""
        if self.matrix is None:
            return squared_distances(self.updates)
        if not self._rest.any():
            return _between(self.matrix, self._plain.squared_distances.clamp(max=LARGEST) / -2)
        return _between(self._points, self._plain.with_origin)

    @cached_property
    def norms(self) -> Tensor:
        """The L2 norms of the rows (``[rows]``, float64)."""
        if self.matrix is None:
            return norms(self.updates)
        return self.products().diagonal().sqrt()

    @cached_property
    def majority_products(self) -> Tensor:
        """<x_i - c, x_j - c> (``[rows, rows]``, float64) around a row c that lies with the majority."""
        return majority_gram(self.updates) if self.matrix is None else self.products(self._medoid)

    def products(self, centre: int | None = None) -> Tensor:
        """Return <x_i - c, x_j - c> (``[rows, rows]``, float64) around row `centre`, or around the origin."""
        if self.matrix is None:
            everyone = torch.arange(len(self), device=self.device)
            return gram(self.updates, centre, everyone)
        points = self._points
        if centre is None:
            rays = points.clone()
            rays[:, -1] -= 1
        else:
            rays = points - points[centre]
        products = rays @ self._plain.with_origin @ rays.t()
        return (products + products.t()).div_(2)

    def cosines(self) -> Tensor:
        """Return the cosine of the angle of every two rows (``[rows, rows]``, float64); 0 where a row is 0."""
        products = self.products()
        lengths = products.diagonal().clamp(min=0).sqrt()
        both = lengths[:, None] * lengths
        return torch.where(both > 0, products / both.where(both > 0, 1.0), 0.0).clamp(-1, 1)

    def columns(self, chosen: Tensor | slice) -> Tensor:
        """Return some columns of the rows (``[rows, chosen]``), mixed; a view of the updates where it can be."""
        block = self.updates[:, chosen] if isinstance(chosen, slice) else self.updates.index_select(1, chosen)
        if self._chosen is not None:
            return block.index_select(0, self._chosen)
        return block if self.matrix is None else self.matrix.to(block.dtype) @ block

    def blocks(self, width: int = BLOCK_COLUMNS) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, rows ``[rows, columns]``), mixed, from left to right."""
        for start in range(0, self.num_params, width):
            columns = slice(start, min(start + width, self.num_params))
            yield columns, self.columns(columns)

    def dots(self, vector: Tensor) -> Tensor:
        """Return the inner products of the rows with `vector` ``[params]`` (``[rows]``, float64)."""
        total = dots(self.updates, vector)
        return total if self.matrix is None else self.matrix @ total

    def rows(self, chosen: Tensor) -> "Stack":
        """Return the stack of the rows with the indices `chosen`, without a copy of them."""
        matrix = torch.eye(len(self), dtype=torch.float64, device=self.device) if self.matrix is None else self.matrix
        kept = chosen if self.matrix is None else None if self._chosen is None else self._chosen[chosen]
        part = Stack(self.updates, matrix[chosen], self._plain, kept)
        part.__dict__["squared_distances"] = self.squared_distances[chosen][:, chosen]
        return part

    def mixed(self, matrix: Tensor) -> "Stack":
        """Return the stack whose row i is sum_j matrix[i, j] x_j; `matrix` is ``[new rows, rows]``, float64."""
        if matrix.ndim != 2 or matrix.shape[1] != len(self) or not len(matrix):
            raise AggregationError(f"a mixing matrix is [new rows, {len(self)}], got {list(matrix.shape)}")
        matrix = matrix.to(dtype=torch.float64, device=self.device)
        return Stack(self.updates, matrix if self.matrix is None else matrix @ self.matrix, self._plain)

    def client_weights(self, weights: Tensor) -> Tensor:
        """Return the weight of every client (``[clients]``) in the sum of rows with `weights` ``[rows]``."""
        if weights.shape != (len(self),):
            raise AggregationError(f"wanted one weight per row, [{len(self)}], got {list(weights.shape)}")
        return weights if self.matrix is None else self.matrix.t() @ weights.to(self.matrix)

    def weighted_sum(self, weights: Tensor) -> Tensor:
        """Return the sum of rows with `weights` ``[rows]`` (``[params]``, in the dtype of the updates)."""
        return weighted_sum(self.client_weights(weights), self.updates)

    @property
    def _plain(self) -> "Stack":
        return self._source or self

    @cached_property
    def with_origin(self) -> Tensor:
        """Of a plain stack: inner products of the updates and, last, the origin around a central update."""
        central = self._medoid
        products = gram(self.updates, central, torch.arange(len(self), device=self.device))
        away = self.dots(self.updates[central])
        towards = away[central] - away  # <x_i - c, 0 - c>
        whole = torch.cat([products, towards[:, None]], 1)
        return torch.cat([whole, torch.cat([towards, away[central : central + 1]])[None]])

    @property
    def _medoid(self) -> int:
        """The row whose median distance to the others is least, which lies with the majority."""
        return int(self.squared_distances.sort(1).values[:, len(self) // 2].argmin())

    @cached_property
    def _rest(self) -> Tensor:
        """What the coefficients of each row lack to sum to 1: its coefficient of the origin."""
        assert self.matrix is not None
        rest = 1 - self.matrix.sum(1)
        return torch.where(rest.abs() <= BALANCED, 0.0, rest)

    @property
    def _points(self) -> Tensor:
        assert self.matrix is not None
        return torch.cat([self.matrix, self._rest[:, None]], 1)


def _between(points: Tensor, form: Tensor) -> Tensor:
    """Return v^T form v for the difference v of every two rows of `points` (``[rows, rows]``)."""
    products = points @ form @ points.t()
    own = products.diagonal()
    distances = own[:, None] + own - 2 * products
    size = points.abs() @ form.abs() @ points.abs().t()
    scale = size.diagonal()[:, None] + size.diagonal() + 2 * size
    first, second = torch.nonzero((~(distances > CANCELLED * scale)).triu(1), as_tuple=True)
    for part in range(0, len(first), 4096):
        i, j = first[part : part + 4096], second[part : part + 4096]
        differences = points[i] - points[j]
        distances[i, j] = distances[j, i] = ((differences @ form) * differences).sum(1)
    distances = distances.nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=0)
    return ((distances + distances.t()) / 2).fill_diagonal_(0)


def weighted_sum(weights: Tensor, updates: Tensor) -> Tensor:
    """Return sum_i weights[i] * updates[i] (``[params]``, in the dtype of `updates`).

    Clients are added up in the order given: no difference was seen between numbers of threads, but the matrix
    product does not promise it, so a federation aggregates on one.
    Rows of weight 0 are not read, so that whatever they hold cannot reach the result.
    """
    num_clients, num_params = updates.shape
    if weights.shape != (num_clients,):
        raise AggregationError(f"wanted one weight per client, [{num_clients}], got {list(weights.shape)}")
    coefficients, runs = weights.to(updates), _runs(weights)
    if len(runs) == 1:  # one product over whole rows, at the speed of reading them
        return _in_range(torch.mv(updates[runs[0]].t(), coefficients[runs[0]]), weights)
    total = updates.new_zeros(num_params)
    width = BLOCK_COLUMNS if updates.device.type == "cpu" else max(1, num_params)
    for start in range(0, num_params, width):
        part = total[start : start + width]
        block = updates[:, start : start + width]
        for run in runs:
            part.addmv_(block[run].t(), coefficients[run])
    return _in_range(total, weights)


def _in_range(total: Tensor, weights: Tensor) -> Tensor:
    """Return the sum, brought back to the largest number where rounding alone took an average beyond it."""
    if math.isfinite(float(total.sum())):
        return total  # cheaper than a look at every number, and as sure
    if float(weights.abs().sum()) <= 1 + 1e-6 and bool(total.isinf().any()):
        most = torch.finfo(total.dtype).max
        total.clamp_(-most, most)
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
