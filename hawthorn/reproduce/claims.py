"""A paper's statements as conditions on runs, answered yes or no with the figures that decide.

[figure.claims.krum]
text = "PGD passes Krum where the black-box attack fails"
when = [["krum-pgd:target", ">", "krum-black_box:target", 10]]   # by at least 10 points; all must hold

A side is a number in percent or ``ARM:MEASURE``. Measures are ``target`` (attack success rate), ``main`` (accuracy),
``edge`` (edge cases recognised), each as the mean over the evaluated rounds of the second half; with ``-first`` of
the first half, with ``-last`` of the last round, with ``-max`` and ``-min`` over all rounds. Several seeds count by
their mean.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.record import RunRecord
from tasks.errors import ConfigError

KEYS = {"target": "asr", "main": "acc", "edge": "edge_acc"}
SPANS = ("late", "first", "last", "max", "min")
Side = str | float


@dataclass(frozen=True)
class Condition:
    """``left > right + margin`` or ``left < right - margin``, in percent."""

    left: Side
    sign: str
    right: Side
    margin: float = 0.0


@dataclass(frozen=True)
class Claim:
    """A statement and the conditions that all hold if it is true of our runs."""

    name: str
    text: str
    when: tuple[Condition, ...]


@dataclass(frozen=True)
class Verdict:
    """The answer: yes, no, or open where a run is missing; and the figures of every condition."""

    claim: Claim
    answer: str
    figures: str


def read_claims(path: Path, tables: Mapping[str, Any], arms: Sequence[str]) -> tuple[Claim, ...]:
    """Read `[figure.claims]`; raises `ConfigError` for what is no claim or names no arm."""
    return tuple(_claim(path, name, table, arms) for name, table in tables.items())


def _claim(path: Path, name: str, table: Any, arms: Sequence[str]) -> Claim:
    where = f"{path}: [figure.claims.{name}]"
    if not isinstance(table, dict) or set(table) != {"text", "when"} or not table["when"]:
        raise ConfigError(f"{where} wants text and when, got {table!r}")
    return Claim(name, str(table["text"]), tuple(_condition(where, entry, arms) for entry in table["when"]))


def _condition(where: str, entry: Any, arms: Sequence[str]) -> Condition:
    if not isinstance(entry, list) or len(entry) not in (3, 4) or entry[1] not in ("<", ">"):
        raise ConfigError(f'{where} wants conditions such as ["ARM:target", ">", 50], got {entry!r}')
    for side in (entry[0], entry[2]):
        if isinstance(side, str):
            arm, _, measure = side.partition(":")
            key, _, span = measure.partition("-")
            if arm not in arms or key not in KEYS or (span or SPANS[0]) not in SPANS:
                raise ConfigError(
                    f"{where}: {side!r} is no ARM:MEASURE; arms are {', '.join(arms)}, measures {', '.join(KEYS)}, "
                    f"then nothing or {', '.join(f'-{s}' for s in SPANS[1:])}"
                )
        elif isinstance(side, bool) or not isinstance(side, int | float):
            raise ConfigError(f"{where} wants numbers or ARM:MEASURE, got {side!r}")
    margin = entry[3] if len(entry) == 4 else 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or margin < 0:
        raise ConfigError(f"{where} wants a margin from 0, got {margin!r}")
    return Condition(entry[0], entry[1], entry[2], float(margin))


def decide(claims: Sequence[Claim], runs: Mapping[str, Sequence[RunRecord]]) -> list[Verdict]:
    """Return the verdict of every claim over the runs of each arm (label -> one run per seed)."""
    return [_decide(claim, runs) for claim in claims]


def _decide(claim: Claim, runs: Mapping[str, Sequence[RunRecord]]) -> Verdict:
    holds, figures = list[bool | None](), list[str]()
    for condition in claim.when:
        left, right = (_value(side, runs) for side in (condition.left, condition.right))
        figures.append(f"{_shown(condition.left, left)} {condition.sign} {_shown(condition.right, right)}")
        if condition.margin:
            figures[-1] += f" by {condition.margin:g}"
        if left is None or right is None:
            holds.append(None)
        elif condition.sign == ">":
            holds.append(left > right + condition.margin)
        else:
            holds.append(left < right - condition.margin)
    answer = "no" if False in holds else "open" if None in holds else "yes"
    return Verdict(claim, answer, "; ".join(figures))


def _value(side: Side, runs: Mapping[str, Sequence[RunRecord]]) -> float | None:
    if not isinstance(side, str):
        return float(side)
    arm, _, measure = side.partition(":")
    values = [measured(run, measure) for run in runs.get(arm, ())]
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


def measured(run: RunRecord, measure: str) -> float | None:
    """Return a measure of one run in percent, None where no round has it."""
    key, _, span = measure.partition("-")
    half = len(run.rounds) // 2
    chosen = {"": run.rounds[half:], "first": run.rounds[:half]}.get(span, run.rounds)
    values = [100 * v for r in chosen if (v := getattr(r, KEYS[key])) is not None]
    if not values:
        return None
    if span in ("max", "min"):
        return max(values) if span == "max" else min(values)
    return values[-1] if span == "last" else math.fsum(values) / len(values)


def _shown(side: Side, value: float | None) -> str:
    number = "?" if value is None else f"{value:.1f}"
    return f"{side} {number}" if isinstance(side, str) else number
