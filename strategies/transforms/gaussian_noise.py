"""Gaussian noise on every parameter of the new global model.

Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 3 (weak differential privacy, with norm
clipping as the rule); CRFL (Xie et al., ICML 2021), algorithm 1, line 12, draws the same noise after a clip of the
model. The noise is drawn in float32 on the CPU from the round's generator, so that every engine adds the same.
"""

import torch
from torch import Tensor

from tasks.errors import ConfigError


def gaussian_noise(model: Tensor, generator: torch.Generator, *, std: float) -> Tensor:
    """Return the model (``[params]``) plus N(0, std^2) per parameter."""
    if std < 0:
        raise ConfigError(f"gaussian_noise wants std >= 0, got {std}")
    return model + std * torch.randn(model.shape, generator=generator).to(model)
