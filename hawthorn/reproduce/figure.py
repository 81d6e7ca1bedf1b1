"""What a figure of a paper shows, as an experiment file says it in its table `[figure]`.

[figure]
kind = "certified"              # certified rate and accuracy against the radius, one curve per arm
max-radius = 5.0                # end of the paper's axis
points = 5000                   # test points, from the first on; 0: all
draws = 1000                    # noisy models that vote (M)
alpha = 0.001
[figure.curves.short]           # curves that are not one per arm
arm = "default"
label = "T = 50"
rounds = 50                     # the model after that round; draws and alpha may stand here too
[figure.variants.loan]          # changes for one variant, curves too
max-radius = 6.0

[figure]
kind = "closeness"              # l2 distance, round by round, of the models of two arms with the same seeds
[figure.curves.early]
arm = "attacked"
clean = "scaled"
label = "attack in round 20"

[figure]
kind = "rounds"                 # the radius of a vote of pa against pb by the number of rounds; one run of an arm
pa = 0.7
pb = 0.1
last-round = 100
[figure.curves.twice]
arm = "default"
ratio = 2.0                     # clip norm in units of the noise, in every round after the attacked one
label = "rho = 2 sigma"

[figure]
kind = "attacks"                # accuracy and attack success, round by round; arms have labels "DEFENCE: ATTACK"
name = "edge-defences"          # what the study is called, if not as its file
[figure.claims.krum]            # what the paper says, to be answered yes or no (see `hawthorn.reproduce.claims`)
text = "PGD passes Krum where the black-box attack fails"
when = [["krum-pgd:target", ">", "krum-black_box:target", 10]]
"""

import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from hawthorn.experiment import Experiment
from hawthorn.reproduce.claims import Claim, read_claims
from tasks.errors import ConfigError

Kind = Literal["certified", "closeness", "rounds", "attacks"]
WANTED: dict[str, dict[str, type]] = {
    "figure": {
        "kind": str, "max-radius": float, "points": int, "draws": int, "alpha": float, "legend": str,
        "pa": float, "pb": float, "last-round": int, "name": str,
    },
    "curve": {"arm": str, "label": str, "rounds": int, "draws": int, "alpha": float, "clean": str, "ratio": float},
}  # fmt: skip


@dataclass(frozen=True)
class Line:
    """One curve: of which arm, after which round (0: the last), with how many votes; `clean` is the arm beside it.

    `ratio` is the clip norm of later rounds in units of their noise, where the figure is of rounds.
    """

    name: str
    arm: str
    label: str
    rounds: int = 0
    draws: int = 1000
    alpha: float = 0.001
    clean: str = ""
    ratio: float = 0.0


@dataclass(frozen=True)
class Figure:
    """A figure: its kind, its curves, the end of the paper's axis (0: where the curves end), the number of points."""

    kind: Kind
    lines: tuple[Line, ...]
    max_radius: float = 0.0
    points: int = 5000
    legend: str = ""  # what tells the curves apart
    pa: float = 0.7  # probabilities of the first two classes, where the figure is of rounds
    pb: float = 0.1
    last_round: int = 100
    name: str = ""  # the study's, if not the file's
    claims: tuple[Claim, ...] = ()  # what the paper says of these runs


def read_figure(path: Path, experiment: Experiment, asked: Collection[str] = ()) -> Figure | None:
    """Read the table `[figure]` of an experiment file for its variant, None without one; raises `ConfigError`.

    Where the file names no curves they are its arms, the extra ones only if they are `asked` for.
    """
    content = tomllib.loads(path.read_text()).get("figure")
    if content is None:
        return None
    own = content.get("variants", {}).get(experiment.variant, {})
    table = {key: value for key, value in {**content, **own}.items() if key not in ("variants", "curves", "claims")}
    known = _checked(path, "[figure]", table, WANTED["figure"])
    kind = known.get("kind", "certified")
    if kind not in get_args(Kind):
        raise ConfigError(f"{path}: [figure] kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    curves = own.get("curves", content.get("curves"))
    if curves is None:
        shown = [arm for arm in experiment.arms if not arm.extra or arm.label in asked]
        curves = {arm.label: {"arm": arm.label, "label": arm.shown} for arm in shown}
    votes = {key: known[key] for key in ("draws", "alpha") if key in known}
    lines = tuple(_line(path, name, {**votes, **curve}, kind, experiment) for name, curve in curves.items())
    if not lines:
        raise ConfigError(f"{path}: [figure] has no curves")
    given = {key.replace("-", "_"): value for key, value in known.items() if key not in ("kind", "draws", "alpha")}
    claims = read_claims(path, own.get("claims", content.get("claims", {})), [arm.label for arm in experiment.arms])
    figure = Figure(kind, lines, **given, claims=claims)
    if not 0 <= figure.pb < figure.pa <= 1 or figure.pa + figure.pb > 1:
        raise ConfigError(f"{path}: [figure] wants pb < pa of sum 1 at most, got {figure.pa} and {figure.pb}")
    return figure


def _line(path: Path, name: str, table: Mapping[str, Any], kind: Kind, experiment: Experiment) -> Line:
    where = f"[figure.curves.{name}]"
    known = _checked(path, where, table, WANTED["curve"])
    labels = [arm.label for arm in experiment.arms]
    for key in ("arm", "clean") if kind == "closeness" else ("arm",):
        if known.get(key) not in labels:
            raise ConfigError(
                f"{path}: {where} wants {key}, one of the arms {', '.join(labels)}; got {known.get(key)!r}"
            )
    if kind == "rounds" and not known.get("ratio", 0.0) > 0:
        raise ConfigError(f"{path}: {where} wants ratio, the clip norm in units of the noise, above 0")
    return Line(name, **{"label": name, **known})


def _checked(path: Path, where: str, table: Mapping[str, Any], wanted: Mapping[str, type]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in table.items():
        if key not in wanted:
            raise ConfigError(f"{path}: {where} has no {key!r}; it has: {', '.join(wanted)}")
        if wanted[key] is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted[key] or (isinstance(value, int | float) and value < 0):
            kind = "text" if wanted[key] is str else "a number from 0"
            raise ConfigError(f"{path}: {where} {key} must be {kind}, got {value!r}")
        found[key] = value
    return found
