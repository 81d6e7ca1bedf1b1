"""Experiments as files: settings shared by all arms, and one table per arm.

    title = "Backdoor, with and without a defence"
    [settings]
    dataset = "digits()"
    [arms.undefended]
    rule = "mean()"
    [arms.defended]
    rule = "median()"

A file without `[arms]` is one run; a flat file of settings, as Flower's run config, works too.
"""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from tasks.config import RunConfig
from tasks.errors import ConfigError

RESERVED = ("title", "about", "settings", "arms")


@dataclass(frozen=True)
class Experiment:
    """One run per arm, with resolved settings; `folder` holds the arms' folders and the report."""

    title: str
    name: str
    runs: list[RunConfig]

    @property
    def folder(self) -> Path:
        """The folder of the experiment: the run's own when there is one arm only."""
        return self.runs[0].replace(name=self.name).run_folder


def read_experiment(
    file: str | None, overrides: Mapping[str, Any], *, name: str | None = None, arm: str | None = None
) -> Experiment:
    """Read an experiment file (a path, or the name of a shipped one), apply overrides, check every arm."""
    path = find_experiment(file or "quickstart")
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    shared, arms = _tables(path, content)
    if arm is not None:
        if arm not in arms:
            raise ConfigError(f"{path} has no arm {arm!r}; it has: {', '.join(arms) or 'none'}")
        arms = {"": arms[arm]}
    if wrong := [label for label in arms if label and not re.fullmatch(r"\w[\w.+=@-]*", label)]:
        raise ConfigError(f"{path}: an arm's name is made of letters, digits and . _ - + = @, got {wrong[0]!r}")
    title = str(content.get("title", path.stem))
    base = name or str(overrides.get("name", shared.get("name", path.stem)))
    runs = []
    for label, changes in (arms or {"": {}}).items():
        values = {**shared, **changes, **overrides, "name": f"{base}/{label}" if label else base}
        try:
            config = RunConfig.read(values)
            config.resolve_components()
        except ConfigError as error:
            raise type(error)(f"{path}{f', arm {label}' if label else ''}: {error}") from None
        runs.append(config)
    return Experiment(title, base, runs)


def _tables(path: Path, content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    settings, arms = content.get("settings", {}), content.get("arms", {})
    flat = {key: value for key, value in content.items() if key not in RESERVED}
    if wrong := [key for key, value in flat.items() if isinstance(value, dict | list)]:
        raise ConfigError(f"{path}: unknown table {wrong[0]!r}; there are: [settings], [arms.NAME]")
    if (
        not isinstance(settings, dict)
        or not isinstance(arms, dict)
        or not all(isinstance(a, dict) for a in arms.values())
    ):
        raise ConfigError(f"{path}: settings and arms must be tables: [settings], [arms.NAME]")
    return {**flat, **settings}, arms


def find_experiment(name: str) -> Path:
    """Return the path of an experiment: a file, or a shipped one by its name such as ``quickstart``."""
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_experiments()
    stem = name.removesuffix(".toml").removeprefix("experiments/")
    if stem in shipped:
        return shipped[stem]
    raise ConfigError(f"there is no experiment {name!r}: no such file, and shipped are: {', '.join(shipped) or 'none'}")


def shipped_experiments() -> dict[str, Path]:
    """Return the experiments that come with the program: name -> file."""
    beside = Path(__file__).parent.parent / "experiments"  # a checkout
    folder = beside if beside.is_dir() else Path(str(files("hawthorn") / "experiments"))  # an installed wheel
    return {str(p.relative_to(folder).with_suffix("")): p for p in sorted(folder.glob("**/*.toml"))}


def read_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` pairs of the command line; text settings need no quotes."""
    kinds = {f.name.replace("_", "-"): type(f.default) for f in dataclasses.fields(RunConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("_", "-")
        if not equals:
            raise ConfigError(f"--set wants key=value, got {pair!r}")
        values[key] = _unquoted(text.strip()) if kinds.get(key) is str else _value(key, text.strip())
    return values


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted and text[0] not in text[1:-1] else text


def _value(key: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text.lower()}")["value"]
    except tomllib.TOMLDecodeError:
        raise ConfigError(f"cannot read --set {key}={text}: write a number, or true or false") from None
