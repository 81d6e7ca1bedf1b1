"""What every partition checks of its arguments, and the seed of a legacy generator."""

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.errors import ConfigError


def check_clients(partition: str, dataset: Dataset, num_clients: int, least: int = 1) -> None:
    """Raise `ConfigError` unless there are clients, and `least` training samples for each."""
    samples = len(dataset.train_labels)
    if num_clients < 1:
        raise ConfigError(f"partition {partition} wants at least 1 client, got {num_clients}")
    if num_clients * least > samples:
        raise ConfigError(
            f"partition {partition} wants at least {least} samples for each of {num_clients} clients, "
            f"but {dataset.name} has {samples}"
        )


def check_positive(partition: str, name: str, value: float) -> None:
    """Raise `ConfigError` unless `value` is above 0."""
    if not value > 0:
        raise ConfigError(f"partition {partition}: {name} must be above 0, got {value}")


def classes_of(dataset: Dataset) -> list[Tensor]:
    """Return the indices of the training samples of each class 0, 1, ..., in ascending order."""
    return [torch.nonzero(dataset.train_labels == label).squeeze(1) for label in range(dataset.num_classes)]


def draw_seed(generator: torch.Generator) -> int:
    """Return a 32-bit seed for a NumPy or Python generator, drawn from `generator`."""
    return int(torch.randint(2**32, (), generator=generator))
