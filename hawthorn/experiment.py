"""Experiments as files: settings shared by all arms, and one table per arm.

    title = "Backdoor, with and without a defence"
    [settings]
    dataset = "digits()"
    [arms.undefended]
    rule = "mean()"
    [arms.defended]
    rule = "median()"

A file without `[arms]` is one run; a flat file of settings, as Flower's run config, works too. Further tables:

    [grid], [map]      arms from axes, and how their heat map is drawn (see `hawthorn.grid`)
    [variants.NAME]    settings of one of several forms of the experiment, such as its data set; the first is the
                       default; `pretrain` and `arms.ARM` in it change those tables
    [pretrain]         settings of one more run, without attack, whose model all arms start from
    [paper.NAME]       figures to compare with: arm = [ACC, ASR] in percent, for that variant
    [figure]           a paper's figure to draw from the arms (see `hawthorn.reproduce.figure`)
    [robustness]       what the gate measured of every arm's model (see `hawthorn.reproduce.robustness`)
    [theory]           pairs of arms on which FLIP's theory is checked (see `hawthorn.reproduce.theory`)

An arm's table may also hold `label` (how it is shown), `extra = true` (left out unless asked for) and `paper` (the
row of `[paper]` it is compared with, if not the one of its own name). `like = "ARM"` starts from that arm's settings.
`run = "ARM"`, or "FILE:ARM", is no run of its own: it is that arm's, read at another `tau`.

`extends = "flip/table2"` starts from another file's settings, variants and pretraining; `like` and `run` then find
its arms too, and a run taken over from it is that file's own, in its folder, whatever `name` is set to.
"""

import dataclasses
import functools
import hashlib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from hawthorn.derived import READ_AT, derive, like
from hawthorn.grid import LABEL, Axis, Map, expand, read_axes, read_map
from tasks.config import RunConfig
from tasks.errors import ConfigError

TABLES = ("settings", "arms", "grid", "map", "variants", "pretrain", "paper", "figure", "theory", "robustness")
RESERVED = ("title", "about", "extends", *TABLES)
# Settings of where and how a run is done; they do not touch its numbers.
MACHINE = frozenset({"resume", "name", "runs_dir", "data_dir", "workers", "round_timeout", "startup_timeout"})
MACHINE |= {"metrics_port", "log_format", "tensorboard"}
MACHINE |= {"gate_workers", "gate_service", "gate_timeout", "gate_attempts"}
MACHINE |= {"gate_tls", "gate_tls_ca", "gate_tls_cert", "gate_tls_key", "gate_token_file"}


@dataclass(frozen=True)
class Arm:
    """One run of an experiment; `config` is None when its settings cannot be read, and `problem` says why."""

    label: str
    config: RunConfig | None
    problem: str = ""
    title: str = ""
    extra: bool = False
    paper: str = ""  # its row among the paper's figures
    tau: float | None = None  # the threshold its run is read at, where that is not the run's own

    @property
    def shown(self) -> str:
        """The arm's name for people."""
        return self.title or self.label


@dataclass(frozen=True)
class Experiment:
    """Arms with resolved settings; `folder` holds the arms' folders and the report."""

    title: str
    name: str
    arms: list[Arm]
    about: str = ""
    variant: str = ""
    variants: tuple[str, ...] = ()
    start: Arm | None = None  # the run whose model all arms start from
    axes: tuple[Axis, ...] = ()
    points: dict[tuple[str, ...], str] = field(default_factory=dict)  # labels on the axes -> label of the arm
    map: Map | None = None
    paper: dict[str, tuple[float, float]] = field(default_factory=dict)  # row -> (ACC, ASR) in percent

    @property
    def runs(self) -> list[RunConfig]:
        """The settings of every arm that has some."""
        return [arm.config for arm in self.arms if arm.config is not None]

    @property
    def folder(self) -> Path:
        """The folder of the experiment: the run's own when there is one arm only."""
        if not self.runs:
            raise ConfigError(f"{self.title}: no arm has settings that work: {self.arms[0].problem}")
        return self.runs[0].replace(name=self.name).run_folder


