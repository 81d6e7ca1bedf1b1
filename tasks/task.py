"""A task: data set, model and partition, loaded once per process and shared by server and clients."""

import functools
from dataclasses import dataclass, field

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


def _none() -> Tensor:
    return torch.empty(0, dtype=torch.int64)


@dataclass(frozen=True)
class Task:
    """What both sides of a federation must agree on."""

    dataset: Dataset
    layout: Layout
    partition: tuple[Tensor, ...]  # per client: int64 indices into the training split
    model: spec.Component
    seed: int
    root: Tensor  # int64 indices into the training split that the server keeps for itself; no client has them
    validation: Tensor = field(default_factory=_none)  # likewise: the gate attacks these
    certification: Tensor = field(default_factory=_none)  # likewise: the gate bounds the model around these

    def build_model(self) -> nn.Module:
        """Return a new model with this task's seeded initial parameters."""
        return build(self.model, self.dataset.input_shape, self.dataset.num_classes, generator(self.seed, "model"))

    def initial_vector(self) -> Tensor:
        """Return the seeded initial model as a vector ([num_params], float32)."""
        return model_vector(self.build_model())


def load(config: RunConfig) -> Task:
    """Return the task of a run; repeated calls in one process share the data set and the partition."""
    c = config
    kept = (c.root_samples, c.gate_validation, c.gate_certification) if c.gate else (c.root_samples, 0, 0)
    return _load(c.dataset, c.model, c.partition, c.num_clients, c.seed, c.data_dir, kept)


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
    kept: tuple[int, int, int],
) -> Task:
    dataset = load_dataset(dataset_text, data_dir)
    model = spec.resolve("model", model_text)
    layout = Layout.of(build(model, dataset.input_shape, dataset.num_classes, generator(seed, "model")))
    dealer = spec.resolve("partition", partition_text)
    partition = tuple(dealer(dataset, num_clients, generator(seed, "partition")))
    if len(partition) != num_clients:
        raise ConfigError(f"partition {dealer} dealt {len(partition)} shares for {num_clients} clients")
    root, validation, certification = _keep_back(dataset, kept, seed)
    if any(kept):
        held_out = torch.cat([root, validation, certification])
        partition = tuple(share[~torch.isin(share, held_out)] for share in partition)
    return Task(dataset, layout, partition, model, seed, root, validation, certification)


def _keep_back(dataset: Dataset, kept: tuple[int, int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return seeded uniform draws of training samples, sorted, no sample in two of them: root, and the gate's two.

    Classes come out as in the training split.
    """
    size, wanted = len(dataset.train_labels), sum(kept)
    if wanted >= size:
        raise ConfigError(
            f"root-samples, gate-validation and gate-certification together are {wanted}, but {dataset.name} has "
            f"{size} training samples"
        )
    root, validation, certification = torch.randperm(size, generator=generator(seed, "root"))[:wanted].split(kept)
    return root.sort().values, validation.sort().values, certification.sort().values
