"""The natural partition: every client is one group of the data set, such as a writer, a user or a US state.

As in LEAF (Caldas et al., 2018) and, by state, in DBA (ICLR 2020) and CRFL (ICML 2021) on LOAN.
"""

from typing import Literal

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.errors import ConfigError


def by_group(
    dataset: Dataset,
    num_clients: int,
    generator: torch.Generator,
    *,
    choose: Literal["largest", "random"] = "largest",
) -> list[Tensor]:
    """Return the training indices of each client, a whole group each, in the order of group numbers.

    With fewer clients than groups, the `largest` groups or `random` ones are taken and the others left out. Raises
    `ConfigError` for a data set without groups and for more clients than groups.
    """
    if dataset.train_groups is None:
        raise ConfigError(f"data set {dataset.name} has no natural groups; use partition iid or dirichlet")
    groups, membership, sizes = torch.unique(dataset.train_groups, return_inverse=True, return_counts=True)
    if not 1 <= num_clients <= len(groups):
        raise ConfigError(
            f"data set {dataset.name} has {len(groups)} groups, so 1 to {len(groups)} clients; got {num_clients}"
        )
    if choose == "largest":
        ranked = torch.argsort(sizes, descending=True, stable=True)
    else:
        ranked = torch.randperm(len(groups), generator=generator)
    chosen = ranked[:num_clients].sort().values
    samples = torch.argsort(membership, stable=True).split(sizes.tolist())
    return [samples[number] for number in chosen.tolist()]