def read_experiment(
    file: str | None,
    overrides: Mapping[str, Any],
    *,
    name: str | None = None,
    arm: str | None = None,
    variant: str | None = None,
    suffix: str = "",
    lenient: bool | None = None,
) -> Experiment:
    """Read an experiment file (a path, or the name of a shipped one), apply overrides, check every arm.

    `suffix` is added to the names of the arms' folders. With `lenient` (None: in grids, whose points may name what
    cannot work) an arm that cannot be read keeps its error.
    """
    path = find_experiment(file or "quickstart")
    content, below = _load(path), dict[str, Any]()
    if parent := content.get("extends"):
        below = _load(find_experiment(str(parent)))
        content = derive(path, content, below)
    shared, chosen = _with_variant(path, content, variant)
    axes, points, arms = _arms(path, content, shared)
    lenient = bool(axes) if lenient is None else lenient
    of_variant = content.get("variants", {}).get(chosen, {}).get("arms", {})
    if unknown := [label for label in of_variant if label not in arms]:
        raise ConfigError(f"{path}: [variants.{chosen}.arms] changes {unknown[0]!r}, which is no arm")
    arms = {label: {**table, **of_variant.get(label, {})} for label, table in arms.items()}
    if not axes:
        arms = like(path, arms, _tables_of(parent, below, chosen))
    if arm is not None:
        if arm not in arms:
            raise ConfigError(f"{path} has no arm {arm!r}; it has: {', '.join(arms) or 'none'}")
        if source := arms[arm].get("run"):
            raise ConfigError(
                f"{path}: arm {arm!r} is the run of {source!r}, read at another tau; hawthorn reproduce does"
            )
        arms, axes, points = {"": arms[arm]}, (), {}
    elif not arms:
        arms = {"": {}}
    base = name or str(overrides.get("name", shared.get("name", path.stem))) + (f"-{chosen}" if chosen else "")
    start = _start(path, content, shared, overrides, base, chosen, suffix)
    first = {"from-model": str(start.config.run_folder / "model.safetensors")} if start and start.config else {}
    found = {
        label: _read_arm(path, label, {**shared, **first}, table, overrides, base, suffix, lenient)
        for label, table in arms.items()
        if "run" not in table
    }
    theirs = {key: value for key, value in overrides.items() if key != "name"}  # a run taken over keeps its folder
    others = functools.partial(read_experiment, overrides=theirs, variant=chosen or None, suffix=suffix, lenient=True)
    for label, table in arms.items():
        if "run" in table:
            found[label] = _taken(path, label, table, found, parent, others, start)
    _check_folders(path, found.values())
    return Experiment(
        title=str(content.get("title", path.stem)),
        name=base,
        arms=[found[label] for label in arms],
        about=str(content.get("about", "")).strip(),
        variant=chosen,
        variants=tuple(content.get("variants", {})),
        start=start,
        axes=axes,
        points=points,
        map=None if arm is not None else read_map(content.get("map"), axes),
        paper=_paper(path, content, chosen),
    )


def _read_arm(
    path: Path,
    label: str,
    shared: Mapping[str, Any],
    table: Mapping[str, Any],
    overrides: Mapping[str, Any],
    base: str,
    suffix: str,
    lenient: bool,
) -> Arm:
    about = {"title": str(table.get("label", "")), "extra": bool(table.get("extra", False))}
    about["paper"] = str(table.get("paper", label))
    changes = {key: value for key, value in table.items() if key not in ("label", "extra", "paper")}
    values = {**shared, **changes, **overrides, "name": f"{base}/{label}{suffix}" if label else base + suffix}
    try:
        config = _read(values)
    except ConfigError as error:
        if lenient:
            return Arm(label, None, problem=str(error), **about)
        raise type(error)(f"{path}{f', arm {label}' if label else ''}: {error}") from None
    return Arm(label, config, **about)


