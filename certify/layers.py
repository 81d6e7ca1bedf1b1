"""The layers a certifier can follow, as data: reading them from JSON, their shapes, and running them.

A layer is a dict such as ``{"kind": "conv2d", "weight": "conv1.weight", "bias": null, "stride": [2, 2]}``; weights
are named tensors beside it. `read_layers` trusts nothing: it may be given what came over a network. Everything that
is not known, of a wrong shape or absurdly large raises `CertificationError`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional

from tasks.errors import CertificationError

Shape = tuple[int, ...]
Tensors = Mapping[str, Tensor]

MAX_LAYERS = 2000
MAX_DEPTH = 16  # of residual blocks within residual blocks
MAX_ACTIVATIONS = 2**22  # numbers of one sample between two layers, zeros of a padding included
MAX_KEPT = 2**27  # numbers of one sample between all layers together
MAX_OPERATIONS = 10**11  # multiplications and additions of one sample in all layers together
MAX_NUMBER = 2**12  # of any stride, kernel, dilation or padding

CONSTANTS = {"running_mean", "running_var"}  # roles of tensors that no gradient trains


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer: its kind, its numbers, the names of its tensors by role, and the shapes (without batch) around it.

    `operations` are the multiplications and additions that one sample takes in it, what is inside it included.
    """

    kind: str
    input_shape: Shape
    output_shape: Shape
    options: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # role -> name of the tensor
    body: tuple["Layer", ...] = ()
    shortcut: tuple["Layer", ...] = ()
    operations: int = 0

    def describe(self) -> dict[str, Any]:
        """Return the layer as JSON: what `read_layers` reads."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in self.options.items()}
        described = {"kind": self.kind, **self.names, **plain}
        if self.kind == "residual":
            described["body"] = [layer.describe() for layer in self.body]
            described["shortcut"] = [layer.describe() for layer in self.shortcut]
        return described

    def tensor(self, tensors: Tensors, role: str) -> Tensor | None:
        """Return the tensor of `role`, None where the layer has none."""
        return tensors[self.names[role]] if role in self.names else None

    @property
    def numbers(self) -> int:
        """Numbers of one sample that the layer fills: its output, and its input with the zeros around it."""
        padding = self.options.get("padding", (0, 0))
        padded = 0
        if padding != (0, 0):
            channels, height, width = self.input_shape
            padded = channels * (height + 2 * padding[0]) * (width + 2 * padding[1])
        return max(math.prod(self.output_shape), padded)

    @property
    def inside(self) -> list["Layer"]:
        """The layer itself and all inside it."""
        return [self, *(inner for layer in (*self.body, *self.shortcut) for inner in layer.inside)]

    @property
    def roles(self) -> list[tuple[str, str]]:
        """(role, name) of the tensors of this layer and of all inside it, in order."""
        inner = [pair for layer in (*self.body, *self.shortcut) for pair in layer.roles]
        return [*self.names.items(), *inner]


def run(layers: Sequence[Layer], tensors: Tensors, values: Tensor) -> Tensor:
    """Return the output of `layers` for `values` [batch, ...]; works under autograd and torch.func."""
    for layer in layers:
        values = _KINDS[layer.kind].run(layer, tensors, values)
    return values


def scale_and_shift(layer: Layer, tensors: Tensors, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and shift per channel of a layer `normalise`, `affine` or `batch_norm` (of evaluation mode)."""
    if layer.kind == "normalise":
        mean, std = (torch.tensor(layer.options[k], dtype=like.dtype, device=like.device) for k in ("mean", "std"))
        return 1 / std, -mean / std
    if layer.kind == "affine":
        return tensors[layer.names["scale"]], tensors[layer.names["shift"]]
    scale = (tensors[layer.names["running_var"]] + layer.options["eps"]).rsqrt()
    if (weight := layer.tensor(tensors, "weight")) is not None:
        scale = scale * weight
    shift = -tensors[layer.names["running_mean"]] * scale
    bias = layer.tensor(tensors, "bias")
    return scale, shift if bias is None else shift + bias


