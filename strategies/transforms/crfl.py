"""CRFL on the server: clip the new global model, release it without noise, and send it out with noise.

Xie, Chen, Chen, Li, "CRFL: Certifiably Robust Federated Learning against Backdoor Attacks" (ICML 2021), algorithm 1:
w_t is clipped to rho_t on the full parameter vector, biases included, and Gaussian noise sigma_t is added for the next
round; after the last round the model is clipped only. So the clipped model of any round t is what a run of t rounds
would have released: it is what is evaluated, recorded and kept, and one run serves every T.

Clients get the noisy one (`strategies.context.BROADCAST`). It is drawn after every round, also after the last, where
nobody gets it unless the run is made longer. Schedules of the paper: rho_t = min(slope t + rho, cap), sigma constant.
"""

import math

import torch
from torch import Tensor

from strategies.context import BROADCAST
from strategies.transforms.clip_model import clip_model
from tasks.errors import ConfigError


def crfl(
    model: Tensor,
    round: int,
    generator: torch.Generator,
    memory: dict[str, Tensor],
    *,
    rho: float,
    slope: float = 0.0,
    cap: float | None = None,
    sigma: float = 0.01,
) -> Tensor:
    """Return the model (``[params]``) clipped to ``clip_norm(round)``; the noisy one goes into `memory`."""
    if sigma < 0:
        raise ConfigError(f"crfl wants sigma >= 0, got {sigma}")
    clipped = clip_model(model, max_norm=clip_norm(round, rho=rho, slope=slope, cap=cap))
    memory[BROADCAST] = clipped + sigma * torch.randn(clipped.shape, generator=generator).to(clipped)
    return clipped


def clip_norm(round: int, *, rho: float, slope: float = 0.0, cap: float | None = None) -> float:
    """Return rho_t of round t; raises `ConfigError` where it is not above 0."""
    bound = min(slope * round + rho, math.inf if cap is None else cap)
    if not bound > 0:
        raise ConfigError(f"crfl wants min(slope t + rho, cap) > 0, got {bound:g} in round {round}")
    return bound
