"""Components in text: the file system is the registry.

A component is written as its own call, ``krum(num_byzantine=2)``; several are joined with ``|``.
The text is parsed with Python's `ast` (literals and keyword arguments only, nothing is evaluated),
the name is looked up as file ``krum.py`` with function ``krum`` in the component's package, and
the arguments are checked against that function's signature. To add a component, write one file.
"""

import ast
import functools
import importlib
import inspect
import math
import pkgutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field

from tasks.errors import SpecError

# What a settings key may name: the kind, and the package whose files are its components.
PACKAGES = {
    "dataset": "tasks.datasets",
    "model": "tasks.models",
    "partition": "tasks.partitions",
    "schedule": "tasks.schedules",
    "edge": "tasks.edge",
    "attack": "client.attacks",
    "training": "client.training",
    "collusion": "client.collusion",
    "mixing": "strategies.mixing",
    "rule": "strategies.rules",
    "optimizer": "strategies.optimizers",
    "transform": "strategies.transforms",
    "gate": "certify.gates",
}


@dataclass(frozen=True)
class Component:
    """A named function with its hyper-parameters bound; call it with the positional arguments of its kind."""

    name: str
    function: Callable[..., typing.Any]
    arguments: dict[str, typing.Any] = field(default_factory=dict)

    def __call__(self, *args: typing.Any) -> typing.Any:
        return self.function(*args, **self.arguments)

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={value!r}' for key, value in self.arguments.items())})"


@functools.cache
def names(kind: str) -> tuple[str, ...]:
    """Return the sorted names of all components of a kind."""
    package = importlib.import_module(PACKAGES[kind])
    return tuple(sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")))


@functools.cache
def find(kind: str, name: str) -> Callable[..., typing.Any]:
    """Return the function of a component; an unknown name raises `SpecError` listing what exists."""
    if name not in names(kind):
        raise SpecError(f"unknown {kind} {name!r}; there are: {', '.join(names(kind)) or 'none'}")
    module = importlib.import_module(f"{PACKAGES[kind]}.{name}")
    if not callable(function := getattr(module, name, None)):
        raise SpecError(f"{module.__name__} must hold a function named {name}")
    return function


def hyper_parameters(function: Callable[..., typing.Any]) -> dict[str, inspect.Parameter]:
    """Return the keyword-only parameters of a component's function: what its text may set."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


@functools.lru_cache(maxsize=256)
def resolve(kind: str, text: str) -> Component:
    """Return the one component that `text` names, its arguments checked; raises `SpecError`. It is shared."""
    components = resolve_chain(kind, text)
    if len(components) != 1:
        raise SpecError(f"{kind} wants exactly one component, got {len(components)} in {text!r}")
    return components[0]


@functools.lru_cache(maxsize=256)
def resolve_chain(kind: str, text: str) -> tuple[Component, ...]:
    """Return the components of a chain ``a(...) | b(...)`` in order; an empty text is an empty chain."""
    if not text.strip():
        return ()
    return tuple(_bind(kind, name, arguments) for name, arguments in _parse(text))


def _parse(text: str) -> list[tuple[str, dict[str, typing.Any]]]:
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise SpecError(f"cannot read {text!r}: {error}; write it as name(argument=value)") from None
    parts: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        parts.append(node.right)
        node = node.left
    parts.append(node)
    return [_call(part, text) for part in reversed(parts)]


def _call(node: ast.expr, text: str) -> tuple[str, dict[str, typing.Any]]:
    if isinstance(node, ast.Name):
        return node.id, {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise SpecError(f"cannot read {text!r}: every part must look like name(argument=value)")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise SpecError(f"cannot read {text!r}: arguments of {node.func.id} are given by name, as argument=value")
    arguments: dict[str, typing.Any] = {}
    for keyword in node.keywords:
        if keyword.arg in arguments:
            raise SpecError(f"cannot read {text!r}: {keyword.arg} is given twice")
        _check_size(keyword)
        try:
            arguments[str(keyword.arg)] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, MemoryError, RecursionError):
            wanted = "a number, text, tuple, list, True, False or None"
            raise SpecError(f"cannot read {keyword.arg} in {text!r}: its value must be {wanted}") from None
    return node.func.id, arguments


def _check_size(keyword: ast.keyword) -> None:
    """Raise `SpecError` for whole numbers that no computation here could hold, or even print."""
    for node in ast.walk(keyword.value):
        if isinstance(node, ast.Constant) and isinstance(node.value, int) and node.value.bit_length() > 63:
            raise SpecError(f"{keyword.arg} holds a whole number of more than 64 bits")


def _bind(kind: str, name: str, arguments: dict[str, typing.Any]) -> Component:
    function = find(kind, name)
    allowed = hyper_parameters(function)
    hints = typing.get_type_hints(function)
    for key, value in arguments.items():
        if key not in allowed:
            raise SpecError(f"{kind} {name} has no argument {key!r}; it has: {', '.join(allowed) or 'none'}")
        wanted = hints.get(key, typing.Any)
        if not _fits(value, wanted):
            raise SpecError(f"{kind} {name}: {key} must be {_say(wanted)}, got {value!r}")
    missing = [key for key, p in allowed.items() if p.default is p.empty and key not in arguments]
    if missing:
        raise SpecError(
            f"{kind} {name} needs {', '.join(missing)}; write {name}({', '.join(f'{m}=...' for m in missing)})"
        )
    return Component(name, function, dict(arguments))


def _fits(value: object, wanted: typing.Any) -> bool:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if wanted is typing.Any:
        return True
    if wanted is None or wanted is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is typing.Literal:
        return any(value == option and type(value) is type(option) for option in inner)
    if wanted is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if wanted is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin in (tuple, list):
        if not isinstance(value, tuple | list):
            return False
        if origin is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(_fits, value, inner))
        return not inner or all(_fits(item, inner[0]) for item in value)
    return isinstance(value, wanted) if isinstance(wanted, type) else True


def _say(wanted: typing.Any) -> str:
    return wanted.__name__ if isinstance(wanted, type) else str(wanted).replace("typing.", "")
