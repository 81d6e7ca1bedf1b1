"""Label skew by a Dirichlet distribution: of each class, client shares are drawn from Dir(alpha, ..., alpha).

Hsu, Qi, Brown, "Measuring the effects of non-identical data distribution for federated visual
classification", 2019, as drawn per class by Yurochkin et al. (ICML 2019): no sample is left out, and the
draw is repeated until every client has enough. `balanced` is the variant of "Attack of the Tails" (Wang
et al., NeurIPS 2020): a client that holds its equal share already gets nothing of the classes to come.
"""

import numpy as np
import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.errors import ConfigError
from tasks.partitions._checks import check_clients, check_positive, classes_of, draw_seed

_MOST_DRAWS = 1000


def dirichlet(
    dataset: Dataset,
    num_clients: int,
    generator: torch.Generator,
    *,
    alpha: float = 0.5,
    min_samples: int = 1,
    balanced: bool = False,
) -> list[Tensor]:
    """Return the training indices of each client, at least `min_samples` for each.

    The smaller `alpha`, the fewer classes a client has. Raises `ConfigError` when 1,000 draws do not suffice.
    """
    check_positive("dirichlet", "alpha", alpha)
    if min_samples < 0:
        raise ConfigError(f"partition dirichlet: min_samples must be 0 or more, got {min_samples}")
    check_clients("dirichlet", dataset, num_clients, min_samples)
    members = classes_of(dataset)
    draws = np.random.default_rng(draw_seed(generator))
    class_sizes = [len(m) for m in members]
    for _ in range(_MOST_DRAWS):
        counts = _counts(class_sizes, num_clients, alpha, balanced, draws)
        if counts.sum(axis=0).min() >= min_samples:
            return _deal(members, counts, generator)
    raise ConfigError(
        f"partition dirichlet: in {_MOST_DRAWS} draws some client always had fewer than {min_samples} of the "
        f"{sum(class_sizes)} samples; raise alpha ({alpha}), or lower min_samples or the {num_clients} clients"
    )


def _counts(
    class_sizes: list[int], num_clients: int, alpha: float, balanced: bool, draws: np.random.Generator
) -> np.ndarray:
    """Return how many samples of each class each client gets, [classes, clients]; rows add up to the class sizes."""
    counts = np.zeros((len(class_sizes), num_clients), np.int64)
    share = sum(class_sizes) / num_clients
    for row, size in enumerate(class_sizes):
        shares = draws.dirichlet(np.full(num_clients, alpha))
        if balanced:
            open_shares = shares * (counts.sum(axis=0) < share)
            shares = open_shares if open_shares.sum() > 0 else shares
        ends = np.floor(np.cumsum(shares / shares.sum()) * size).astype(np.int64)
        ends[-1] = size  # a cumulated sum of 1 - 1e-16 would lose the last sample
        counts[row] = np.diff(ends, prepend=0)
    return counts


def _deal(members: list[Tensor], counts: np.ndarray, generator: torch.Generator) -> list[Tensor]:
    parts = []
    for indices, row in zip(members, counts, strict=True):
        shuffled = indices[torch.randperm(len(indices), generator=generator)]
        parts.append(shuffled.split(row.tolist()))
    return [torch.cat(own) for own in zip(*parts, strict=True)]
