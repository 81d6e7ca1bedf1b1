"""A task: data set, model and partition, loaded once per process and shared by server and clients."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tasks import spec
from tasks.config import RunConfig
from tasks.dataset import Dataset
from tasks.errors import ConfigError
from tasks.model import build
from tasks.params import Layout, model_vector
from tasks.rng import generator
from tasks.source import DataSource


@dataclass(frozen=True)
class Task:
    """What both sides of a federation must agree on."""

    dataset: Dataset
    layout: Layout
    partition: tuple[Tensor, ...]  # per client: int64 indices into the training split
    model: spec.Component
    seed: int
    root: Tensor  # int64 indices into the training split that the server keeps for itself; no client has them

    def build_model(self) -> nn.Module:
        """Return a new model with this task's seeded initial parameters."""
        return build(self.model, self.dataset.input_shape, self.dataset.num_classes, generator(self.seed, "model"))

    def initial_vector(self) -> Tensor:
        """Return the seeded initial model as a vector ([num_params], float32)."""
        return model_vector(self.build_model())


def load(config: RunConfig) -> Task:
    """Return the task of a run; repeated calls in one process share the data set and the partition."""
    c = config
    return _load(c.dataset, c.model, c.partition, c.num_clients, c.seed, c.data_dir, c.root_samples)


@functools.lru_cache(maxsize=2)
def load_dataset(text: str, data_dir: str) -> Dataset:
    """Return the data set that `text` names; held once per process."""
    dataset = spec.resolve("dataset", text)(DataSource.default(data_dir or None))
    assert isinstance(dataset, Dataset)
    return dataset


@functools.lru_cache(maxsize=4)
def _load(
    dataset_text: str,
    model_text: str,
    partition_text: str,
    num_clients: int,
    seed: int,
    data_dir: str,
    root_samples: int,
) -> Task:
    dataset = load_dataset(dataset_text, data_dir)
    model = spec.resolve("model", model_text)
    layout = Layout.of(build(model, dataset.input_shape, dataset.num_classes, generator(seed, "model")))
    dealer = spec.resolve("partition", partition_text)
    partition = tuple(dealer(dataset, num_clients, generator(seed, "partition")))
    if len(partition) != num_clients:
        raise ConfigError(f"partition {dealer} dealt {len(partition)} shares for {num_clients} clients")
    root = _draw_root(dataset, root_samples, seed)
    if root_samples:
        partition = tuple(share[~torch.isin(share, root)] for share in partition)
    return Task(dataset, layout, partition, model, seed, root)


def _draw_root(dataset: Dataset, root_samples: int, seed: int) -> Tensor:
    """Return a seeded uniform draw of training samples, sorted; their classes come out as in the training split."""
    size = len(dataset.train_labels)
    if root_samples >= size:
        raise ConfigError(f"root-samples is {root_samples}, but {dataset.name} has {size} training samples")
    return torch.randperm(size, generator=generator(seed, "root"))[:root_samples].sort().values
