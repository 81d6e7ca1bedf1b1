"""PyTorch modules as described layers: `describe_module` walks a model and names what it cannot follow.

A module is followed by its exact type: a subclass may compute something else, and so may a module with hooks or a
parametrisation, so these are refused.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from tasks.errors import CertificationError
from tasks.models._layers import Normalise, SeededDropout
from tasks.models.resnet18_half import BasicBlock

Described = list[dict[str, Any]]
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")


def describe_module(module: nn.Module) -> tuple[Described, dict[str, Tensor]]:
    """Return the layers of `module` in evaluation mode and its tensors by their names in the state dict.

    A tensor that several layers share comes once. Raises `CertificationError` for what is not supported.
    """
    state: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    names = {id(tensor): name for name, tensor in state.items()}
    walk = _Walk(names)
    layers = walk.module(module, "")
    return layers, {name: state[name] for name in walk.used}


class _Walk:
    def __init__(self, names: dict[int, str]) -> None:
        self.names = names
        self.used: dict[str, None] = {}

    def module(self, module: nn.Module, path: str) -> Described:
        kind = type(module)
        if kind not in _MODULES:
            supported = ", ".join(sorted(known.__name__ for known in _MODULES))
            raise CertificationError(
                f"{path or 'the model'} is a {kind.__name__}, which no certifier can follow; supported: {supported}"
            )
        if any(getattr(module, hooks, None) for hooks in _HOOKS) or "forward" in vars(module):
            raise CertificationError(f"{path or 'the model'} ({kind.__name__}) has hooks; remove them first")
        return _MODULES[kind](self, module, path)

    def children(self, module: nn.Module, path: str) -> Described:
        inner = module.named_children()
        return [layer for name, child in inner for layer in self.module(child, f"{path}.{name}" if path else name)]

    def tensors(self, module: nn.Module, *roles: str) -> dict[str, str]:
        """Return role -> name of the tensors that `module` has."""
        found = {role: self.names[id(getattr(module, role))] for role in roles if getattr(module, role) is not None}
        self.used.update(dict.fromkeys(found.values()))
        return found


def _conv2d(walk: _Walk, module: Any, path: str) -> Described:
    if module.padding_mode != "zeros":
        raise CertificationError(f"{path}: convolutions pad with zeros, not {module.padding_mode!r}")
    padding = module.padding
    if isinstance(padding, str):
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(module.dilation, module.kernel_size)]
        if any(total % 2 for total in reach):
            raise CertificationError(f"{path}: padding {padding!r} of an even kernel is not the same on both sides")
        padding = [total // 2 for total in reach]
    options = {"stride": list(module.stride), "padding": list(padding), "dilation": list(module.dilation)}
    return [{"kind": "conv2d", **walk.tensors(module, "weight", "bias"), **options, "groups": module.groups}]


def _linear(walk: _Walk, module: Any, path: str) -> Described:
    return [{"kind": "linear", **walk.tensors(module, "weight", "bias")}]


def _pool(kind: str) -> Callable[[_Walk, Any, str], Described]:
    def describe(walk: _Walk, module: Any, path: str) -> Described:
        plain = not module.ceil_mode and getattr(module, "dilation", 1) in (1, (1, 1))
        plain = plain and not getattr(module, "return_indices", False) and getattr(module, "count_include_pad", True)
        if not plain or getattr(module, "divisor_override", None) is not None:
            raise CertificationError(f"{path}: pooling must be plain (no ceil_mode, dilation, indices, own divisor)")
        names = {"kernel": "kernel_size", "stride": "stride", "padding": "padding"}
        return [{"kind": kind, **{key: _pair(getattr(module, name)) for key, name in names.items()}}]

    return describe


def _adaptive(walk: _Walk, module: Any, path: str) -> Described:
    output = _pair(module.output_size)
    if None in output:
        raise CertificationError(f"{path}: adaptive pooling must name height and width, got {module.output_size}")
    return [{"kind": "adaptive_avg_pool2d", "output": output}]


def _flatten(walk: _Walk, module: Any, path: str) -> Described:
    if (module.start_dim, module.end_dim) != (1, -1):
        raise CertificationError(f"{path}: flatten must keep the batch and nothing else (start_dim=1, end_dim=-1)")
    return [{"kind": "flatten"}]


def _batch_norm(walk: _Walk, module: Any, path: str) -> Described:
    if module.running_mean is None or module.running_var is None:
        raise CertificationError(f"{path}: batch normalisation must have running statistics")
    names = walk.tensors(module, "weight", "bias", "running_mean", "running_var")
    return [{"kind": "batch_norm", **names, "eps": module.eps}]


def _normalise(walk: _Walk, module: Any, path: str) -> Described:
    return [{"kind": "normalise", "mean": module.mean.tolist(), "std": module.std.tolist()}]


def _block(walk: _Walk, module: Any, path: str) -> Described:
    inside = {name: walk.module(child, f"{path}.{name}") for name, child in module.named_children()}
    body = [*inside["conv1"], *inside["bn1"], {"kind": "relu"}, *inside["conv2"], *inside["bn2"]]
    return [{"kind": "residual", "body": body, "shortcut": inside["shortcut"]}, {"kind": "relu"}]


def _identity(walk: _Walk, module: Any, path: str) -> Described:
    return []


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple | list) else [value, value]


_MODULES: dict[type[nn.Module], Callable[[_Walk, Any, str], Described]] = {
    nn.Sequential: _Walk.children,
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.ReLU: lambda walk, module, path: [{"kind": "relu"}],
    nn.Flatten: _flatten,
    nn.AvgPool2d: _pool("avg_pool2d"),
    nn.MaxPool2d: _pool("max_pool2d"),
    nn.AdaptiveAvgPool2d: _adaptive,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.Identity: _identity,
    nn.Dropout: _identity,
    nn.Dropout2d: _identity,
    SeededDropout: _identity,
    Normalise: _normalise,
    BasicBlock: _block,
}
