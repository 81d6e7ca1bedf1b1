"""The Dirichlet partition exactly as DBA (Xie, Huang, Chen, Li, ICLR 2020) and FLIP (Zhang et al., ICLR 2023) draw it.

Class by class: shuffle its samples, draw shares from Dir(alpha, ..., alpha), and hand each client in turn
its share times *the size of class 0*, rounded, as long as samples last. Class 0's size for all classes is
the authors' code, kept because their client sizes (given in their settings) come from it. So some
samples go to no client: 1,431 of MNIST's with seed 1 and 100 clients. Use `dirichlet` for one that leaves none out.

The draws are those of Python's ``random`` and NumPy's legacy generator, here in instances of their own.
"""

import random

import numpy as np
import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.errors import ConfigError
from tasks.partitions._checks import check_clients, check_positive, classes_of, draw_seed


def dirichlet_dba(
    dataset: Dataset,
    num_clients: int,
    generator: torch.Generator,
    *,
    alpha: float = 0.5,
    seed: int | None = None,
) -> list[Tensor]:
    """Return the training indices of each client; `seed` 1 is the papers', None draws one from `generator`.

    A client may get no sample at all. Raises `ConfigError`.
    """
    check_clients("dirichlet_dba", dataset, num_clients)
    check_positive("dirichlet_dba", "alpha", alpha)
    if seed is not None and not 0 <= seed < 2**32:
        raise ConfigError(f"partition dirichlet_dba: seed must be in 0 .. 2**32 - 1, got {seed}")
    number = draw_seed(generator) if seed is None else seed
    shuffler, draws = random.Random(number), np.random.RandomState(number)
    members = [indices.tolist() for indices in classes_of(dataset)]
    class_size = len(members[0])
    clients: list[list[int]] = [[] for _ in range(num_clients)]
    for indices in members:
        shuffler.shuffle(indices)
        shares = class_size * draws.dirichlet(np.full(num_clients, alpha))
        start = 0
        for own, share in zip(clients, shares.tolist(), strict=True):
            end = min(start + round(share), len(indices))
            own.extend(indices[start:end])
            start = end
    return [torch.tensor(own, dtype=torch.int64) for own in clients]
