"""Weak differential privacy: clip every update to a norm, average, add Gaussian noise.

Sun et al., "Can You Really Backdoor Federated Learning?", 2019, section 3 (norm thresholding and "(weak) differential
privacy"); in Wang et al., "Attack of the Tails", NeurIPS 2020, section 4, the noise is added to the aggregated
model, which is the same as to the aggregate. "Weak" because the noise is far below what a privacy guarantee would need:
none is claimed. No deviation; the noise is drawn from the round's generator.

Precondition: none on n and f; each attacker moves the mean by up to max_norm / n. Cost: the updates are read once for
norms and once for the sum.
"""

import torch

from strategies.rule import Decision, Stack, claimable, weight_rule
from strategies.rules.norm_clipping import clipped_weights
from tasks.errors import ConfigError

LAW_ARGUMENTS = {"max_norm": 10.0, "std": 0.0}  # with noise no law holds to the last digit
LAWS_NOT_KEPT = {
    "shift": "norms are measured from the global model, the origin, and a shift changes them",
    "scale": "the largest norm does not follow the updates",
    "unanimity": "an update that all send is clipped as well",
    "bounded": "attackers may be as long as max_norm, however short the honest updates are",
    "weights_sum_to_one": "a clipped update counts for less and nothing takes up the rest",
}


@claimable
@weight_rule
def weak_dp(updates: Stack, generator: torch.Generator, *, max_norm: float, std: float) -> Decision:
    """Weigh an update of L2 norm r by min(1, max_norm / r) / n; add N(0, std^2) to every parameter of the sum."""
    if max_norm <= 0 or std < 0:
        raise ConfigError(f"weak_dp wants max_norm > 0 and std >= 0, got max_norm = {max_norm}, std = {std}")
    return Decision(clipped_weights(updates, updates.norms.new_tensor(max_norm)), std, generator)