def _taken(
    path: Path,
    label: str,
    table: Mapping[str, Any],
    own: Mapping[str, Arm],
    parent: str | None,
    others: Callable[[str], Experiment],
    start: Arm | None,
) -> Arm:
    """Return an arm that is another arm's run, of this file, of the one it extends or of ``FILE:ARM``, at a `tau`."""
    where, wanted, tau = f"{path}, arm {label}", str(table["run"]), table.get("tau")
    if unknown := [key for key in table if key not in READ_AT]:
        raise ConfigError(f"{where}: a row with run = has the settings of that run, it cannot set {unknown[0]!r}")
    if tau is not None and (isinstance(tau, bool) or not (isinstance(tau, int | float) and 0 <= tau <= 1)):
        raise ConfigError(f"{where}: tau must be from 0 to 1, got {tau!r}")
    file, colon, name = wanted.rpartition(":")
    known = {other: arm for other, arm in own.items() if arm.tau is None}
    if colon or (parent and name not in known):
        of = others(file or str(parent))
        if (of.start and of.start.config) != (start and start.config):
            raise ConfigError(f"{where}: {file or parent} starts from another pretraining than this file")
        known = {arm.label: arm for arm in of.arms}
    if name not in known:
        raise ConfigError(f"{where}: there is no arm {wanted!r} to run; there are: {', '.join(known)}")
    about = {"title": str(table.get("label", "")), "extra": bool(table.get("extra", False))}
    return Arm(label, known[name].config, known[name].problem, **about, paper=str(table.get("paper", label)), tau=tau)


def _check_folders(path: Path, arms: Iterable[Arm]) -> None:
    """Refuse arms with different settings whose runs would lie in one folder."""
    known: dict[str, Arm] = {}
    for arm in arms:
        if arm.config and (other := known.setdefault(arm.config.name, arm)).config != arm.config:
            raise ConfigError(
                f"{path}: arms {other.label!r} and {arm.label!r} are different runs of one folder, {arm.config.name}; "
                "give the file, or the arm, another name"
            )


def _tables_of(parent: str | None, content: Mapping[str, Any], variant: str) -> dict[str, dict[str, Any]]:
    """Return the tables of the arms of a file that another extends, as its variant and its own `like` change them."""
    own = content.get("variants", {}).get(variant, {}).get("arms", {})
    tables = {label: {**table, **own.get(label, {})} for label, table in content.get("arms", {}).items()}
    return like(find_experiment(str(parent)), tables, {}) if tables else {}


def distinct(arms: Iterable[Arm]) -> list[Arm]:
    """Return the arms without those whose run another one before them stands for."""
    return list({arm.config.name if arm.config else arm.label: arm for arm in reversed(list(arms))}.values())[::-1]


def _read(values: Mapping[str, Any]) -> RunConfig:
    config = RunConfig.read(values)
    config.resolve_components()
    return config.replace(runs_dir=str(Path(config.runs_dir).expanduser().resolve()))


def _start(
    path: Path,
    content: Mapping[str, Any],
    shared: Mapping[str, Any],
    overrides: Mapping[str, Any],
    base: str,
    variant: str,
    suffix: str,
) -> Arm | None:
    """Return the run that all arms start from: overrides apply to it unless `[pretrain]` says otherwise.

    Its folder is named by a digest of its settings, so that experiments with equal pretraining share it.
    """
    if "pretrain" not in content or "from-model" in overrides:
        return None
    own = {**content["pretrain"], **content.get("variants", {}).get(variant, {}).get("pretrain", {})}
    name = f"{own.pop('name', f'{base}-pretrain')}{f'-{variant}' if variant else ''}"
    attack = {"attack": "", "malicious-clients": ""}
    try:
        config = _read({**shared, **overrides, **attack, **own, "name": name})
        config = config.replace(name=f"{name}-{settings_digest(config)}{suffix}")
    except ConfigError as error:
        raise type(error)(f"{path}, [pretrain]: {error}") from None
    return Arm("pretrain", config, title="pretraining")