def read_layers(specs: object, input_shape: Shape, shapes: Mapping[str, Shape]) -> tuple[Layer, ...]:
    """Return the layers that `specs` (a list of dicts) describes for inputs of `input_shape`; raises on any fault."""
    return _read_list(specs, input_shape, shapes, 0, _Budget())


@dataclass
class _Budget:
    """What all layers read so far take together."""

    layers: int = 0
    kept: int = 0
    operations: int = 0


def _read_list(
    specs: object, shape: Shape, shapes: Mapping[str, Shape], depth: int, budget: _Budget
) -> tuple[Layer, ...]:
    if not isinstance(specs, list | tuple):
        raise CertificationError(f"an architecture is a list of layers, got {type(specs).__name__}")
    if depth > MAX_DEPTH:
        raise CertificationError(f"residual blocks may be nested {MAX_DEPTH} deep, got more")
    layers = []
    for spec in specs:
        budget.layers += 1
        if budget.layers > MAX_LAYERS:
            raise CertificationError(f"an architecture may have {MAX_LAYERS} layers, got more")
        reader = _Reader(spec, shape, shapes, budget)
        layer = _read_residual(reader, depth, budget) if reader.kind == "residual" else reader.finish()
        layers.append(layer)
        shape = layer.output_shape
    return tuple(layers)


def _read_residual(reader: "_Reader", depth: int, budget: _Budget) -> Layer:
    body, shortcut = (
        _read_list(reader.take(name), reader.shape, reader.shapes, depth + 1, budget) for name in ("body", "shortcut")
    )
    reader.nothing_left()
    outputs = [branch[-1].output_shape if branch else reader.shape for branch in (body, shortcut)]
    if outputs[0] != outputs[1]:
        reader.fail(f"both branches must end in one shape, body has {outputs[0]}, shortcut {outputs[1]}")
    reader.spend(outputs[0])
    inside = sum(layer.operations for layer in (*body, *shortcut)) + reader.operations
    return Layer("residual", reader.shape, outputs[0], body=body, shortcut=shortcut, operations=inside)


