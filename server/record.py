"""The run record `runs/<name>/`: what happened, in files that a killed process cannot spoil.

    run.json            schema, settings, task facts, versions, status, initial metrics
    rounds.jsonl        one JSON object per finished round (`RoundRecord`)
    checkpoint.safetensors   the global model after the last finished round and what rules, optimisers and the gate
                        keep, with that round's line in its metadata
    model.safetensors   the same model as named arrays, at the end
    updates/, models/   per round, when the settings ask for them
    crfl.json           what certificates need to know of the training, where CRFL runs (see `server.crfl`); or
    crfl-refused.txt    why there can be none

The checkpoint is written first and renamed into place; the line of `rounds.jsonl` is inside it, so a kill between
the two writes loses nothing: opening for resumption appends the missing line and cuts a half-written one.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from server.files import replace_file
from server.stored import read_beside, read_model, read_updates
from tasks.config import RunConfig
from tasks.errors import ConfigError, RecordError

__all__ = [
    "RoundRecord",
    "RunRecord",
    "read_beside",
    "read_model",
    "read_run",
    "read_updates",
    "replace_file",
]

SCHEMA = 1


@dataclass(frozen=True)
class RoundRecord:
    """One finished round. Lists `weights` and `norms` follow the order of `clients` (the usable replies)."""

    round: int
    acc: float | None  # None in rounds that are not evaluated
    asr: float | None
    seconds: float
    sampled: list[int]
    malicious: list[int]  # the malicious ones among the sampled
    attacking: list[int]  # those whose schedule made them attack in this round
    clients: list[int]
    dropped: dict[str, str]  # client -> reason
    weights: list[float] | None
    norms: list[float]
    aggregate_norm: float
    model_norm: float
    skipped: str | None
    sha256: str  # of the global model after the round: the one that is evaluated and kept
    acc_all: float | None = None
    asr_all: float | None = None
    auc: float | None = None
    loss: float | None = None
    seconds_train: float = 0.0
    seconds_aggregate: float = 0.0
    seconds_evaluate: float = 0.0
    exposed: int = 0  # replies dropped for what they held, which no honest client sends
    collusion_failed: str | None = None  # why colluding attackers sent what they had instead
    edge_acc: float | None = None  # of an attack with a test set of its own (edge cases): its true labels, recognised
    raw_acc: float | None = None  # and the accuracy on clean test samples of the attacker's target class
    broadcast_norm: float | None = None  # of what clients get next, where that is not the model but a noisy one
    gate: dict[str, Any] | None = None  # what the gate found and decided (`server.gate.GateRound`); None: not asked
    seconds_gate: float = 0.0

    @staticmethod
    def from_json(line: str) -> "RoundRecord":
        """Read one line of rounds.jsonl; unknown fields of a later minor version are ignored."""
        try:
            values = json.loads(line)
            known = {f.name for f in dataclasses.fields(RoundRecord)}
            return RoundRecord(**{k: v for k, v in values.items() if k in known})
        except (ValueError, TypeError, AttributeError) as error:
            raise RecordError(f"cannot read a line of rounds.jsonl: {error}") from None


@dataclass(frozen=True)
class RunRecord:
    """A run as read back from its folder."""

    folder: Path
    config: RunConfig
    status: str  # running, finished, failed
    rounds: list[RoundRecord]
    initial: dict[str, Any] | None  # metrics before round 1
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def final(self) -> RoundRecord | None:
        """The last round that was evaluated."""
        return next((r for r in reversed(self.rounds) if r.acc is not None), None)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder, of a finished, running or interrupted run; raises `RecordError` with what is wrong."""
    folder = Path(folder)
    values = read_header(folder)
    try:
        config = RunConfig.read({**values["settings"], "name": values["settings"]["name"]})
    except (ConfigError, KeyError) as error:
        raise RecordError(f"{folder}/run.json: {error}") from None
    path = folder / "rounds.jsonl"
    try:
        rounds = [RoundRecord.from_json(line) for line in whole_lines(path)]
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from None
    return RunRecord(
        folder,
        config,
        values["status"],
        rounds,
        values.get("initial"),
        values["facts"],
    )


def read_header(folder: Path) -> dict[str, Any]:
    """Return what a run's run.json says; raises `RecordError` where there is none that can be read."""
    path = folder / "run.json"
    if not path.exists():
        beside = [p for pattern in ("*/run.json", "*/*/run.json") for p in folder.parent.glob(pattern)]
        near = ", ".join(sorted(str(p.parent) for p in beside)[:8])
        raise RecordError(f"{folder} is no run folder (it has no run.json); there are: {near or 'none beside it'}")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise RecordError(f"{path} is not valid JSON: {error}") from None
    if values.get("schema") != SCHEMA:
        raise RecordError(f"{path} has schema {values.get('schema')!r}; this version reads {SCHEMA}")
    return values


def whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a file: a killed writer may have left half of one at the end."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()