def settings_digest(config: RunConfig) -> str:
    """Return eight hexadecimal digits that tell settings apart by what touches a run's numbers."""
    changed = {
        f.name: value
        for f in dataclasses.fields(config)
        if f.name not in MACHINE and (value := getattr(config, f.name)) != f.default
    }
    return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:8]


def _load(path: Path) -> dict[str, Any]:
    """Return a file's checked tables; settings that stand above all tables are in `settings`."""
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:  # tomllib's own error is a ValueError
        raise ConfigError(f"cannot read {path}: {error}") from None
    _check_size(path, content)
    for key, value in content.items():
        if key not in RESERVED and isinstance(value, dict | list):
            known = ", ".join("[arms.NAME]" if table == "arms" else f"[{table}]" for table in TABLES)
            raise ConfigError(f"{path}: unknown table {key!r}; there are: {known}")
        if key in TABLES and not isinstance(value, dict):
            raise ConfigError(f"{path}: {key} must be a table, got {value!r}")
    for key in ("arms", "variants", "paper"):
        if not all(isinstance(table, dict) for table in content.get(key, {}).values()):
            raise ConfigError(f"{path}: settings and {key} must be tables: [settings], [{key}.NAME]")
    for variant, table in content.get("variants", {}).items():
        for key in ("arms", "pretrain"):
            inner = table.get(key, {})
            if not isinstance(inner, dict) or (key == "arms" and not all(isinstance(t, dict) for t in inner.values())):
                raise ConfigError(f"{path}: [variants.{variant}] {key} must hold tables, got {inner!r}")
    flat = {key: content.pop(key) for key in list(content) if key not in RESERVED}
    return {**content, "settings": {**flat, **content.get("settings", {})}}


def _check_size(path: Path, value: object) -> None:
    """Refuse whole numbers beyond TOML's 64 bits, which Python reads and then cannot print."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{path}: a whole number has at most 64 bits")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_size(path, inner)


def _with_variant(path: Path, content: Mapping[str, Any], variant: str | None) -> tuple[dict[str, Any], str]:
    """Return the shared settings with those of the chosen variant, and its name (empty: there are none)."""
    shared, variants = dict(content.get("settings", {})), content.get("variants", {})
    if variant is not None and variant not in variants:
        raise ConfigError(f"{path} has no variant {variant!r}; it has: {', '.join(variants) or 'none'}")
    if not variants:
        return shared, ""
    chosen = variant or next(iter(variants))
    return {**shared, **{k: v for k, v in variants[chosen].items() if k not in ("pretrain", "arms")}}, chosen


def _arms(
    path: Path, content: Mapping[str, Any], shared: Mapping[str, Any]
) -> tuple[tuple[Axis, ...], dict[tuple[str, ...], str], dict[str, dict[str, Any]]]:
    """Return the axes and points of a grid (none without one), and all arms: label -> settings."""
    if "grid" not in content:
        if "map" in content:
            raise ConfigError(f"{path}: [map] draws a [grid], and there is none")
        if wrong := [label for label in content.get("arms", {}) if label and not re.fullmatch(LABEL, label)]:
            raise ConfigError(f"{path}: an arm's name is made of letters, digits and . _ - + = @, got {wrong[0]!r}")
        return (), {}, content.get("arms", {})
    if "arms" in content:
        raise ConfigError(f"{path} has [grid] and [arms]; make the arms an axis of the grid, from labels to settings")
    try:
        axes = read_axes(content["grid"])
        arms, points = expand(shared, axes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return axes, points, arms


def _paper(path: Path, content: Mapping[str, Any], variant: str) -> dict[str, tuple[float, float]]:
    tables = content.get("paper", {})
    rows = tables.get(variant, {}) if variant else next(iter(tables.values()), {})
    for row, figures in rows.items():
        if not (isinstance(figures, list) and len(figures) == 2 and all(isinstance(x, int | float) for x in figures)):
            raise ConfigError(f"{path}: [paper] {row} must be [ACC, ASR] in percent, got {figures!r}")
    return {row: (float(figures[0]), float(figures[1])) for row, figures in rows.items()}


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
