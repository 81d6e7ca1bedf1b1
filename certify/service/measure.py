"""The gate's metrics of one model: accuracies plain, attacked and certified, mean certifiable loss, and the probes.

Source: the certified federated adversarial training paper ("CFAT", NFFL 2021), section 4; see `certify.gate` for what
is done with them. The probes are two more attacks, on the margin loss and on logits divided by a temperature, which
find what cross-entropy on huge logits cannot, and the relative margin: the median over the certification set of the
largest upper bound of z_q - z_y over the clean |z_y - max z_q|, which no scaling of the logits changes.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from certify.gate import BoundMetrics, GateMetrics
from certify.network import Network
from certify.pgd import Loss, PgdResult, pgd
from certify.precision import exact_arithmetic
from certify.zonotope import ZonotopeResult, check
from tasks.errors import CertificationError
from tasks.rng import derive, generator

_BATCH = 250  # samples attacked at once, fewer of a network that keeps much for its gradient
_ATTACK_BYTES = 2 << 30  # of what a gradient keeps of one batch
_HASHED = 2**20  # numbers hashed at once: a copy of all of them in float64 would not stay in the cache
_SHARE = 48  # points bounded at a time, by one worker
# A clean margin of 0 has no scale; the median must stay a number.
_MOST_RELATIVE = 1e6

Result = TypeVar("Result")
Labelled = tuple[Tensor, Tensor]  # inputs [points, ...] and labels [points]


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """How a candidate is measured; equal settings on equal data make metrics that can be compared."""

    eps: tuple[float, ...]  # ascending radii of the certified accuracies
    attack_eps: float
    attack_steps: int = 20
    attack_step_size: float | None = None
    temperature: float = 100.0
    probes: bool = True
    seed: int = 0
    input_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if sorted(set(self.eps)) != list(self.eps) or not all(0 <= eps < math.inf for eps in self.eps):
            raise CertificationError(f"eps must be finite radii from 0 in ascending order, got {self.eps}")
        if not 0 <= self.attack_eps < math.inf or not 0 < self.temperature < math.inf:
            raise CertificationError(
                f"attack_eps must be from 0 and temperature above 0, got {self.attack_eps} and {self.temperature}"
            )
        if type(self.attack_steps) is not int or self.attack_steps < 1:
            raise CertificationError(f"attack_steps must be a whole number from 1, got {self.attack_steps!r}")
        if self.attack_step_size is not None and not 0 < self.attack_step_size < math.inf:
            raise CertificationError(f"attack_step_size must be above 0 or None, got {self.attack_step_size!r}")
        if not -math.inf < self.input_range[0] < self.input_range[1] < math.inf:
            raise CertificationError(f"input_range must be two ascending numbers, got {self.input_range}")

    def protocol(self, validation: Labelled, certification: Labelled) -> str:
        """Return the hash that says with what, and on what, metrics were measured."""
        text = json.dumps({**asdict(self), "data": [data_sha256(*validation), data_sha256(*certification)]})
        return hashlib.sha256(text.encode()).hexdigest()


def data_sha256(inputs: Tensor, labels: Tensor) -> str:
    """Return the hash of labelled points; the same for float32 inputs and their float64 copies."""
    digest = hashlib.sha256(json.dumps(list(inputs.shape)).encode())
    for tensor, kind in ((inputs, "<f8"), (labels, "<i8")):
        for part in tensor.detach().cpu().reshape(-1).split(_HASHED):
            digest.update(part.numpy().astype(kind).tobytes())
    return digest.hexdigest()


def measure(
    network: Network, validation: Labelled, certification: Labelled, settings: GateSettings, *,
    device: torch.device | str | None = None, memory_bytes: int | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, total, phase: None,
    should_stop: Callable[[], bool] | None = None, workers: int = 1,
) -> GateMetrics:  # fmt: skip
    """Return the metrics of `network`: attacks on the validation points, bounds around the certification points.

    With several `workers` points are shared out to as many threads, each with one of PyTorch's; the metrics are the
    same, but for last bits where memory lies otherwise. Raises `CertificationError` as soon as `should_stop` says so.
    """
    validation, certification = _laid_out(validation), _laid_out(certification)
    with exact_arithmetic(), _Pool(workers) as pool:
        return _measure(network.to(device).detach(), validation, certification, settings, device, memory_bytes,
                        on_progress, should_stop, pool)  # fmt: skip


def _measure(
    network: Network, validation: Labelled, certification: Labelled, settings: GateSettings,
    device: torch.device | str | None, memory_bytes: int | None, on_progress: Callable[[int, int, str], None],
    should_stop: Callable[[], bool] | None, pool: "_Pool",
) -> GateMetrics:  # fmt: skip
    attacks: list[tuple[str, Loss, float]] = [("PGD", "cross_entropy", 1.0)]
    if settings.probes:
        attacks.append(("margin-loss PGD", "margin", 1.0))
        attacks.append(("temperature PGD", "cross_entropy", settings.temperature))
    total, done = len(attacks) + len(settings.eps), 0
    results: list[PgdResult] = []
    for phase, loss, temperature in attacks:
        on_progress(done, total, phase)
        results.append(_attack(network, validation, settings, loss, temperature, should_stop, pool))
        done += 1
    bounds = []
    for eps in settings.eps:
        on_progress(done, total, f"bounds at {eps:g}")
        result = _bounds(network, certification, eps, settings.input_range, device, memory_bytes, should_stop, pool)
        bounds.append(_bound_metrics(eps, result, settings.probes))
        done += 1
    on_progress(done, total, "done")
    return GateMetrics(
        protocol=settings.protocol(validation, certification),
        normal_accuracy=results[0].clean_accuracy,
        pgd_accuracy=results[0].accuracy,
        bounds=tuple(bounds),
        margin_pgd_accuracy=results[1].accuracy if settings.probes else None,
        temperature_pgd_accuracy=results[2].accuracy if settings.probes else None,
    )


def _laid_out(points: Labelled) -> Labelled:
    """Return the points in one order in memory: channels-last ones are summed in another, here and in a service."""
    return points[0].clone(memory_format=torch.contiguous_format), points[1]


def relative_margin(result: ZonotopeResult) -> float:
    """Return the median of (largest upper bound of z_q - z_y) / |clean z_y - max z_q| over the points."""
    ratios = result.relative_margin.nan_to_num(math.inf)  # 0 / 0: a model that says nothing is not robust
    return ratios.clamp(-_MOST_RELATIVE, _MOST_RELATIVE).median().item()


def attack_batch(network: Network) -> int:
    """Return how many samples are attacked at once; by the architecture alone, so that metrics can be compared."""
    return max(1, min(_BATCH, _ATTACK_BYTES // (8 * network.num_kept)))


def _attack(
    network: Network, points: Labelled, settings: GateSettings, loss: Loss, temperature: float,
    should_stop: Callable[[], bool] | None, pool: "_Pool",
) -> PgdResult:  # fmt: skip
    """Attack all points in batches; every batch has a generator of its own, so its size is part of the protocol."""

    def classifier(inputs: Tensor) -> Tensor:
        if should_stop is not None and should_stop():
            raise CertificationError("the measurement was stopped before its end")
        return network.forward(inputs)

    place = next(iter(network.tensors().values()), points[0])
    batch = attack_batch(network)

    def attack(start: int) -> PgdResult:
        inputs, labels = (tensor[start : start + batch].to(place.device) for tensor in points)
        name = derive(settings.seed, "gate", loss, str(temperature), start)
        return pgd(
            classifier, inputs.to(place.dtype), labels, eps=settings.attack_eps,
            generator=generator(name), steps=settings.attack_steps, step_size=settings.attack_step_size,
            loss=loss, temperature=temperature, input_range=settings.input_range,
        )  # fmt: skip

    parts = pool.map(attack, range(0, len(points[0]), batch))
    whole = zip(*((part.inputs, part.correct, part.clean_correct) for part in parts), strict=True)
    return PgdResult(*(torch.cat(pieces).cpu() for pieces in whole))


def _bounds(
    network: Network, points: Labelled, eps: float, input_range: tuple[float, float],
    device: torch.device | str | None, memory_bytes: int | None, should_stop: Callable[[], bool] | None, pool: "_Pool",
) -> ZonotopeResult:  # fmt: skip
    """Bound the network around all points, in shares of one size: the last bits must not depend on the workers."""

    def bound(start: int) -> ZonotopeResult:
        inputs, labels = (tensor[start : start + _SHARE] for tensor in points)
        return check(
            network, inputs, labels, eps=eps, input_range=input_range, device=device, memory_bytes=memory_bytes,
            should_stop=should_stop,
        )  # fmt: skip

    parts = pool.map(bound, range(0, max(1, len(points[0])), _SHARE))
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in ("margins_upper", "certified", "clean_margin", "tolerance", "unstable")
    }
    counted = {name: sum(getattr(part, name) for part in parts) for name in ("rows", "rechecked")}
    return replace(parts[0], **joined, **counted)


class _Pool:
    """Threads with one of PyTorch's each, which several shares of points keep busy; with one worker there is none."""

    def __init__(self, workers: int) -> None:
        self.workers, self._pool = workers, None

    def __enter__(self) -> "_Pool":
        if self.workers > 1:
            self._pool = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def map(self, function: Callable[[int], Result], starts: Iterable[int]) -> list[Result]:
        """Return what `function` gives for every start, in order; the first error ends the others' waiting."""
        return list(map(function, starts)) if self._pool is None else list(self._pool.map(function, starts))


def _bound_metrics(eps: float, result: ZonotopeResult, probes: bool) -> BoundMetrics:
    return BoundMetrics(
        eps=eps,
        certified_accuracy=result.certified_accuracy,
        mean_loss=result.mean_loss,
        relative_margin=relative_margin(result) if probes else None,
    )
