"""How unlikely an input is under the training data: densities in a model's feature space, to find edge cases with.

Wang et al., "Attack of the Tails", NeurIPS 2020, section 2: a p-percent edge case is an input x with P(x) <= p under
the data. The paper measures P by a Gaussian fitted to the features of the training data (its ARDIS sevens and
Southwest airplanes lie far in the tail); features are the inputs of a model's last linear layer, the penultimate
layer.

    gaussian   log of a mixture of one Gaussian per class, its own mean, one shrunk covariance for all (after Lee et
               al., "A simple unified framework for detecting out-of-distribution samples", NeurIPS 2018)
    knn        minus the distance to the k-th nearest training sample, of features of length 1 (after Sun et al.,
               "Out-of-distribution detection with deep nearest neighbors", ICML 2022)

The cut is one in probability: the score below which a share p of fresh samples of the data, its test split, fall.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from tasks.errors import ConfigError

Method = Literal["gaussian", "knn"]
AT_ONCE = 500
SHRINKAGE = 1e-3  # of the mean variance, onto the diagonal: features that are always 0 have none


@torch.no_grad()
def features(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Return (what the last linear layer is given, float64 ``[samples, features]``; predicted classes) in eval mode."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError("edge cases are found in the input of a model's last linear layer, and this model has none")
    seen: list[Tensor] = []
    handle = linear[-1].register_forward_pre_hook(lambda module, given: seen.append(given[0].flatten(1).double()))
    training, predicted = model.training, list[Tensor]()
    try:
        model.eval()
        for part in inputs.split(AT_ONCE):
            predicted.append(model(part).argmax(1))
    finally:
        handle.remove()
        model.train(training)
    return torch.cat(seen), torch.cat(predicted)


def scores(method: Method, train: Tensor, labels: Tensor, pool: Tensor, neighbours: int = 10) -> Tensor:
    """Return how likely each row of `pool` is under the rows of `train`: the lower, the rarer (``[pool]``)."""
    if method == "gaussian":
        return gaussian_scores(train, labels, pool)
    return neighbour_scores(train, pool, neighbours)


def gaussian_scores(train: Tensor, labels: Tensor, pool: Tensor) -> Tensor:
    """Return log densities, float64, of a Gaussian per class that occurs in `labels`, weighed by its share."""
    classes, member, counts = torch.unique(labels, return_inverse=True, return_counts=True)
    means = torch.zeros(len(classes), train.shape[1], dtype=torch.float64).index_add_(0, member, train.double())
    means /= counts[:, None]
    centred = train.double() - means[member]
    covariance = centred.T @ centred / len(train)
    ridge = SHRINKAGE * float(covariance.diagonal().mean()) or 1e-12  # no spread at all: any small number
    factor = torch.linalg.cholesky(covariance + ridge * torch.eye(len(covariance), dtype=torch.float64))
    log_volume = factor.diagonal().log().sum() + 0.5 * len(covariance) * math.log(2 * math.pi)
    found = []
    for mean, count in zip(means, counts):
        white = torch.linalg.solve_triangular(factor, (pool.double() - mean).T, upper=False)
        found.append(math.log(int(count) / len(train)) - log_volume - 0.5 * white.square().sum(0))
    return torch.logsumexp(torch.stack(found), 0)


def neighbour_scores(train: Tensor, pool: Tensor, neighbours: int) -> Tensor:
    """Return minus the distance to the training sample number `neighbours` by nearness, features scaled to length 1."""
    if not 1 <= neighbours <= len(train):
        raise ConfigError(f"wanted 1 to {len(train)} neighbours, got {neighbours}")
    near, far = (nn.functional.normalize(part.double(), dim=1) for part in (train, pool))
    parts = [torch.cdist(part, near).kthvalue(neighbours, dim=1).values for part in far.split(AT_ONCE)]
    return -torch.cat(parts)


def cut(fresh: Tensor, p: float) -> float:
    """Return the score below which a share `p` of the fresh samples' scores fall."""
    if not 0 < p < 1:
        raise ConfigError(f"p is a share above 0 and below 1, got {p}")
    return float(fresh.quantile(p))
