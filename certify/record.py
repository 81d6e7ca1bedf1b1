"""The certificate: what every certifier returns, one frozen record per test point, kept as one JSON line.

A certificate says what is claimed (the prediction of one test point stays the same under every change of a stated
kind smaller than `radius`), from what (model, data, votes, bounds), and under which assumptions, each with its
status. A claim with a violated assumption is kept, for the paper's numbers are such claims, but is not `sound`.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, get_args

from tasks.errors import CertificationError, RecordError

SCHEMA = 1
# What an attacker may change: training features, samples, clients, the released parameters, or the input at test time.
Level = Literal["feature", "sample", "client", "model", "input"]
# checked: established from the record of the run; stated: taken for granted; violated: known not to hold.
Status = Literal["checked", "stated", "violated"]
Value = None | bool | int | float | str | tuple["Value", ...]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_INFINITIES = {"inf": math.inf, "-inf": -math.inf}  # JSON has no infinity; only radius and bounds may be one


@dataclass(frozen=True)
class Assumption:
    """One named condition of a certificate, its status, and the evidence or the reason."""

    name: str
    status: Status
    detail: str = ""

    def __post_init__(self) -> None:
        _want(bool(self.name) and isinstance(self.name, str), "an assumption must have a name", self.name)
        _want(self.status in get_args(Status), f"the status of {self.name} must be {_options(Status)}", self.status)
        _want(isinstance(self.detail, str), f"the detail of {self.name} must be text", self.detail)


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """A certified prediction of one test point, or an abstention (label None, radius 0).

    `radius` is measured in `unit` ("l2", "clients", ...); a change of exactly `radius` is covered only if `closed`.
    Contradictory or NaN contents raise `CertificationError`.
    """

    level: Level
    method: str
    unit: str
    label: int | None
    radius: float
    model_sha256: str
    data_sha256: str
    closed: bool = False
    sample: int | None = None  # index of the test point in its data
    seed: int | None = None  # None where nothing was drawn
    parameters: Mapping[str, Value | list[Any]] = field(default_factory=dict)
    assumptions: tuple[Assumption, ...] = ()
    counts: tuple[int, ...] = ()  # votes per class; empty where nothing was drawn
    bounds: Mapping[str, float] = field(default_factory=dict)  # names end in _lower or _upper

    def __post_init__(self) -> None:
        _want(self.level in get_args(Level), f"level must be {_options(Level)}", self.level)
        for name in ("method", "unit"):
            _want(bool(value := getattr(self, name)) and isinstance(value, str), f"{name} must be a name", value)
        for name in ("model_sha256", "data_sha256"):
            value = getattr(self, name)
            wanted = f"{name} must be 64 lower-case hexadecimal digits"
            _want(isinstance(value, str) and _SHA256.fullmatch(value) is not None, wanted, value)
        _want(isinstance(self.closed, bool), "closed must be True or False", self.closed)
        for name in ("label", "sample", "seed"):
            value = _plain(getattr(self, name))
            object.__setattr__(self, name, value)
            _want(value is None or (_is_count(value)), f"{name} must be None or a whole number from 0", value)
        self._freeze_numbers()
        self._freeze_evidence()

    def _freeze_numbers(self) -> None:
        radius = _number("radius", self.radius)
        _want(radius >= 0, "radius must be 0 or more", radius)
        _want(self.label is not None or radius == 0, "an abstained certificate (label None) has radius 0", radius)
        object.__setattr__(self, "radius", radius)
        for name in self.bounds:
            _want(str(name).endswith(("_lower", "_upper")), "the name of a bound ends in _lower or _upper", name)
        frozen = {str(name): _number(name, value) for name, value in self.bounds.items()}
        object.__setattr__(self, "bounds", MappingProxyType(frozen))

    def _freeze_evidence(self) -> None:
        counts = tuple(_plain(count) for count in self.counts)
        _want(all(map(_is_count, counts)), "counts must be whole numbers from 0", counts)
        object.__setattr__(self, "counts", counts)
        assumptions = tuple(self.assumptions)
        known = all(isinstance(a, Assumption) for a in assumptions)
        _want(known, "assumptions must be Assumption objects", assumptions)
        repeated = {a.name for a in assumptions if [b.name for b in assumptions].count(a.name) > 1}
        _want(not repeated, "an assumption has one status, so its name comes once", sorted(repeated))
        object.__setattr__(self, "assumptions", assumptions)
        parameters = {_name(key): _value(key, value) for key, value in self.parameters.items()}
        object.__setattr__(self, "parameters", MappingProxyType(parameters))

    @property
    def abstained(self) -> bool:
        return self.label is None

    @property
    def violated(self) -> tuple[Assumption, ...]:
        """The assumptions known not to hold."""
        return tuple(a for a in self.assumptions if a.status == "violated")

    @property
    def sound(self) -> bool:
        """True where no assumption is violated; stated ones remain the reader's to judge."""
        return not self.violated

    @property
    def claim(self) -> str:
        """The claim as one sentence."""
        if self.label is None:
            return "abstained: nothing is claimed"
        sign = "<=" if self.closed else "<"
        change = f"{self.level}-level change of size {sign} {self.radius:g} ({self.unit})"
        return f"the label stays {self.label} under every {change}"

    def to_json(self) -> str:
        """Return the certificate as one line of strict JSON with sorted keys; an infinity is written as text."""
        record: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        record["schema"] = SCHEMA
        record["radius"] = _write(self.radius)
        record["bounds"] = {name: _write(value) for name, value in self.bounds.items()}
        record["parameters"] = dict(self.parameters)
        record["assumptions"] = [{"name": a.name, "status": a.status, "detail": a.detail} for a in self.assumptions]
        return json.dumps(record, sort_keys=True, allow_nan=False, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> "Certificate":
        """Read what `to_json` wrote; raises `RecordError` for another schema, for missing, unknown or wrong entries."""
        try:
            record = json.loads(line, parse_constant=_refuse_constant, object_pairs_hook=_unique)
        except json.JSONDecodeError as error:
            raise RecordError(f"a certificate is one line of JSON, got {line[:60]!r}: {error}") from None
        if not isinstance(record, dict) or type(record.get("schema")) is not int or record["schema"] != SCHEMA:
            found = record.get("schema") if isinstance(record, dict) else type(record).__name__
            raise RecordError(f"this version reads certificates of schema {SCHEMA}, got {found!r}")
        del record["schema"]
        wanted = {f.name for f in fields(Certificate)}
        if record.keys() != wanted:
            missing, unknown = sorted(wanted - record.keys()), sorted(record.keys() - wanted)
            raise RecordError(f"a certificate has the entries of its schema; missing {missing}, unknown {unknown}")
        try:
            record["radius"] = _read(record["radius"])
            record["bounds"] = {name: _read(value) for name, value in record["bounds"].items()}
            record["assumptions"] = tuple(Assumption(**entry) for entry in record["assumptions"])
            return Certificate(**record)
        except (CertificationError, TypeError, AttributeError) as error:
            raise RecordError(f"the certificate contradicts its schema: {error}") from None

    def __reduce__(self) -> tuple[Any, ...]:
        return Certificate.from_json, (self.to_json(),)  # read-only mappings can be neither pickled nor copied

    def __hash__(self) -> int:
        return hash(self.to_json())


def _want(holds: bool, wanted: str, got: object) -> None:
    if not holds:
        raise CertificationError(f"{wanted}, got {got!r}")


def _options(kind: Any) -> str:
    return " or ".join(get_args(kind))


def _plain(value: Any) -> Any:
    """Return the Python number of a numpy or torch scalar; anything else unchanged."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(name: str, value: Any) -> float:
    value = _plain(value)
    _want(isinstance(value, int | float) and not isinstance(value, bool), f"{name} must be a number", value)
    _want(isinstance(value, float) or abs(value) <= 2**53, f"{name} must be exact in float64", value)
    _want(not math.isnan(value), f"{name} must not be NaN", value)
    return float(value)


def _name(key: object) -> str:
    _want(isinstance(key, str), "the name of a parameter must be text", key)
    return str(key)


def _value(name: str, value: Any) -> Value:
    """Return a parameter as plain Python, lists as tuples; a parameter that is not finite has no place in JSON."""
    value = _plain(value)
    if isinstance(value, list | tuple):
        return tuple(_value(name, item) for item in value)
    known = value is None or isinstance(value, bool | int | float | str)
    _want(known, f"parameter {name} must be None, a truth value, a number, text or a list of these", value)
    _want(not isinstance(value, float) or math.isfinite(value), f"parameter {name} must be finite", value)
    return value


def _write(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _read(value: Any) -> Any:
    return _INFINITIES.get(value, value) if isinstance(value, str) else value


def _refuse_constant(name: str) -> Any:
    raise RecordError(f"a certificate is strict JSON without {name}; an infinity is written as text, NaN not at all")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise RecordError(f"a certificate has each entry once, got {twice} twice")
    return dict(pairs)
