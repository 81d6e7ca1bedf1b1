"""Votes by sampling: M noisy copies of a model, drawn once and shared by all points.

Xie, Chen, Chen, Li, "CRFL" (ICML 2021), Algorithm 2: W_k = w + N(0, sigma^2 I) on the full parameter vector. Its
loop runs from 0 to M, which are M + 1 draws; here M are M.

Draw k has the generator (seed, "smoothing", stream, k) and is made on the CPU, so the noise depends on nothing else.
It is added in float64, where it is not rounded away. Rounding depends on how work is cut, and would turn a vote where
two logits nearly agree: such votes are counted in float64. So the counts are the same for every memory budget, and
after every interruption; they are of noise as it was drawn, not of noise that float32 weights could hold.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.linear import LinearModel
from certify.network import Network
from certify.precision import exact_arithmetic
from certify.smoothing.votes import ModelForm, Plan, Votes, inputs_sha256, resumed
from tasks.errors import CertificationError
from tasks.rng import generator

MEMORY_BYTES = 64 << 20
_IN_CACHE = 48 << 20  # bytes of one piece of work: beyond the cache every pass over its logits costs more
_MOST_DRAWS = 128  # at once; hits are summed in uint8
_CLOSE = 1e-4  # of the greatest logit: what float32 may be off by in a network that is not linear
_UNITS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_FINE = 2.0**-14  # of the greatest parameter: with less noise than that float32 would leave most votes in doubt
_LEAST = 2.0**-30  # of the greatest parameter: with less noise than that float64's own rounding is part of the votes


def count_votes(
    network: Network, inputs: Tensor, *, sigma: float, num_draws: int, seed: int, stream: str = "votes",
    memory_bytes: int = MEMORY_BYTES, device: torch.device | str | None = None, start: Votes | None = None,
    on_progress: Callable[[Votes], None] | None = None, should_stop: Callable[[], bool] | None = None,
) -> Votes:  # fmt: skip
    """Return the votes of `num_draws` noisy copies of `network` for inputs [points, ...].

    A draw whose logits are NaN, or whose greatest is infinite, votes for no class. `on_progress` is called with the
    state after every piece of work; `should_stop` ends the work early, and its state can be saved and be the `start`
    of another call.
    """
    if inputs.ndim < 2 or not len(inputs) or not bool(torch.isfinite(inputs).all()):
        raise CertificationError(f"inputs must be finite numbers [points, ...], got shape {tuple(inputs.shape)}")
    if type(memory_bytes) is not int or memory_bytes < 1:
        raise CertificationError(f"memory_bytes must be a whole number above 0, got {memory_bytes!r}")
    network = network.detach().to(device)
    plan = Plan("weights", sigma, seed, stream, num_draws, network.sha256(), inputs_sha256(inputs))
    votes = resumed(plan, start, len(inputs), ModelForm.of(network))
    work = _work(network, inputs.to(network.vector().device), memory_bytes, _resolution(network, sigma))
    while not votes.complete and not (should_stop is not None and should_stop()):
        draws = range(votes.num_draws, min(votes.num_draws + work.num_draws, num_draws))
        with exact_arithmetic():
            counted = work.count(_noisy(network.vector(), sigma, seed, stream, draws))
        votes = replace(votes, counts=votes.counts + counted.cpu().numpy(), num_draws=draws.stop)
        if on_progress is not None:
            on_progress(votes)
    return votes


def _resolution(network: Network, sigma: float) -> float:
    """Return sigma over the greatest parameter; raises `CertificationError` where float64 does not resolve it."""
    vector = network.vector()
    peak = float(vector.abs().amax()) if vector.numel() else 0.0
    if sigma < _LEAST * peak:
        advice = "use margins, or exact votes of a softmax regression"
        raise CertificationError(
            f"sigma {sigma:g} is below 2^-30 of the largest parameter, {peak:g}: sampling cannot resolve it; {advice}"
        )
    return sigma / peak if peak > 0 else math.inf


def _noisy(vector: Tensor, sigma: float, seed: int, stream: str, draws: range) -> Tensor:
    """Return noisy copies [draws, params] of `vector` [params] in float64, on its device."""
    noise = torch.empty(len(draws), vector.numel(), dtype=torch.float32)
    for row, draw in zip(noise, draws, strict=True):
        torch.randn(vector.numel(), generator=generator(seed, "smoothing", stream, draw), out=row)
    return noise.to(device=vector.device, dtype=torch.float64).mul_(sigma).add_(vector)


@dataclass(frozen=True, eq=False)
class _Linear:
    """A softmax regression: one matrix product for all draws and a tile of points."""

    model: LinearModel  # for shapes only
    points: Tensor  # [points, features], in the type that the bulk is counted in
    given: Tensor  # the same as they came
    norms: Tensor  # [points], of the points with a 1 appended
    num_draws: int
    tile: int

    def count(self, noisy: Tensor) -> Tensor:
        """Return votes [points, classes] of noisy vectors [draws, params] in float64."""
        classes, features = self.model.weight.shape
        exact = noisy[:, : classes * features].reshape(-1, classes, features)
        exact_bias = noisy[:, classes * features :, None] if self.model.bias is not None else None
        weight = exact.to(self.points.dtype)
        bias = None if exact_bias is None else exact_bias.to(self.points.dtype)
        # |rounding of x w| <= gamma_n ||x|| ||w||, and twice that for a difference of two logits; the terms of n are
        # products, sums, and the roundings of a weight and of an input
        terms = _UNITS[self.points.dtype] * (features + 5)
        unit = terms / (1 - terms)
        longest = weight.norm(dim=2).amax() if bias is None else (weight.norm(dim=2) + bias[:, :, 0].abs()).amax()
        parts = []
        tiles = (part.split(self.tile) for part in (self.points, self.given, self.norms))
        for points, given, norms in zip(*tiles, strict=True):
            logits = (weight.reshape(-1, features) @ points.T).view(-1, classes, len(points))
            logits = logits if bias is None else logits.add_(bias)
            parts.append(_tally(logits, norms * (2.02 * unit * longest), self._again(given, exact, exact_bias)))
        return torch.cat(parts)

    @staticmethod
    def _again(points: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor, Tensor], Tensor]:
        def again(draws: Tensor, columns: Tensor) -> Tensor:
            """Return logits in float64 [pairs, classes] of pairs of a draw and a point."""
            kept = []
            for some, here in zip(draws.split(128), columns.split(128), strict=True):
                exact = torch.einsum("ncd,nd->nc", weight[some], points[here].double())
                kept.append(exact if bias is None else exact + bias[some, :, 0])
            return torch.cat(kept)

        return again


@dataclass(frozen=True, eq=False)
class _General:
    """Any network: noisy copies side by side through torch.func.vmap, tiles of points."""

    network: Network
    points: Tensor
    num_draws: int
    tile: int

    def count(self, noisy: Tensor) -> Tensor:
        """Return votes [points, classes] of noisy vectors [draws, params] in float64."""
        parts, rounded = [], noisy.to(self.network.vector().dtype)
        for points in self.points.split(self.tile):
            if len(noisy) == 1:
                logits = self._forward(rounded[0], points)[None]
            else:
                logits = torch.func.vmap(self._forward, in_dims=(0, None))(rounded, points)
            logits = logits.transpose(1, 2)
            # one tolerance per point, from all the draws: the greatest logit there is
            close = _CLOSE * torch.nan_to_num(logits.abs(), 0.0, 0.0, 0.0).amax(dim=(0, 1))
            parts.append(_tally(logits, close, self._again(points, noisy)))
        return torch.cat(parts)

    def _forward(self, vector: Tensor, points: Tensor) -> Tensor:
        return self.network.with_vector(vector).forward(points)

    def _again(self, points: Tensor, noisy: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        def again(draws: Tensor, columns: Tensor) -> Tensor:
            exact = torch.empty(len(draws), self.network.num_classes, dtype=torch.float64, device=points.device)
            for draw in draws.unique().tolist():
                chosen = draws == draw
                exact[chosen] = self._forward(noisy[draw], points[columns[chosen]].double())
            return exact

        return again


def _tally(logits: Tensor, close: Tensor, again: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return votes [points, classes] of logits [draws, classes, points]; leads below `close` [points] are recounted."""
    best = logits.amax(dim=1)  # NaN where any logit is
    hits = logits >= (best - close)[:, None]
    if not bool(torch.isfinite(best).all()):
        hits &= torch.isfinite(best)[:, None]
    narrow = torch.uint8 if logits.shape[1] < 256 else torch.int32
    doubtful = (hits.sum(dim=1, dtype=narrow) > 1).nonzero()
    draws, points = doubtful.unbind(1)
    hits[draws, :, points] = False
    counts = hits.sum(dim=0, dtype=torch.uint8).T.to(torch.int64)
    if len(doubtful):
        winners = again(draws, points).argmax(dim=1)
        place = points * logits.shape[1] + winners
        counts = counts + torch.bincount(place, minlength=counts.numel()).view_as(counts)
    return counts


