"""A network as data: a list of described layers beside named tensors, with nothing that could run foreign code.

Certifiers work on it rather than on a module: the same bytes can come from a trained model, from a file or from
another machine, and the hash of both parts is its identity. Batch normalisation stays as it is, with its running
statistics among the tensors, so that `vector` is the vector a federation aggregates (`tasks.params.Layout`: what is
trained first, then the statistics) and noise on it is noise on the model; bounds merge it into the layer before
(`zonotope/folding.py`). Dropout is the identity: a network is a model in evaluation.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from certify.layers import CONSTANTS, MAX_ACTIVATIONS, Layer, Shape, read_layers, run
from certify.modules import describe_module
from certify.precision import exact_arithmetic
from tasks.errors import CertificationError
from tasks.params import Layout

MAX_PARAMS = 2**30
MAX_INPUT = MAX_ACTIVATIONS
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HASHED_AT_ONCE = 2**20  # numbers turned into float64 at a time


@dataclass(frozen=True, eq=False)
class Network:
    """Layers, their tensors by name, and the shape of one input; make one with `from_module` or `from_parts`."""

    layers: tuple[Layer, ...]
    input_shape: Shape
    parts: Mapping[str, Tensor] = field(repr=False)  # in the order of the flat vector

    @staticmethod
    def from_module(module: nn.Module, input_shape: Shape, *, copy: bool = True) -> "Network":
        """Return `module` in evaluation mode as a network; what no certifier can follow raises `CertificationError`.

        With ``copy=False`` the tensors are the module's own, so that gradients of bounds reach its parameters.
        """
        architecture, tensors = describe_module(module)
        if copy:
            tensors = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return Network.from_parts(architecture, tensors, input_shape)

    @staticmethod
    def from_parts(architecture: object, tensors: object, input_shape: object) -> "Network":
        """Return the network of described layers and tensors, all of it checked; nothing of it need be trusted.

        Numbers of half precision become float32. Unknown kinds, missing or unused tensors, wrong shapes, absurd
        sizes, NaN, infinity and negative variances raise `CertificationError`.
        """
        shape = _input_shape(input_shape)
        named = _tensors(tensors)
        layers = read_layers(architecture, shape, {name: tuple(tensor.shape) for name, tensor in named.items()})
        output = layers[-1].output_shape if layers else shape
        if len(output) != 1 or output[0] < 2:
            raise CertificationError(f"a network must end in at least 2 logits, this one ends in shape {output}")
        order = _order(layers)
        if unused := sorted(named.keys() - set(order)):
            raise CertificationError(f"tensors that no layer uses: {', '.join(name[:60] for name in unused[:5])}")
        for role, name in (pair for layer in layers for pair in layer.roles):
            if role == "running_var" and bool((named[name] < 0).any()):
                raise CertificationError(f"the variances {name!r} must be 0 or more")
        return Network(layers, shape, {name: named[name] for name in order})

    def architecture(self) -> list[dict[str, Any]]:
        """Return the layers as JSON: what `from_parts` reads."""
        return [layer.describe() for layer in self.layers]

    def tensors(self) -> dict[str, Tensor]:
        """Return the named tensors, in the order of the flat vector; not copies."""
        return dict(self.parts)

    def forward(self, inputs: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """Return the logits [batch, classes] of inputs [batch, *input_shape], differentiable; in `dtype` if given.

        float32 is full precision on every device, whatever the program allows elsewhere.
        """
        if tuple(inputs.shape[1:]) != self.input_shape:
            raise CertificationError(f"inputs must be [batch, {self.input_shape}], got {tuple(inputs.shape)}")
        parts = self.parts if dtype is None else {name: tensor.to(dtype) for name, tensor in self.parts.items()}
        first = next(iter(parts.values()), inputs)
        with exact_arithmetic():
            return run(self.layers, parts, inputs.to(dtype=first.dtype, device=first.device))

    __call__ = forward

    @property
    def num_classes(self) -> int:
        """Number of logits."""
        return self.layers[-1].output_shape[0] if self.layers else self.input_shape[0]

    @property
    def widest(self) -> int:
        """Most numbers of one sample between two layers; all of a padded image count."""
        inside = [inner for layer in self.layers for inner in layer.inside]
        return max(math.prod(self.input_shape), *(layer.numbers for layer in inside), 1)

    @property
    def num_kept(self) -> int:
        """Numbers of one sample between all layers together, as a gradient keeps them."""
        inside = [inner for layer in self.layers for inner in layer.inside]
        return math.prod(self.input_shape) + sum(layer.numbers for layer in inside)

    @property
    def operations(self) -> int:
        """Multiplications and additions that the logits of one sample take."""
        return max(1, sum(layer.operations for layer in self.layers))

    @property
    def num_params(self) -> int:
        """Length of the flat vector, running statistics included."""
        return self.parameter_layout().num_params

    def parameter_layout(self) -> Layout:
        """Return names and shapes in the order of the flat vector; its first `num_trainable` numbers are trained."""
        constant = {name for layer in self.layers for role, name in layer.roles if role in CONSTANTS}
        trained = sum(tensor.numel() for name, tensor in self.parts.items() if name not in constant)
        return Layout(tuple(self.parts), tuple(tuple(tensor.shape) for tensor in self.parts.values()), trained)

    def vector(self) -> Tensor:
        """Return all tensors as one vector [num_params], differentiable."""
        return torch.cat([tensor.reshape(-1) for tensor in self.parts.values()] or [torch.zeros(0)])

    def with_vector(self, vector: Tensor) -> "Network":
        """Return the network with the tensors of `vector` [num_params]: views into it, unchecked, differentiable.

        Noise on running variances may make them negative; then the logits are NaN, which no certifier accepts.
        """
        layout = self.parameter_layout()
        if tuple(vector.shape) != (layout.num_params,):
            raise CertificationError(f"the vector must have shape ({layout.num_params},), got {tuple(vector.shape)}")
        return Network(self.layers, self.input_shape, layout.split(vector))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "Network":
        """Return the network with other tensors of the same names and shapes, unchecked."""
        return Network(self.layers, self.input_shape, {name: tensors[name] for name in self.parts})

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Network":
        """Return the network on another device or in another floating-point type."""
        return self.with_tensors({n: t.to(device=device, dtype=dtype) for n, t in self.parts.items()})

    def detach(self) -> "Network":
        """Return the network cut off from autograd."""
        return self.with_tensors({name: tensor.detach() for name, tensor in self.parts.items()})

    def sha256(self) -> str:
        """Return the hash of layers, input shape and tensors; the same in float32 and in float64, on every device."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        described = {"layers": self.architecture(), "input_shape": list(self.input_shape)}
        digest = hashlib.sha256(json.dumps(described, sort_keys=True, separators=(",", ":")).encode())
        for name, tensor in self.parts.items():
            digest.update(json.dumps([name, list(tensor.shape)]).encode())
            for piece in tensor.detach().reshape(-1).split(HASHED_AT_ONCE):
                digest.update(piece.cpu().numpy().astype("<f8").tobytes())
        return digest.hexdigest()


