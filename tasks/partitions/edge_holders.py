"""Edge cases to a few honest clients, everything else by another partition.

Wang et al., "Attack of the Tails", NeurIPS 2020, section 4: in a p-percent edge-case set the honest holders are few (10
of 200 clients hold 700 pictures of CIFAR-10's task; 169 of 3383 hold 594 of the digits'). For a data set that
``with_edge`` has made.
"""

import dataclasses

import torch
from torch import Tensor

from tasks import spec
from tasks.dataset import Dataset
from tasks.errors import ConfigError


def edge_holders(
    dataset: Dataset, num_clients: int, generator: torch.Generator, *, base: str = "iid()", holders: int | float = 0.05
) -> list[Tensor]:
    """Deal all but the edge cases by the partition `base`, and the edge cases to the last `holders` clients evenly.

    `holders` is a number of clients or a share of them. A data set without edge cases is dealt by `base` alone.
    """
    count = holders if isinstance(holders, int) else max(1, round(holders * num_clients))
    if not 0 < count <= num_clients:
        raise ConfigError(f"edge_holders wants 1 to {num_clients} holders, or a share of the clients, got {holders}")
    size = len(dataset.train_labels) - dataset.num_edge
    groups = None if dataset.train_groups is None else dataset.train_groups[:size]
    common = dataclasses.replace(
        dataset,
        train_inputs=dataset.train_inputs[:size],
        train_labels=dataset.train_labels[:size],
        train_groups=groups,
        num_edge=0,
    )
    shares = list(spec.resolve("partition", base)(common, num_clients, generator))
    order = size + torch.randperm(dataset.num_edge, generator=generator)
    for place, part in enumerate(order.tensor_split(count)):
        holder = num_clients - count + place
        shares[holder] = torch.cat([shares[holder], part])
    return shares
