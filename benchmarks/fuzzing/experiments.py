"""Odd experiment files: tables of every kind that a file may have, with odd values and odd shapes in them."""

import json
import random
from typing import Any

from benchmarks.fuzzing.case import Broken, Outcome, Place
from hawthorn.experiment import read_experiment

TABLES = (
    "settings",
    "arms",
    "grid",
    "map",
    "variants",
    "pretrain",
    "paper",
    "figure",
    "theory",
    "robustness",
    "title",
    "extends",
    "x",
)
LABELS = ("a", "b", "", "a b", "../x", "é", "1", "rule", "settings", "arms", "a+b", "x" * 300)
SETTINGS = {
    "num-clients": (2, 8, 0, "8", 1.0),
    "rule": ("mean()", "krum(num_byzantine={f})", "krum()", "", 3),
    "seed": (1, -1, 2**70, True),
    "attack": ("sign_flip()", "none", "{a}"),
    "malicious-clients": ("0", "50%", "9"),
    "tau": (0.5, 2, "0.5"),
    "name": ("n", "../n", "", 1),
    "like": ("a", "b", "c", 1),
    "run": ("a", "b", "x:a", ":", "quickstart:a", 1),
    "label": ("A", 1, []),
    "extra": (True, 0, "no"),
    "paper": ("a", 1),
    "arms": (3, "x"),
    "pretrain": ({}, 3),
    "from-model": ("m.safetensors",),
    "nmae": (1,),
    "num-rounds": (0, 3),
}
ODD = (
    0,
    1,
    -1,
    0.5,
    True,
    "",
    "x",
    "{f}",
    [],
    [1, 2],
    ["a", "a"],
    [[1]],
    {},
    {"a": 1},
    {"a": {}},
    {"a": {"b": {}}},
    [{}],
)
TEXTS = (
    "[",
    "]",
    "=",
    '"',
    "'''",
    "\x00",
    "a = ",
    "[arms.a]\n[arms.a]",
    "a = 1979-05-27T07:32:00Z",
    "\ufeff",
    "x = 0x" + "f" * 4000,
    "x = " + "9" * 5000,
    "x = " + "[" * 3000,
)


def file(draw: random.Random) -> Outcome:
    """Read a file of odd tables; every arm that is read has settings or says why not."""
    tables = content(draw)
    lines = [f"{json.dumps(key)} = {inline(value)}" for key, value in tables.items()]
    if draw.random() < 0.05:
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(TEXTS))
    path = Place.folder / "experiment.toml"
    path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    overrides = {"num-rounds": draw.choice((1, 1, 1, "x"))} if draw.random() < 0.2 else {}
    variant, arm = (draw.choice((None, None, "a", "v")) if key in tables else None for key in ("variants", "arms"))
    experiment = read_experiment(str(path), overrides, variant=variant, arm=arm)
    for arm in experiment.arms:
        if arm.config is None and not arm.problem:
            raise Broken(f"arm {arm.label!r} has neither settings nor a problem")
    return "read" if experiment.runs else "no arm can run"


def content(draw: random.Random) -> dict[str, Any]:
    """Return the tables of a file, most of them of the shape that is wanted."""
    found: dict[str, Any] = {}
    for table in draw.sample(TABLES, draw.randrange(1, 5)):
        found[table] = draw.choice(ODD) if draw.random() < 0.04 else shaped(draw, table)
    if draw.random() < 0.9:
        found.pop("x", None)
    if "grid" in found and draw.random() < 0.9:
        found.pop("arms", None)
    if "grid" not in found and draw.random() < 0.9:
        found.pop("map", None)
    if draw.random() < 0.3:
        found |= some_settings(draw)
    return found


def shaped(draw: random.Random, table: str) -> Any:
    """Return a table's content as it should look, with odd values."""
    if table in ("settings", "pretrain"):
        return some_settings(draw)
    if table in ("arms", "variants"):
        return {label(draw): maybe(draw, some_settings(draw)) for _ in range(draw.randrange(4))}
    if table == "grid":
        axes = ([0, 1], ["x", "y"], {"p": {"attack": "sign_flip()"}, "q": {}}, {"p": some_settings(draw)})
        return {
            draw.choice(("f", "a", "seed", "1", "a b")): maybe(draw, draw.choice(axes))
            for _ in range(draw.randrange(4))
        }
    if table == "map":
        return {
            key: draw.choice(("f", "a", "seed", 1))
            for key in ("rows", "columns", "worst", "value")
            if draw.random() < 0.8
        }
    if table == "paper":
        rows = {label(draw): draw.choice(([90, 10.5], [90], ["x", 1], 3)) for _ in range(2)}
        return {label(draw): maybe(draw, rows)}
    if table == "extends":
        return draw.choice(("quickstart", "experiment", str(Place.folder / "experiment.toml"), "nothing", ""))
    return {label(draw): draw.choice(ODD)} if table != "title" else draw.choice(("t", 1, []))


def some_settings(draw: random.Random) -> dict[str, Any]:
    """Return a few settings, or keys of an arm."""
    names = draw.sample(list(SETTINGS), draw.randrange(4))
    return {name: maybe(draw, draw.choice(SETTINGS[name])) for name in names}


def label(draw: random.Random) -> str:
    return draw.choice(("a", "b", "v")) if draw.random() < 0.8 else draw.choice(LABELS)


def maybe(draw: random.Random, value: Any) -> Any:
    """Return the value, or now and then another of any shape."""
    return draw.choice(ODD) if draw.random() < 0.05 else value


def inline(value: Any) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {inline(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(inline, value)) + "]"
    return json.dumps(value)