class _Reader:
    """Takes the entries of one described layer one by one, checking each."""

    def __init__(self, spec: object, shape: Shape, shapes: Mapping[str, Shape], budget: _Budget) -> None:
        self.number, self.shape, self.shapes, self.budget = budget.layers, shape, shapes, budget
        self.kind = "?"
        self.terms = 1  # operations per number of the output
        self.operations = 0
        if not isinstance(spec, dict):
            self.fail(f"a layer is a dict with a kind, got {type(spec).__name__}")
        self.left: dict[Any, Any] = dict(spec)
        kind = self.left.pop("kind", None)
        if not isinstance(kind, str) or kind not in _KINDS:
            self.fail(f"unknown kind {_shown(kind)!r:.40}; there are: {', '.join(_KINDS)}")
        self.kind = kind
        self.options: dict[str, Any] = {}
        self.names: dict[str, str] = {}

    def fail(self, text: str) -> NoReturn:
        raise CertificationError(f"layer {self.number} ({self.kind}): {text}")

    def take(self, key: str, default: Any = None) -> Any:
        return self.left.pop(key, default)

    def nothing_left(self) -> None:
        if self.left:
            self.fail(f"unknown entries {', '.join(sorted(str(key)[:40] for key in self.left)[:5])}")

    def finish(self) -> Layer:
        output = _KINDS[self.kind].read(self)
        self.nothing_left()
        if not all(size >= 1 for size in output):
            self.fail(f"inputs of shape {self.shape} are too small")
        self.spend(output)
        return Layer(self.kind, self.shape, output, self.options, self.names, operations=self.operations)

    def spend(self, output: Shape) -> None:
        """Count what an output takes; fails where it, or all layers together, would take too much."""
        self.numbers_fit(output, "an output")
        self.operations = math.prod(output) * self.terms
        self.budget.kept += math.prod(output)
        self.budget.operations += self.operations
        if self.budget.kept > MAX_KEPT:
            self.fail(f"all outputs together may have {MAX_KEPT} numbers per sample, up to here there are more")
        if self.budget.operations > MAX_OPERATIONS:
            self.fail(f"a network may take {MAX_OPERATIONS} multiplications per sample, up to here it takes more")

    def numbers_fit(self, shape: Shape, what: str) -> None:
        if math.prod(shape) > MAX_ACTIVATIONS:
            self.fail(f"{what} may have {MAX_ACTIVATIONS} numbers, got shape {shape}")

    def name(self, role: str, shape: Shape | None, required: bool = True) -> Shape | None:
        """Read the tensor name of a role and return its shape, which must be `shape` where that is given."""
        name = self.take(role)
        if name is None and not required:
            return None
        if not isinstance(name, str) or name not in self.shapes:
            self.fail(f"{role} must name a tensor, got {_shown(name)!r:.80}; there are {len(self.shapes)}")
        if shape is not None and self.shapes[name] != shape:
            self.fail(f"{role} {name[:80]!r} must have shape {shape}, got {self.shapes[name]}")
        self.names[role] = name
        return self.shapes[name]

    def pair(self, key: str, default: int | None, least: int) -> tuple[int, int]:
        """Read an integer or a pair of integers from `least` on."""
        value = self.take(key, default)
        pair = [value, value] if isinstance(value, int) else value
        good = isinstance(pair, list | tuple) and len(pair) == 2
        if not good or not all(type(v) is int and least <= v <= MAX_NUMBER for v in pair):
            self.fail(f"{key} must be one or two whole numbers from {least} to {MAX_NUMBER}, got {_shown(value):.60}")
        self.options[key] = (pair[0], pair[1])
        return self.options[key]

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """Read a list of `length` finite numbers."""
        value = self.take(key)
        if not isinstance(value, list | tuple) or len(value) != length or not all(map(_is_number, value)):
            self.fail(f"{key} must be {length} finite numbers, got {_shown(value):.60}")
        self.options[key] = tuple(float(v) for v in value)
        return self.options[key]

    def image(self) -> tuple[int, int, int]:
        if len(self.shape) != 3:
            self.fail(f"wants inputs (channels, height, width), got {self.shape}")
        return self.shape[0], self.shape[1], self.shape[2]

    def windows(self, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> list[int]:
        """Return height and width after sliding a window over the image."""
        channels, *sizes = self.image()
        self.numbers_fit((channels, *(n + 2 * p for n, p in zip(sizes, padding, strict=True))), "a padded image")
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        return [(n + 2 * p - r) // s + 1 for n, p, r, s in zip(sizes, padding, reach, stride, strict=True)]


def _shown(value: object) -> str:
    """Return a foreign value as text; the text of an integer of thousands of digits is refused by Python."""
    try:
        return str(value)
    except ValueError:
        return "an integer of thousands of digits"


def _is_number(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**53  # no float holds 10**400


def _read_linear(reader: _Reader) -> Shape:
    if len(reader.shape) != 1:
        reader.fail(f"wants flat inputs, got {reader.shape}; put a flatten before it")
    weight = reader.name("weight", None)
    if weight is None or len(weight) != 2 or weight[1] != reader.shape[0]:
        reader.fail(f"weight must have shape (outputs, {reader.shape[0]}), got {weight}")
    reader.name("bias", (weight[0],), required=False)
    reader.terms = weight[1]
    return (weight[0],)


def _read_conv2d(reader: _Reader) -> Shape:
    channels, _, _ = reader.image()
    weight = reader.name("weight", None)
    groups = reader.take("groups", 1)
    if type(groups) is not int or groups < 1 or channels % groups:
        reader.fail(f"groups must divide the {channels} channels, got {_shown(groups):.40}")
    if weight is None or len(weight) != 4 or weight[1] * groups != channels or weight[0] % groups or 0 in weight:
        wanted = f"(outputs, {channels // groups}, height, width)"
        reader.fail(f"weight must be {wanted}, its outputs divided by {groups} groups, got {weight}")
    reader.name("bias", (weight[0],), required=False)
    stride, padding, dilation = reader.pair("stride", 1, 1), reader.pair("padding", 0, 0), reader.pair("dilation", 1, 1)
    reader.options["groups"] = groups
    reader.terms = math.prod(weight[1:])
    return (weight[0], *reader.windows(weight[2:], stride, padding, dilation))


def _read_pool(reader: _Reader) -> Shape:
    channels, _, _ = reader.image()
    kernel = reader.pair("kernel", None, 1)
    stride = reader.pair("stride", kernel[0] if kernel[0] == kernel[1] else None, 1)
    padding = reader.pair("padding", 0, 0)
    if any(2 * p > k for p, k in zip(padding, kernel, strict=True)):
        reader.fail(f"padding may be half the kernel {kernel}, got {padding}")
    reader.terms = math.prod(kernel)
    return (channels, *reader.windows(kernel, stride, padding, (1, 1)))


def _read_adaptive(reader: _Reader) -> Shape:
    channels, height, width = reader.image()
    output = reader.pair("output", None, 1)
    if height % output[0] or width % output[1]:
        reader.fail(f"output {output} must divide the input's {height}x{width}")
    reader.terms = (height // output[0]) * (width // output[1])
    return channels, *output


def _read_normalise(reader: _Reader) -> Shape:
    reader.numbers("mean", reader.shape[0])
    if min(reader.numbers("std", reader.shape[0])) <= 0:
        reader.fail("std must be above 0")
    return reader.shape


def _read_affine(reader: _Reader) -> Shape:
    for role in ("scale", "shift"):
        reader.name(role, reader.shape[:1])
    return reader.shape


def _read_batch_norm(reader: _Reader) -> Shape:
    for role, required in (("weight", False), ("bias", False), ("running_mean", True), ("running_var", True)):
        reader.name(role, reader.shape[:1], required)
    eps = reader.take("eps", 1e-5)
    if not _is_number(eps) or not 0 < eps <= 1:
        reader.fail(f"eps must be above 0 and at most 1, got {_shown(eps):.40}")
    reader.options["eps"] = float(eps)
    return reader.shape


def _run_linear(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    return functional.linear(values, tensors[layer.names["weight"]], layer.tensor(tensors, "bias"))


def _run_conv2d(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    weight, bias = tensors[layer.names["weight"]], layer.tensor(tensors, "bias")
    return functional.conv2d(values, weight, bias, **layer.options)


def _run_avg_pool(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    options = layer.options
    return functional.avg_pool2d(values, options["kernel"], options["stride"], options["padding"])


def _run_max_pool(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    options = layer.options
    return functional.max_pool2d(values, options["kernel"], options["stride"], options["padding"])


def _run_adaptive(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    return functional.adaptive_avg_pool2d(values, layer.options["output"])


def _run_affine(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    scale, shift = scale_and_shift(layer, tensors, values)
    shape = (-1, *(1,) * (values.ndim - 2))
    return values * scale.view(shape) + shift.view(shape)


def _run_normalise(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    shape = (-1, *(1,) * (values.ndim - 2))
    mean, std = (torch.tensor(layer.options[k], dtype=values.dtype, device=values.device) for k in ("mean", "std"))
    return (values - mean.view(shape)) / std.view(shape)


def _run_residual(layer: Layer, tensors: Tensors, values: Tensor) -> Tensor:
    return run(layer.body, tensors, values) + run(layer.shortcut, tensors, values)


@dataclass(frozen=True)
class _Kind:
    read: Callable[[_Reader], Shape]
    run: Callable[[Layer, Tensors, Tensor], Tensor]


_KINDS: dict[str, _Kind] = {
    "linear": _Kind(_read_linear, _run_linear),
    "conv2d": _Kind(_read_conv2d, _run_conv2d),
    "relu": _Kind(lambda reader: reader.shape, lambda layer, tensors, values: functional.relu(values)),
    "flatten": _Kind(lambda reader: (math.prod(reader.shape),), lambda layer, tensors, values: values.flatten(1)),
    "avg_pool2d": _Kind(_read_pool, _run_avg_pool),
    "max_pool2d": _Kind(_read_pool, _run_max_pool),
    "adaptive_avg_pool2d": _Kind(_read_adaptive, _run_adaptive),
    "normalise": _Kind(_read_normalise, _run_normalise),
    "affine": _Kind(_read_affine, _run_affine),
    "batch_norm": _Kind(_read_batch_norm, _run_affine),
    "residual": _Kind(lambda reader: reader.shape, _run_residual),
}
KINDS = tuple(_KINDS)