def _work(network: Network, points: Tensor, memory_bytes: int, resolution: float) -> "_Linear | _General":
    """Cut the work: draws at once and points at once, so that tensors stay within `memory_bytes`."""
    kinds = [layer.kind for layer in network.layers if layer.kind != "flatten"]
    if kinds == ["linear"]:
        model = LinearModel.from_network(network)
        single = network.vector().dtype == torch.float32 and resolution >= _FINE
        given = points.reshape(len(points), -1)
        points = given.to(torch.float32 if single else torch.float64)
        # logits, and the masks and votes made from them, take about 3 times the logits
        per_pair, per_draw = (12 if single else 24) * model.num_classes, 20 * network.num_params
        draws, tile = _cut(len(points), per_pair, per_draw, memory_bytes)
        return _Linear(model, points, given, (points.square().sum(1) + 1).sqrt(), draws, tile)
    widest = max(math.prod(layer.input_shape) + math.prod(layer.output_shape) for layer in network.layers)
    draws, tile = _cut(len(points), 8 * widest, 20 * network.num_params, memory_bytes)
    return _General(network, points, draws, tile)


def _cut(num_points: int, per_pair: int, per_draw: int, memory_bytes: int) -> tuple[int, int]:
    """Return (draws, points) at once, given bytes per (draw, point) and per draw."""
    cached = min(_IN_CACHE, memory_bytes)
    tile = max(1, min(num_points, 5000, cached // per_pair))
    draws = max(1, min(_MOST_DRAWS, memory_bytes // (2 * (per_draw + 1)), cached // (per_pair * tile)))
    return draws, tile
