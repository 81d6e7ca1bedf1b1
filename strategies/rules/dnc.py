"""DnC (divide and conquer): drop the updates that stand out along the direction in which the updates vary most.

Shejwalkar and Houmansadr, "Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses for Federated
Learning", NDSS 2021, algorithm 2. Each repetition samples b parameters, centres the updates on them, takes the top
right singular vector v, scores s_i = <x_i - mean, v>^2 and keeps the n - c f lowest; updates that all repetitions keep
are averaged, with all their parameters.

With the centred samples X = U S V^T, s_i = S_1^2 U_i1^2: the first eigenvector of the n x n matrix X X^T is enough.
Deviations: where no update is kept by all repetitions, which the paper leaves open, those kept most often are averaged;
c f is rounded up; b larger than the number of parameters means all of them; ties go to the lowest index.

Precondition: n >= 2f + 1 and n > c f. A limit of the method: one direction is looked at, so that one huge outlier
hides a smaller one in another direction; norms have to be bounded before (max-update-norm, or a mixing that clips).
Cost: b columns of the updates are read per repetition, in float64, and the chosen updates once for the sum.
"""

import math

import torch
from torch import Tensor

from strategies.rule import Stack, claimable, count_byzantine, require_clients, uniform_weights, weight_rule
from tasks.errors import AggregationError, ConfigError

BLOCK_COLUMNS = 8192


@claimable
@weight_rule
def dnc(
    updates: Stack,
    generator: torch.Generator,
    *,
    num_byzantine: int | float,
    num_iterations: int = 1,
    filter_fraction: float = 1.0,
    num_columns: int = 10_000,
) -> Tensor:
    """Weigh the updates that all repetitions keep equally and all others 0; each drops `filter_fraction` times f."""
    if num_iterations < 1 or filter_fraction <= 0 or num_columns < 1:
        given = f"{num_iterations}, {filter_fraction} and {num_columns}"
        raise ConfigError(f"dnc wants num_iterations >= 1, filter_fraction > 0 and num_columns >= 1, got {given}")
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("dnc", "2f + 1", 2 * f + 1, num_clients, f)
    dropped = math.ceil(min(filter_fraction * f, num_clients) - 1e-9)  # 1.1 * 10 is 11, not 11.0000...2
    if dropped >= num_clients:
        raise AggregationError(
            f"dnc wants n > filter_fraction * f, got n = {num_clients} with {filter_fraction} * {f}; lower either"
        )
    kept = torch.zeros(num_clients, dtype=torch.int64, device=updates.device)
    for _ in range(num_iterations):
        scores = outlier_scores(updates, sample_columns(updates.num_params, num_columns, generator))
        kept[scores.argsort(stable=True)[: num_clients - dropped]] += 1
    return uniform_weights(updates, (kept == kept.max()).nonzero().flatten())


def outlier_scores(updates: Stack, columns: Tensor) -> Tensor:
    """Return the squared projections of the centred rows on their top right singular vector (``[rows]``, float64).

    Where float64 does not hold them, those of the rows divided by their largest entry, which rank the same.
    """
    products = centred_products(updates, columns)
    if not products.isfinite().all():
        parts = columns.to(updates.device).split(BLOCK_COLUMNS)
        products = centred_products(updates, columns, max(float(updates.columns(part).abs().max()) for part in parts))
    if not products.isfinite().all():
        raise AggregationError("dnc wants finite updates, got some that are not, or that overflow when they are mixed")
    values, vectors = torch.linalg.eigh(products)
    return values[-1].clamp(min=0) * vectors[:, -1].square()


def centred_products(updates: Stack, columns: Tensor, unit: float = 1.0) -> Tensor:
    """Return the inner products (``[rows, rows]``, float64) of rows around their mean, on `columns`, in `unit`."""
    products = torch.zeros(len(updates), len(updates), dtype=torch.float64, device=updates.device)
    for part in columns.to(updates.device).split(BLOCK_COLUMNS):
        block = updates.columns(part).double()
        if unit != 1.0:
            block = block / unit
        centred = block - block.mean(0)
        products += centred @ centred.t()
    return products


def sample_columns(num_params: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """Return `num_columns` distinct columns, every set of them as likely, in ascending order; all if there are fewer.

    A large vector's columns are drawn singly until enough are distinct, which costs what is drawn and not num_params.
    """
    if num_columns >= num_params:
        return torch.arange(num_params)
    if 4 * num_columns >= num_params:
        return torch.randperm(num_params, generator=generator)[:num_columns].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < num_columns:
        more = torch.randint(num_params, (2 * num_columns,), generator=generator)
        drawn = torch.cat([drawn, more]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:num_columns]].sort().values
