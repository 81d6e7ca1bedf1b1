"""Densities in feature space: beside scipy's Gaussian and brute-force neighbours; a cut that means a probability."""

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import nn

from tasks.edge_density import SHRINKAGE, cut, features, gaussian_scores, neighbour_scores, scores
from tasks.errors import ConfigError
from tasks.rng import generator


@pytest.fixture
def clusters():
    """(training features, labels, fresh features, far ones) of three classes in five dimensions."""
    draw = generator(1, "clusters")
    centres = 4 * torch.randn(3, 5, generator=draw)
    labels = torch.randint(3, (600,), generator=draw)
    train = centres[labels] + torch.randn(600, 5, generator=draw)
    fresh = centres[torch.randint(3, (2000,), generator=draw)] + torch.randn(2000, 5, generator=draw)
    return train, labels, fresh, 30 + torch.randn(50, 5, generator=draw)


def test_gaussian_is_scipys(clusters):
    train, labels, fresh, _ = clusters
    x, y, z = train.double().numpy(), labels.numpy(), fresh[:40].double().numpy()
    means = [x[y == c].mean(0) for c in range(3)]
    centred = x - np.array(means)[y]
    covariance = centred.T @ centred / len(x)
    covariance += SHRINKAGE * np.diag(covariance).mean() * np.eye(5)
    parts = [np.log((y == c).mean()) + multivariate_normal(means[c], covariance).logpdf(z) for c in range(3)]
    assert np.allclose(gaussian_scores(train, labels, fresh[:40]).numpy(), logsumexp(parts, axis=0))


def test_neighbours_are_those_of_brute_force(clusters):
    train, _, fresh, _ = clusters
    a, b = (t.double().numpy() / np.linalg.norm(t.double().numpy(), axis=1, keepdims=True) for t in (train, fresh[:30]))
    wanted = [-np.sort(np.linalg.norm(a - row, axis=1))[6] for row in b]
    assert np.allclose(neighbour_scores(train, fresh[:30], 7).numpy(), wanted)
    with pytest.raises(ConfigError, match="1 to 600 neighbours"):
        neighbour_scores(train, fresh, 601)


def test_what_is_far_is_rare_and_fresh_samples_are_rare_with_probability_p(clusters):
    train, labels, fresh, far = clusters
    found = scores("gaussian", train, labels, fresh)
    bound = cut(found[:1000], 0.05)
    assert 0.02 < float((found[1000:] < bound).double().mean()) < 0.09
    assert (scores("gaussian", train, labels, far) < bound).all()
    with pytest.raises(ConfigError, match="above 0 and below 1"):
        cut(found, 0.0)


def test_features_that_never_vary_do_no_harm(clusters):
    train, labels, _, far = clusters
    wide, other = (torch.cat([t, torch.zeros(len(t), 3)], 1) for t in (train, far))
    assert gaussian_scores(wide, labels, other).isfinite().all()
    assert gaussian_scores(torch.ones(9, 4), torch.zeros(9, dtype=torch.int64), torch.ones(2, 4)).isfinite().all()


def test_features_are_what_the_last_linear_layer_is_given():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))
    inputs = torch.rand(700, 4, generator=generator(1, "inputs"))
    model.train()
    found, predicted = features(model, inputs)
    assert model.training
    model.eval()
    with torch.no_grad():
        assert torch.allclose(found, model[:2](inputs).double())
        assert torch.equal(predicted, model(inputs).argmax(1))
    assert not model[-1]._forward_pre_hooks
    with pytest.raises(ConfigError, match="last linear layer"):
        features(nn.ReLU(), inputs)
