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
    always: tuple[int, ...] = (),
) -> list[Tensor]:
    """Return the training indices of each client, a whole group each, in the order of group numbers.

    With fewer clients than groups, the `largest` groups or `random` ones are taken and the others left out; the groups
    with the numbers `always` are taken first. Raises `ConfigError` for a data set without groups, for more clients
    than groups, and for an `always` that names no group, one twice, or more groups than clients.
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
    named = [int(place) for place in ranked if int(groups[place]) in always]
    if len(named) != len(always) or len(always) > num_clients:
        raise ConfigError(
            f"by_group wants always to be different groups of {dataset.name} with samples, {num_clients} at most; "
            f"got {always}"
        )
    others = [place for place in ranked.tolist() if place not in named]
    chosen = torch.tensor([*named, *others][:num_clients]).sort().values
    samples = torch.argsort(membership, stable=True).split(sizes.tolist())
    return [samples[number] for number in chosen.tolist()]
