"""Clip the new global model to a largest L2 norm: w / max(1, ||w|| / max_norm).

CRFL (Xie et al., "CRFL: Certifiably Robust Federated Learning against Backdoor Attacks", ICML 2021), algorithm 1, line
10, on the full parameter vector, biases included; a constant bound here. Certificates count on the bound, so rounding
must not leave the norm above it: a model that is clipped ends up to 2^-22 of the bound below.
"""

import torch
from torch import Tensor

from tasks.errors import ConfigError

MARGIN = 1 - 2.0**-22  # float32 rounds the factor and every product by at most 2^-24 each


def clip_model(model: Tensor, *, max_norm: float) -> Tensor:
    """Return the model (``[params]``) with an L2 norm of at most `max_norm`."""
    if max_norm <= 0:
        raise ConfigError(f"clip_model wants max_norm > 0, got {max_norm}")
    norm = float(torch.linalg.vector_norm(model.double()))
    return model if norm <= max_norm else model * (max_norm / norm * MARGIN)
