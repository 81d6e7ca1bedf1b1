"""Shares of a given size, whatever the size of the data set: benchmarks compare equal work per client."""

import math

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.errors import ConfigError


def equal_shares(dataset: Dataset, num_clients: int, generator: torch.Generator, *, samples: int) -> list[Tensor]:
    """Return `samples` training indices per client, dealt from as many shuffles of the training split as it takes."""
    if samples < 1:
        raise ConfigError(f"equal_shares wants samples of at least 1, got {samples}")
    available, wanted = len(dataset.train_labels), num_clients * samples
    shuffles = [torch.randperm(available, generator=generator) for _ in range(math.ceil(wanted / available))]
    return list(torch.cat(shuffles)[:wanted].split(samples))
