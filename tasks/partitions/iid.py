"""Equal random shares: every client draws from the same distribution."""

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.partitions._checks import check_clients


def iid(dataset: Dataset, num_clients: int, generator: torch.Generator) -> list[Tensor]:
    """Return the training indices of each client; sizes differ by at most 1 and no sample is left out."""
    check_clients("iid", dataset, num_clients)
    order = torch.randperm(len(dataset.train_labels), generator=generator)
    return list(order.tensor_split(num_clients))
