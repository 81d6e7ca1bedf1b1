"""Gaussian attack: send noise in place of, or on top of, the update (Blanchard et al., NeurIPS 2017, section 5)."""

import torch

from client.attack import Attack, change_update
from client.trainer import LocalJob


def gaussian_noise(*, std: float = 1.0, add: bool = False) -> Attack:
    """Send N(0, std^2) noise per parameter; with `add` the honest update is kept under it."""

    def change(update: torch.Tensor, job: LocalJob) -> torch.Tensor:
        noise = torch.empty_like(update).normal_(0.0, std, generator=job.generator("gaussian_noise"))
        return update + noise if add else noise

    return change_update(change)
