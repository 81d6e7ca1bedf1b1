"""Grids of an experiment file: axes whose values are settings, expanded into arms.

    [settings]
    rule = "krum(num_byzantine={f})"
    [grid]
    attack = { flip = { attack = "sign_flip()" }, noise = { attack = "gaussian_noise()" } }
    f = { 0 = { attack = "" }, 1 = { malicious-clients = "0" } }
    seed = [1, 2]

An axis is a table from labels to settings, or a list of labels that stand for nothing but themselves. Later axes
override earlier ones. `{axis}` in any text is replaced by the axis's label. Points with equal settings share an arm:
above, with f = 0, one run serves both attacks.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.errors import ConfigError

MOST_POINTS = 20_000
LABEL = r"\w[\w.+=@-]*"  # what an arm may be named: it names a folder


@dataclass(frozen=True)
class Axis:
    """One dimension of a grid: its name, and the settings that each label stands for."""

    name: str
    values: dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Map:
    """How a grid is drawn: axes for rows and columns, the axis the worst is taken over, and the rate that is shown."""

    rows: str
    columns: str
    worst: str
    value: str = "acc"


def read_axes(content: object) -> tuple[Axis, ...]:
    """Read the `[grid]` table; raises `ConfigError` that names the axis."""
    if not isinstance(content, dict) or not content:
        raise ConfigError("[grid] must be a table of axes, such as f = [0, 1] or attack = { none = {} }")
    axes = tuple(Axis(name, _read_values(name, values)) for name, values in content.items())
    size = 1
    for axis in axes:
        size *= len(axis.values)
    if size > MOST_POINTS:
        raise ConfigError(f"[grid] has {size} points; at most {MOST_POINTS} are allowed")
    return axes


def _read_values(name: str, values: object) -> dict[str, dict[str, Any]]:
    if not re.fullmatch(r"[A-Za-z]\w*", name):
        raise ConfigError(f"[grid]: an axis is named by letters, digits and _, got {name!r}")
    if isinstance(values, list):
        if any(isinstance(value, dict | list) for value in values) or len(set(map(str, values))) < len(values):
            raise ConfigError(f"[grid] {name}: a list holds different numbers or texts, got {values}")
        values = {str(value): {} for value in values}
    if not isinstance(values, dict) or not values or not all(isinstance(v, dict) for v in values.values()):
        raise ConfigError(f"[grid] {name} must be a list of labels or a table from labels to settings, got {values!r}")
    if wrong := [label for label in values if not re.fullmatch(LABEL, label)]:
        raise ConfigError(f"[grid] {name}: a label is made of letters, digits and . _ - + = @, got {wrong[0]!r}")
    return values


def expand(
    shared: Mapping[str, Any], axes: tuple[Axis, ...]
) -> tuple[dict[str, dict[str, Any]], dict[tuple[str, ...], str]]:
    """Return (arms: label -> settings, points: one label per axis -> the arm that serves it)."""
    arms: dict[str, dict[str, Any]] = {}
    points: dict[tuple[str, ...], str] = {}
    seen: dict[str, str] = {}
    for labels in itertools.product(*(axis.values for axis in axes)):
        names = {axis.name: label for axis, label in zip(axes, labels, strict=True)}
        settings = dict(shared)
        for axis, label in zip(axes, labels, strict=True):
            settings.update(axis.values[label])
        settings = {key: _filled(key, value, names) for key, value in settings.items()}
        arm = seen.setdefault(repr(sorted(settings.items())), _arm_label(axes, labels))
        arms.setdefault(arm, settings)
        points[labels] = arm
    return arms, points


def read_map(content: object, axes: tuple[Axis, ...]) -> Map | None:
    """Read the `[map]` table, which names axes of the grid; None if there is none."""
    if content is None:
        return None
    wanted, names = {"rows", "columns", "worst"}, [axis.name for axis in axes]
    if not isinstance(content, dict) or not wanted <= content.keys() <= wanted | {"value"}:
        raise ConfigError("[map] wants rows, columns and worst, each the name of an axis, and value, acc or asr")
    drawn = Map(**{key: str(value) for key, value in content.items()})
    if {drawn.rows, drawn.columns, drawn.worst} != set(names) or len(names) != 3:
        raise ConfigError(f"[map] must name each axis of [grid] once; the axes are {', '.join(names) or 'none'}")
    if drawn.value not in ("acc", "asr"):
        raise ConfigError(f"[map] value must be acc or asr, got {drawn.value!r}")
    return drawn


def _arm_label(axes: tuple[Axis, ...], labels: tuple[str, ...]) -> str:
    """Join the labels; one that starts with a digit says which axis it is of."""
    return "+".join(
        f"{axis.name}={label}" if label[0].isdigit() else label for axis, label in zip(axes, labels, strict=True)
    )


def _filled(key: str, value: Any, names: Mapping[str, str]) -> Any:
    """Replace `{axis}` in a text by the label of that axis."""
    if not isinstance(value, str):
        return value

    def label(match: re.Match[str]) -> str:
        if match[1] not in names:
            raise ConfigError(f"{key} = {value!r}: {match[0]} is no axis of [grid]; there are: {', '.join(names)}")
        return names[match[1]]

    return re.sub(r"\{(\w*)\}", label, value)
