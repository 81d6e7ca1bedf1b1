"""Certified robustness in the l_inf ball: which test points no change of at most eps per input number can flip.

What is guaranteed. `certified` means: for every real input of the (outwards rounded) ball inside `input_range`, the
network with its stored weights, computed in real arithmetic, puts the label's logit above every other. The bounds are
themselves computed in floating point, and what rounding can have moved them by is bounded (`rounding.py`): a sample is
certified only below that error and, besides, 1e-5 (float32) or 1e-10 (float64) of the size of the margin's terms.
Samples that float32 leaves open are decided again in float64. The float32 network that is deployed differs from real
arithmetic by about 1e-6 of its logits as a rule, which the float32 tolerance covers and the float64 tolerance does not;
but a network can be made that rounds as it likes, and then the deployed one is not the one that is certified.

Methods: "zonotope" is DeepZ (Singh et al. 2018), equal slopes; "crown" has adaptive lower slopes (Zhang et al. 2018);
"interval" is interval bound propagation; "best" is the least of the three for every margin, so it is no pure DeepZ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from certify.network import Network
from certify.precision import exact_arithmetic
from certify.zonotope.backward import Propagation
from certify.zonotope.canvas import Memory
from certify.zonotope.forward import forward_zonotope, zonotope_margins
from certify.zonotope.graph import Graph, build_graph
from certify.zonotope.grids import Grids
from certify.zonotope.interval import interval_margins
from certify.zonotope.relaxation import Box, Slopes, check_box, input_box
from certify.zonotope.rounding import Rounding, rows_with_error
from tasks.errors import CertificationError

Method = Literal["zonotope", "crown", "interval", "best"]
Direction = Literal["backward", "forward"]
Range = tuple[float, float]

_SLOPES: dict[str, Slopes] = {"zonotope": "equal", "crown": "adaptive"}
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_CPU_WORKING_SET = 3 << 20  # bytes: rows that stay in a core's cache
_GPU_WORKING_SET = 1 << 29
_AHEAD = 16  # samples whose first layers, which need no rows, are bounded together


@dataclass(frozen=True, eq=False)
class ZonotopeResult:
    """Bounds and verdicts per sample; tensors are on the CPU."""

    method: str
    eps: float
    margins_upper: Tensor  # [samples, classes], float64: upper bounds of z_q - z_y in the ball; -inf at q = y
    certified: Tensor  # [samples], bool: label predicted and every upper bound below -tolerance
    clean_margin: Tensor  # [samples], float64: z_y - max of the others on the input itself
    tolerance: Tensor  # [samples], float64
    unstable: Tensor  # [samples], int64: ReLUs whose sign is not proven; each is one generator (0 for "interval")
    rows: int  # rows of coefficients that travelled, in all samples
    rechecked: int  # samples that float32 left open

    @property
    def loss(self) -> Tensor:
        """[samples], float64: max(0, largest upper bound), equation 3 of "Certified Federated Adversarial Training"."""
        return self.margins_upper.amax(1).clamp(min=0)

    @property
    def mean_loss(self) -> float:
        """Mean loss over all samples, misclassified ones included; infinite when a bound is."""
        return self.loss.mean().item()

    @property
    def certified_accuracy(self) -> float:
        """Share of samples that are certified (and so predicted right)."""
        return self.certified.double().mean().item()

    @property
    def clean_accuracy(self) -> float:
        """Share of samples predicted right."""
        return (self.clean_margin > 0).double().mean().item()

    @property
    def relative_margin(self) -> Tensor:
        """[samples], float64: largest upper bound over |clean margin|, which scaling the logits does not change."""
        return self.margins_upper.amax(1) / self.clean_margin.abs()


def check(
    network: Network,
    inputs: Tensor,
    labels: Tensor,
    *,
    eps: float,
    method: Method = "zonotope",
    input_range: Range = (0.0, 1.0),
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    memory_bytes: int | None = None,
    direction: Direction = "backward",
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> ZonotopeResult:
    """Bound the margins of inputs [samples, ...] with labels [samples] in the ball of radius `eps` (input units).

    `memory_bytes` limits the rows in flight; `on_progress(done, samples)` is called after each batch. When
    `should_stop()` turns true, `CertificationError` is raised. `direction="forward"` is for method "zonotope" alone.
    """
    _check(network, inputs, labels, eps, method, input_range, dtype, direction, memory_bytes)
    run = _Run(network.detach(), eps, method, input_range, direction, memory_bytes, should_stop)
    where = _device(network, device)
    inputs, labels = inputs.detach().to(where), labels.to(where)
    with exact_arithmetic():
        first = run.samples(inputs, labels, dtype, on_progress).copy()
        open_cases = first.open_cases() if dtype == torch.float32 else torch.zeros(0, dtype=torch.int64)
        if open_cases.numel():
            index = open_cases.to(where)
            first.put(open_cases, run.samples(inputs[index], labels[index], torch.float64, None))
    return first.result(method, eps, open_cases.numel())


def margin_bounds(
    network: Network,
    inputs: Tensor,
    labels: Tensor,
    eps: float,
    *,
    method: Method = "zonotope",
    input_range: Range = (0.0, 1.0),
    memory_bytes: int | None = None,
) -> Tensor:
    """Return upper bounds of z_q - z_y [samples, classes] (0 at q = y), differentiable in the network's tensors.

    The same bounds as `check`, in the type of the network, all samples in one graph of autograd; for training
    against bounds and for attacks on them. `Network.from_module(..., copy=False)` or `with_vector` keep the graph.
    """
    dtype = next((tensor.dtype for tensor in network.parts.values()), torch.float32)
    _check(network, inputs, labels, eps, method, input_range, dtype, "backward", memory_bytes)
    where = _device(network, None)
    box = input_box(inputs.to(where), eps, input_range, dtype)
    run = _Run(network, eps, method, input_range, "backward", memory_bytes, None)
    with exact_arithmetic():
        return run.bounds(build_graph(network), network, box, labels.to(where))[0]


@dataclass(eq=False)
class _Found:
    """Rows of the result while they are collected, on the CPU in float64."""

    margins: Tensor
    size: Tensor  # of the terms of each margin
    clean: Tensor
    labels: Tensor
    unstable: Tensor
    tolerance: Tensor
    rows: int

    def open_cases(self) -> Tensor:
        """Return the samples that are not certified, though their bounds as computed are below 0, or all but below."""
        worst = self.margins.amax(1)
        near = (worst >= -self.tolerance) & (worst <= _TOLERANCE[torch.float32] * self.size.amax(1)) & (self.clean > 0)
        return near.nonzero()[:, 0]

    def copy(self) -> "_Found":
        """Return copies, which may be changed outside of inference mode."""
        names = ("margins", "size", "clean", "labels", "unstable", "tolerance")
        return _Found(*(getattr(self, name).clone() for name in names), rows=self.rows)

    def put(self, index: Tensor, other: "_Found") -> None:
        for name in ("margins", "size", "clean", "unstable", "tolerance"):
            getattr(self, name)[index] = getattr(other, name)
        self.rows += other.rows

    def result(self, method: str, eps: float, rechecked: int) -> ZonotopeResult:
        own = self.labels[:, None]
        finite = torch.isfinite(self.margins.scatter(1, own, 0.0)).all(1) & torch.isfinite(self.clean)
        certified = (self.margins < -self.tolerance[:, None]).all(1) & (self.clean > 0) & finite
        return ZonotopeResult(
            method, eps, self.margins, certified, self.clean, self.tolerance, self.unstable, self.rows, rechecked
        )


@dataclass(frozen=True, eq=False)
class _Run:
    network: Network
    eps: float
    method: str
    input_range: Range
    direction: str
    memory_bytes: int | None
    should_stop: Callable[[], bool] | None
    memory: Memory = field(default_factory=Memory)  # shared by all batches

    @cached_property
    def finite(self) -> bool:
        """Whether every weight is a number; a sum is finite only if all its terms are, and is cheaper than a look."""
        parts = self.network.parts.values()
        return all(math.isfinite(part.sum().item()) or bool(torch.isfinite(part).all()) for part in parts)

    def tick(self) -> None:
        if self.should_stop is not None and self.should_stop():
            raise CertificationError("the check was stopped before its end; nothing is certified")

    @torch.inference_mode()
    def samples(
        self, inputs: Tensor, labels: Tensor, dtype: torch.dtype, on_progress: Callable[[int, int], None] | None
    ) -> _Found:
        clean = _clean_margin(self.network.to(inputs.device, torch.float64), inputs, labels)
        network = self.network.to(inputs.device, dtype)
        graph = build_graph(network)
        parts = []
        batch = self.batch(graph, inputs, dtype)
        several = batch * max(1, _AHEAD // batch)
        for start in range(0, inputs.shape[0], several):
            box = input_box(inputs[start : start + several], self.eps, self.input_range, dtype)
            ahead = self.propagation(graph, box) if self.direction == "backward" and self.method in _SLOPES else None
            if ahead is not None:
                ahead.prepare_exact()
            for first in range(0, box.center.shape[0], batch):
                self.tick()
                some, own = slice(first, first + batch), slice(start + first, start + min(first + batch, several))
                known = None if ahead is None else ahead.part(some)
                parts.append(self.bounds(graph, network, box[some], labels[own], known))
                if on_progress is not None:
                    on_progress(min(own.stop, inputs.shape[0]), inputs.shape[0])
        margins, size, error, unstable = (torch.cat([part[column] for part in parts]) for column in (0, 1, 2, 3))  # type: ignore[misc]
        return self.found(margins, size, error, unstable, sum(part[4] for part in parts), labels, clean, dtype)

    def found(
        self, margins: Tensor, size: Tensor, error: Tensor, unstable: Tensor, rows: int, labels: Tensor,
        clean: Tensor, dtype: torch.dtype,
    ) -> _Found:  # fmt: skip
        if not self.finite:
            margins = torch.full_like(margins, torch.inf)  # an infinite weight may hide behind a ReLU
        margins = margins.double().nan_to_num(torch.inf, torch.inf, -torch.inf)  # NaN bounds nothing
        size = size.double().nan_to_num(torch.inf, torch.inf)
        error = error.double().nan_to_num(torch.inf, torch.inf).scatter(1, labels[:, None], 0.0)
        tolerance = _TOLERANCE[dtype] * size.amax(1) + error.amax(1) * (1 + 1e-9)
        margins = margins.scatter(1, labels[:, None], -torch.inf)
        cpu = [tensor.cpu() for tensor in (margins, size, clean, labels, unstable, tolerance)]
        return _Found(*cpu, rows=rows)

    def bounds(
        self, graph: Graph, network: Network, box: Box, labels: Tensor, known: Propagation | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Return (upper bounds, size of their terms, rounding, unstable ReLUs, rows) of one batch.

        `known` is a propagation that is begun already.
        """
        if self.method == "interval":
            margins = interval_margins(network, box, labels)
            error = Rounding.of(graph, box, roundings=self.roundings(box)).logit_pairs(labels)
            return margins, margins.abs(), error, labels.new_zeros(labels.shape), 0
        if self.method == "best":
            runs = [replace(self, method=method) for method in ("zonotope", "crown", "interval")]
            found = [run.bounds(graph, network, box, labels) for run in runs]
            margins = torch.stack([entry[0] for entry in found]).amin(0)  # amin keeps NaN
            size = torch.stack([entry[1] for entry in found]).amax(0)
            sure = torch.stack([entry[0] + entry[2] for entry in found]).amin(0)  # the least of what each can vouch for
            return margins, size, (sure - margins).clamp(min=0), found[0][3], sum(entry[4] for entry in found)
        if self.direction == "forward":
            return self.forward(graph, box, labels)
        return self.backward(graph, labels, known or self.propagation(graph, box))

    def propagation(self, graph: Graph, box: Box) -> Propagation:
        grids = Grids(memory=self.memory)
        working_set = self.working_set(box.center.device)
        return Propagation(graph, box, _SLOPES[self.method], working_set, self.tick, grids=grids)

    def roundings(self, box: Box) -> int:
        """How often a weight was rounded between the stored network and the one that is bounded, folding aside."""
        parts = self.network.parts.values()
        return int(any(part.dtype.itemsize > box.center.dtype.itemsize for part in parts))

    def backward(self, graph: Graph, labels: Tensor, run: Propagation) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        box, device = run.box, run.box.center.device
        run.prepare()
        classes = graph.nodes[-1].size
        rows = torch.eye(classes, dtype=box.center.dtype, device=device)[None] - _one_hot(labels, classes, box)[:, None]
        which = torch.arange(labels.numel(), device=device).repeat_interleave(classes)
        rows = rows.reshape(-1, classes)
        if torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
            constant, spread = run.upper_of_rows(len(graph.nodes) - 1, rows, which)
            error = torch.zeros_like(constant)  # bounds for training; nothing is certified by them
        else:
            constant, spread, error = rows_with_error(
                run, Rounding.of(graph, box, run, self.roundings(box)), rows, which
            )
            run.rows += rows.shape[0]
        margins, size = constant + spread, constant.abs() + spread.abs()
        unstable = [lines.unstable.flatten(1).sum(1) for lines in run.lines.values()]
        total = torch.stack(unstable).sum(0) if unstable else labels.new_zeros(labels.shape)
        return margins.view(-1, classes), size.view(-1, classes), error.view(-1, classes), total, run.rows

    def forward(self, graph: Graph, box: Box, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        margins, sizes, unstable = [], [], []
        for sample, label in enumerate(labels.tolist()):
            self.tick()
            zonotope = forward_zonotope(graph, box[sample : sample + 1])
            margins.append(zonotope_margins(zonotope, label))
            difference = zonotope.center - zonotope.center[label]
            sizes.append(difference.abs() + (margins[-1] - difference))
            unstable.append(zonotope.generators.shape[0] - box.center[0].numel())
        error = Rounding.of(graph, box, roundings=self.roundings(box)).logit_pairs(labels)
        return torch.stack(margins), torch.stack(sizes), error, labels.new_tensor(unstable), 0

    def working_set(self, device: torch.device) -> int:
        default = _CPU_WORKING_SET if device.type == "cpu" else _GPU_WORKING_SET
        return default if self.memory_bytes is None else max(1, self.memory_bytes // 8)

    def batch(self, graph: Graph, inputs: Tensor, dtype: torch.dtype) -> int:
        """Return how many samples go together: one where a single one fills the working set."""
        widest = max(node.size for node in graph.nodes)
        size = widest if self.method == "interval" else widest * widest
        return max(1, min(256, self.working_set(inputs.device) // (size * torch.finfo(dtype).bits // 8)))


def _clean_margin(network: Network, inputs: Tensor, labels: Tensor) -> Tensor:
    """Return z_y - max of the others in float64, NaN where a logit is not finite."""
    together = max(1, min(128, 2**24 // network.widest))
    logits = torch.cat([network.forward(part.double()) for part in inputs.split(together)])
    own = logits.gather(1, labels[:, None])[:, 0]
    margin = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return torch.where(torch.isfinite(logits).all(1), margin, torch.full_like(margin, torch.nan))


def _one_hot(labels: Tensor, classes: int, box: Box) -> Tensor:
    return torch.nn.functional.one_hot(labels, classes).to(box.center.dtype)


def _device(network: Network, device: torch.device | str | None) -> torch.device:
    own = next((tensor.device for tensor in network.parts.values()), torch.device("cpu"))
    return own if device is None else torch.device(device)


def _check(
    network: Network, inputs: Tensor, labels: Tensor, eps: float, method: str, input_range: Range, dtype: torch.dtype,
    direction: str, memory_bytes: int | None,
) -> None:  # fmt: skip
    check_box(inputs, eps, input_range, network.input_shape)
    if method not in get_args(Method):
        raise CertificationError(f"unknown method {method!r}; there are: {', '.join(get_args(Method))}")
    if direction not in get_args(Direction) or (direction == "forward" and method != "zonotope"):
        raise CertificationError(f"direction must be backward, or forward for the zonotope, got {direction!r}")
    if dtype not in _TOLERANCE:
        raise CertificationError(f"bounds are computed in float32 or float64, got {dtype}")
    if memory_bytes is not None and memory_bytes < 1 << 20:
        raise CertificationError(f"memory_bytes must be at least {1 << 20}, got {memory_bytes}")
    whole = labels.shape == inputs.shape[:1] and labels.dtype == torch.int64
    if inputs.shape[0] == 0 or not whole:
        raise CertificationError(
            f"wanted 1 sample or more and one class each (int64), got {tuple(labels.shape)} labels of {labels.dtype}"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= network.num_classes:
        raise CertificationError(f"labels must be from 0 to {network.num_classes - 1}")
    if not math.isfinite(eps):
        raise CertificationError(f"eps must be finite, got {eps}")
