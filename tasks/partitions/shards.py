"""The pathological partition of FedAvg: sorted by label, cut into shards, a few shards per client.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas, "Communication-efficient learning of deep networks from
decentralized data", AISTATS 2017, section 3: 200 shards of MNIST, two for each of 100 clients.
"""

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.errors import ConfigError
from tasks.partitions._checks import check_clients


def shards(
    dataset: Dataset, num_clients: int, generator: torch.Generator, *, shards_per_client: int = 2
) -> list[Tensor]:
    """Return the training indices of each client; no sample is left out, shard sizes differ by at most 1."""
    if shards_per_client < 1:
        raise ConfigError(f"partition shards: shards_per_client must be 1 or more, got {shards_per_client}")
    check_clients("shards", dataset, num_clients, least=shards_per_client)
    by_label = torch.argsort(dataset.train_labels, stable=True)
    pieces = by_label.tensor_split(num_clients * shards_per_client)
    order = torch.randperm(len(pieces), generator=generator).view(num_clients, shards_per_client)
    return [torch.cat([pieces[number] for number in own]) for own in order.tolist()]
