"""`hawthorn list`: what the file system holds, with arguments and first lines of docstrings."""

import dataclasses
import inspect

from rich.console import Console
from rich.table import Table

from hawthorn.engines import ENGINES, REMOTE
from hawthorn.experiment import shipped_experiments
from tasks import spec
from tasks.config import RunConfig
from tasks.errors import ConfigError

ELSEWHERE = ("settings", "engines", "experiments")


def show(console: Console, kind: str | None) -> None:
    """Print one kind (singular or plural), or everything."""
    kinds = (*spec.PACKAGES, *ELSEWHERE)
    if kind is None:
        for each in kinds:
            _show_one(console, each)
        return
    near = [each for each in kinds if kind in (each, each + "s", each.removesuffix("s"))]
    if not near:
        raise ConfigError(f"unknown kind {kind!r}; there are: {', '.join(kinds)}")
    _show_one(console, near[0])


def _show_one(console: Console, kind: str) -> None:
    if kind == "settings":
        console.print(_settings())
    elif kind == "engines":
        console.print(f"engines: {', '.join((*ENGINES, *REMOTE))}")
    elif kind == "experiments":
        console.print(f"experiments: {', '.join(shipped_experiments())}")
    else:
        console.print(_components(kind))


def _components(kind: str) -> Table:
    table = Table(
        "name",
        "arguments",
        "what it is",
        title=f"{kind} ({spec.PACKAGES[kind].replace('.', '/')})",
        title_justify="left",
    )
    for name in spec.names(kind):
        function = spec.find(kind, name)
        arguments = ", ".join(
            key if p.default is p.empty else f"{key}={p.default!r}"
            for key, p in spec.hyper_parameters(function).items()
        )
        about = (inspect.getdoc(inspect.getmodule(function)) or "").split("\n\n")[0].replace("\n", " ")
        table.add_row(name, arguments, about)
    return table


def _settings() -> Table:
    table = Table(
        "setting",
        "default",
        "what it is",
        title="settings (--set KEY=VALUE, experiment files, flwr run --run-config)",
        title_justify="left",
    )
    for field in dataclasses.fields(RunConfig):
        table.add_row(field.name.replace("_", "-"), repr(field.default), field.metadata["help"])
    return table
