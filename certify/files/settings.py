"""How certificates were made: all that is needed to make them again, checked where it is read from a file."""

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from certify.bounds import Interval
from certify.crfl.certificates import Form, Kind, TrainingLevel
from certify.zonotope.robustness import Method
from tasks.errors import CertificationError

# sampled: noisy models vote; exact: their votes by quadrature; margin: no noise, the model's own margins
Way = Literal["sampled", "exact", "margin"]
Bound = Literal["two_stage", "simultaneous", "crfl_top_two"]
Dtype = Literal["float32", "float64"]
MAX_DRAWS = 10**7  # the most that `certify.bounds` computes with


@dataclass(frozen=True, kw_only=True)
class VoteSettings:
    """How the evidence of each prediction is found; what does not apply to `way` keeps its default."""

    way: Way = "sampled"
    sigma: float = 0.0
    num_draws: int = 0
    selection_draws: int = 0  # of "two_stage" alone: independent draws that choose the class
    alpha: float = 0.0
    bound: Bound = "two_stage"
    interval: Interval = "clopper_pearson"
    joint: bool = False  # whether alpha is spent on all points together
    seed: int = 0

    def __post_init__(self) -> None:
        sampled = self.way == "sampled"
        _want(self.sigma == 0 if self.way == "margin" else self.sigma > 0, "sigma", "above 0, 0 for margins", self)
        _want(self.num_draws >= 1 if sampled else self.num_draws == 0, "num_draws", "1 or more where sampled", self)
        _want(0 < self.alpha < 1 if sampled else self.alpha == 0, "alpha", "inside (0, 1) where sampled", self)
        two_stage = sampled and self.bound == "two_stage"
        wanted = "1 or more for two_stage, 0 for the others"
        _want((self.selection_draws >= 1) == two_stage and self.selection_draws >= 0, "selection_draws", wanted, self)
        for name in ("num_draws", "selection_draws"):
            _want(getattr(self, name) <= MAX_DRAWS, name, f"{MAX_DRAWS} at most", self)
        _want(self.seed >= 0, "seed", "0 or more", self)
        printed = self.bound == "crfl_top_two"
        _want(not printed or self.interval == "hoeffding", "interval", "hoeffding for the paper's bound", self)


@dataclass(frozen=True, kw_only=True)
class CrflSettings:
    """Arguments of `certify_crfl`, besides the record and the evidence."""

    votes: VoteSettings
    certificate: Kind = "sound"
    level: TrainingLevel = "feature"
    form: Form | None = None
    change_norm: float | None = None


@dataclass(frozen=True, kw_only=True)
class ZonotopeSettings:
    """Arguments of `certify.zonotope.check`; one certificate per point and radius."""

    eps: tuple[float, ...]
    method: Method = "zonotope"
    input_range: tuple[float, ...] = (0.0, 1.0)
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        ascending = list(self.eps) == sorted(set(self.eps)) and bool(self.eps)
        _want(ascending and min(self.eps, default=0) > 0, "eps", "radii above 0, ascending, each once", self)
        ordered = len(self.input_range) == 2 and self.input_range[0] < self.input_range[1]
        _want(ordered, "input_range", "two ascending numbers", self)


Settings = VoteSettings | CrflSettings | ZonotopeSettings
KINDS: dict[str, type[Settings]] = {"smooth": VoteSettings, "crfl": CrflSettings, "zonotope": ZonotopeSettings}


def kind_of(settings: Settings) -> str:
    """Return the command that makes such certificates."""
    return next(name for name, kind in KINDS.items() if type(settings) is kind)


def write_settings(settings: Settings) -> dict[str, Any]:
    """Return settings as JSON."""
    return asdict(settings)


def read_entries(kind: type[Any], entries: object) -> Any:
    """Return the dataclass `kind` of a JSON object; raises `CertificationError` for missing, unknown or wrong ones."""
    wanted = {field.name for field in fields(kind)}
    if not isinstance(entries, Mapping) or entries.keys() != wanted:
        found = set(entries) if isinstance(entries, Mapping) else {type(entries).__name__}
        raise CertificationError(
            f"{kind.__name__} has other entries: missing {sorted(wanted - found)}, unknown {sorted(found - wanted)}"
        )
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(name, value, hints[name]) for name, value in entries.items()})


def _value(name: str, value: Any, wanted: Any) -> Any:
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is Literal:
        good = isinstance(value, str) and value in inner
    elif origin in (typing.Union, types.UnionType):
        return None if value is None else _value(name, value, next(kind for kind in inner if kind is not type(None)))
    elif origin is tuple:
        if isinstance(value, list):
            return tuple(_value(name, item, inner[0]) for item in value)
        good = False
    elif wanted is float:
        good = isinstance(value, int | float) and not isinstance(value, bool)
        good = good and (math.isfinite(value) if isinstance(value, float) else abs(value) <= 2**53)
        value = float(value) if good else value
    elif wanted in (bool, int, str):
        good = type(value) is wanted
    else:
        return read_entries(wanted, value)
    if not good:
        raise CertificationError(f"{name} must be {_say(wanted)}, got {value!r:.80}")
    return value


def _say(wanted: Any) -> str:
    options = typing.get_args(wanted) if typing.get_origin(wanted) is Literal else ()
    return " or ".join(options) if options else getattr(wanted, "__name__", str(wanted))


def _want(holds: bool, name: str, wanted: str, settings: Settings) -> None:
    if not holds:
        raise CertificationError(f"{name} must be {wanted}, got {getattr(settings, name)!r}")
