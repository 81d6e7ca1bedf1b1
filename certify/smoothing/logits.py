"""Votes of a softmax regression sampled in logit space: the same law as noisy weights, for a thousandth of the work.

Under N(0, sigma^2 I) on weights and bias the logits of an input are independent Gaussians with one deviation,
sigma sqrt(||x||^2 + 1), so those are drawn instead of weights. The noise of different points is independent here,
which shared noisy models (Xie et al., "CRFL", ICML 2021, Algorithm 2) do not offer.

Noise is drawn in float32 by blocks of fixed size, each with the generator (seed, "smoothing", stream, "logits", tile
of points, block of draws), so that the first points have the same counts whatever comes after them.
"""

import numpy as np
import torch

from certify.linear import LinearModel
from certify.network import Network
from certify.smoothing.votes import ModelForm, Plan, Votes, inputs_sha256
from tasks.errors import CertificationError
from tasks.rng import generator

_POINTS = 64
_DRAWS = 250


def sample_linear_votes(
    network: Network, inputs: torch.Tensor, *, sigma: float, num_draws: int, seed: int, stream: str = "votes"
) -> Votes:
    """Return the votes of `num_draws` draws for inputs [points, ...], independent from point to point."""
    model = LinearModel.from_network(network)
    plan = Plan("logits", sigma, seed, stream, num_draws, network.sha256(), inputs_sha256(inputs))
    design = model.design(inputs)
    logits, _ = model.logits(design)
    scale = sigma * model.norm_upper(design)
    if not (scale > 0).all():
        raise CertificationError("an input of zeros gets no noise in a model without bias; its votes are no sample")
    ahead = torch.from_numpy(((logits - logits.max(axis=1, keepdims=True)) / scale[:, None]).astype(np.float32))
    counts = [_count(plan, tile, part) for tile, part in enumerate(ahead.split(_POINTS))]
    return Votes(plan, torch.cat(counts).numpy(), num_draws, ModelForm.of(network))


def _count(plan: Plan, tile: int, ahead: torch.Tensor) -> torch.Tensor:
    """Return votes [points, classes] of one tile, from logits over their deviation."""
    num_points, num_classes = ahead.shape
    means = ahead.T.contiguous()
    counts = torch.zeros(num_classes, num_points, dtype=torch.int64)
    for block, first in enumerate(range(0, plan.num_draws, _DRAWS)):
        source = generator(plan.seed, "smoothing", plan.stream, "logits", tile, block)
        drawn = torch.randn(_DRAWS, num_classes, _POINTS, generator=source)
        drawn = drawn[: plan.num_draws - first, :, :num_points] + means
        hits = drawn == drawn.amax(dim=1, keepdim=True)
        won = hits.sum(dim=0, dtype=torch.uint8)
        if int(won.sum()) != len(drawn) * num_points:  # two logits drew the same float32: the first one wins
            won = torch.nn.functional.one_hot(drawn.argmax(dim=1), num_classes).sum(dim=0).T
        counts += won
    return counts.T
