"""FLAME: admit the majority that points the same way, clip to the median norm, average, add noise.

Nguyen et al., "FLAME: Taming Backdoors in Federated Learning", USENIX Security 2022, algorithm 1:
HDBSCAN on pairwise cosine distances with min_cluster_size n // 2 + 1, min_samples 1 and a single cluster allowed; the
updates it admits are clipped to S, the median L2 norm of all, and averaged; N(0, (noise S)^2) is added. The paper's
noise level for image models is 0.001.

With a cluster size above n / 2 no two clusters can exist, and with min_samples 1 the mutual reachability distance is
the distance: what HDBSCAN returns is the first cluster of single linkage that holds n // 2 + 1 updates, which is found
here directly. So there always is one (n = 1 and n = 2 admit all), no fallback is needed, and at equal distances the
order of clients does not matter. The rest are noise points: rejected.
Deviation: the paper takes cosines of the local models; here they are of the updates, since a rule sees no models. The
models have the global model in common, usually far longer than any update, next to which these hardly turn an angle.

Precondition: none on n; with fewer than n / 2 attackers the cluster holds honest updates and S is bounded by theirs.
Cost: the updates are read once for inner products, once for norms and once for the sum.
"""

import numpy as np
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from strategies.rule import Decision, Stack, claimable, uniform_weights, weight_rule
from strategies.rules.norm_clipping import clip_factors
from tasks.errors import ConfigError

LAW_ARGUMENTS = {"noise": 0.0}  # with noise no law holds to the last digit
LAWS_NOT_KEPT = {
    "shift": "angles and norms are measured from the global model, the origin, and a shift changes them",
    "weights_sum_to_one": "a clipped update counts for less and nothing takes up the rest",
}


@claimable
@weight_rule
def flame(updates: Stack, generator: torch.Generator, *, noise: float = 0.001) -> Decision:
    """Weigh admitted updates of L2 norm r by min(1, S / r) / admitted, S the median norm; add N(0, (noise S)^2)."""
    if noise < 0:
        raise ConfigError(f"flame wants noise >= 0, got {noise}")
    limit = updates.norms.quantile(0.5)
    factors = clip_factors(updates, limit)
    weights = uniform_weights(updates, majority_cluster(1 - angles(updates))) * factors
    return Decision(weights, noise * float(limit), generator)


def angles(updates: Stack) -> Tensor:
    """Return the cosine of the angle of every two rows (``[rows, rows]``, float64), however long they are."""
    found = updates.cosines()
    if found.isfinite().all():
        return found
    rows = updates.columns(slice(None))  # products beyond float64: of rows whose largest entry is 1
    sizes = rows.abs().amax(1, keepdim=True)
    return Stack.of(rows / sizes.where(sizes > 0, 1.0)).cosines()


def majority_cluster(distances: Tensor) -> Tensor:
    """Return the indices of the single-linkage cluster that is the first to hold more than half, as distance grows."""
    num_rows = len(distances)
    if num_rows == 1:
        return torch.zeros(1, dtype=torch.int64, device=distances.device)
    tree = linkage(squareform(distances.cpu().numpy(), checks=False), "single")
    reach = tree[np.argmax(tree[:, 3] > num_rows // 2), 2]
    labels = fcluster(tree, reach, criterion="distance")
    chosen = np.flatnonzero(labels == np.bincount(labels).argmax())
    return torch.from_numpy(chosen).to(distances.device)
