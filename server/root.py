"""The server's own update: what honest local training makes of the root data that it keeps for itself.

Cao et al., "FLTrust", NDSS 2021, section IV: the root data set is small, clean and drawn like the clients' data, and
the server trains on it with the clients' own optimiser, steps and learning rate.
"""

import torch
from torch import Tensor

from client.trainer import LocalJob, honest
from tasks.config import RunConfig
from tasks.params import bind
from tasks.task import Task


class RootTrainer:
    """Trains the server's update from a global model; the task must have root samples."""

    def __init__(self, config: RunConfig, task: Task) -> None:
        self.config, self.task = config, task
        self.model = task.build_model()
        self.vector = torch.empty(task.layout.num_params)
        bind(self.model, task.layout, self.vector)

    def __call__(self, start: Tensor, round: int) -> Tensor:
        """Return local minus global model (``[params]``) after one round of honest training on the root data."""
        self.vector.copy_(start)
        job = LocalJob(
            dataset=self.task.dataset,
            indices=self.task.root,
            model=self.model,
            layout=self.task.layout,
            start=start,
            vector=self.vector,
            client=self.config.num_clients,  # an id that no client has, for draws of its own
            round=round,
            seed=self.config.seed,
        )
        return honest(self.config.component("training"))(job).vector - start
