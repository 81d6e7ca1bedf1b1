"""What colluding attackers measure of the honest updates they know, in blocks of columns and in float64.

The attacks need moments of every parameter and n x n inner products, never an n x d copy: a block of columns is
read as float64, used and dropped. A float64 stack is read in multiples of a power of two near its largest number,
so that no square overflows; float32 squares always fit. What an attack crafts is kept inside the stack's range.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.errors import AggregationError

BLOCK_COLUMNS = 8192  # the same on every device: attacks that draw numbers draw them block by block
SAMPLE_COLUMNS = 256  # columns that choose an origin; they decide about rounding, not about what is right


@dataclass(frozen=True)
class Known:
    """The honest updates that the attackers of one round know, ``[k, params]``, read in multiples of `unit`."""

    updates: Tensor
    unit: float

    @classmethod
    def of(cls, attack: str, updates: Tensor, num_attackers: int, num_clients: int) -> "Known":
        """Check what an attack was given; `AggregationError` without an honest update or with impossible counts."""
        if updates.ndim != 2 or not updates.is_floating_point():
            came = f"{list(updates.shape)} of {updates.dtype}"
            raise AggregationError(f"{attack} wants a floating-point stack [updates, params], got {came}")
        if not len(updates):
            raise AggregationError(
                f"{attack} wants at least one honest update that the attackers know, got none; "
                "let them know all updates of the round, or take more attackers"
            )
        if not 0 <= num_attackers <= num_clients or len(updates) > num_clients:
            raise AggregationError(
                f"{attack} wants 0 <= attackers <= clients and no more known updates than clients, "
                f"got {num_attackers} attackers, {len(updates)} known updates, {num_clients} clients"
            )
        return cls(updates, _unit(updates))

    def __len__(self) -> int:
        return len(self.updates)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (columns, values ``[k, width]``): float64 copies, in units, that the caller may change."""
        for start in range(0, self.updates.shape[1], BLOCK_COLUMNS):
            columns = slice(start, min(start + BLOCK_COLUMNS, self.updates.shape[1]))
            yield columns, self.updates[:, columns].to(torch.float64, copy=True).div_(self.unit)

    def craft(self, values: Callable[[Tensor], Tensor], num_rows: int = 1) -> Tensor:
        """Return the rows (``[num_rows, params]``, dtype of the stack) that `values` makes of every block, in units."""
        rows = self.updates.new_empty(num_rows, self.updates.shape[1])
        most = torch.finfo(rows.dtype).max
        for columns, block in self.blocks():
            rows[:, columns] = (values(block) * self.unit).clamp_(-most, most)
        return rows

    def squared_distances(self) -> Tensor:
        """Return ||x_i - x_j||^2 in units (``[k, k]``), by a Gram matrix around an update near the median.

        A few updates of another magnitude do not spoil the distances between the others; float64 leaves room for
        clusters a millionth of the distance between them.
        """
        origin = self._central()
        gram = torch.zeros(len(self), len(self), dtype=torch.float64, device=self.updates.device)
        for _, block in self.blocks():
            block -= block[origin].clone()
            gram += block @ block.t()
        squares = gram.diagonal()
        distances = (squares[:, None] + squares[None, :] - gram - gram.t()).clamp_(min=0)
        return distances.fill_diagonal_(0)

    def _central(self) -> int:
        stride = -(-self.updates.shape[1] // SAMPLE_COLUMNS) or 1
        sample = self.updates[:, ::stride].double() / self.unit
        return int((sample - sample.median(0).values).square().sum(1).argmin())


def centre(block: Tensor) -> Tensor:
    """Subtract the mean of the columns from a block in place, and return it (``[width]``)."""
    mean = block.mean(0)
    block -= mean
    return mean


def deviation(centred: Tensor) -> Tensor:
    """Return the standard deviation (``[width]``) of centred columns: with 1 / k, so that one update has it, 0."""
    return centred.square().mean(0).sqrt_()


def shared(row: Tensor, num_attackers: int) -> Tensor:
    """Return one row ``[1, params]`` as every attacker's, ``[num_attackers, params]``: a view, to be read only."""
    return row.expand(num_attackers, -1)


def _unit(updates: Tensor) -> float:
    if updates.dtype != torch.float64 or not updates.numel():
        return 1.0
    low, high = torch.aminmax(updates)
    return 2.0 ** min(1023, max(-1000, math.frexp(max(-float(low), float(high)))[1]))