def _order(layers: tuple[Layer, ...]) -> list[str]:
    """Return the names of all tensors once: those that are trained first, as in `tasks.params.Layout`."""
    roles = [pair for layer in layers for pair in layer.roles]
    trained = dict.fromkeys(name for role, name in roles if role not in CONSTANTS)
    return list(trained | dict.fromkeys(name for role, name in roles if role in CONSTANTS))


def _input_shape(shape: object) -> Shape:
    sizes: Shape = tuple(shape) if isinstance(shape, list | tuple) and len(shape) <= 3 else ()
    if not sizes or not all(type(size) is int and 1 <= size <= MAX_INPUT for size in sizes):
        raise CertificationError(f"input_shape must be (features,) or (channels, height, width), got {str(shape)[:60]}")
    if math.prod(sizes) > MAX_INPUT:
        raise CertificationError(f"one input may have {MAX_INPUT} numbers, got shape {sizes}")
    return sizes


def _tensors(tensors: object) -> dict[str, Tensor]:
    """Return the tensors after checking names, types, sizes and values."""
    if not isinstance(tensors, Mapping):
        raise CertificationError(f"tensors must be a mapping from names to tensors, got {type(tensors).__name__}")
    named: dict[str, Tensor] = {}
    total = 0
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not 0 < len(name) <= 500:
            raise CertificationError(f"the name of a tensor must be text of 1 to 500 letters, got {str(name)[:60]!r}")
        if not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            kind = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CertificationError(f"tensor {name[:60]!r} must be a dense one of floating-point numbers, got {kind}")
        total += tensor.numel()
        if total > MAX_PARAMS or tensor.ndim > 4 or tensor.is_meta:
            raise CertificationError(f"tensors may have 4 dimensions and {MAX_PARAMS} numbers in all, got more")
        if not bool(torch.isfinite(tensor).all()):
            raise CertificationError(f"tensor {name[:60]!r} has NaN or infinity; nothing can be certified with it")
        named[name] = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    if len({(t.dtype, t.device) for t in named.values()}) > 1:
        raise CertificationError("all tensors of a network must have one floating-point type and one device")
    return named
