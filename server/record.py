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
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.files import disk, lock, replace_file, write_down
from server.stored import read_beside, read_model, read_updates
from tasks.config import RunConfig
from tasks.errors import ConfigError, RecordError
from tasks.params import Layout

__all__ = [
    "MAY_CHANGE",
    "RoundRecord",
    "RunRecord",
    "RunWriter",
    "read_beside",
    "read_model",
    "read_run",
    "read_updates",
    "replace_file",
    "set_aside",
]

SCHEMA = 1
MEMORY = "memory."  # prefix, in the checkpoint, of what rules and optimisers keep
MAY_CHANGE = {"resume", "name", "runs_dir", "data_dir", "num_rounds", "workers", "round_timeout", "startup_timeout"}
MAY_CHANGE |= {"metrics_port", "log_format", "tensorboard"}
MAY_CHANGE |= {"gate_workers", "gate_service", "gate_timeout", "gate_attempts"}
MAY_CHANGE |= {"gate_tls", "gate_tls_ca", "gate_tls_cert", "gate_tls_key", "gate_token_file"}


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
    values = _read_header(folder)
    try:
        config = RunConfig.read({**values["settings"], "name": values["settings"]["name"]})
    except (ConfigError, KeyError) as error:
        raise RecordError(f"{folder}/run.json: {error}") from None
    path = folder / "rounds.jsonl"
    try:
        rounds = [RoundRecord.from_json(line) for line in _whole_lines(path)]
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


def _read_header(folder: Path) -> dict[str, Any]:
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


def _whole_lines(path: Path) -> list[str]:
    """Return the complete lines of a file: a killed writer may have left half of one at the end."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


class RunWriter:
    """Writes a run record; one process at a time, enforced by a lock on the folder."""

    def __init__(self, config: RunConfig, layout: Layout) -> None:
        self.config, self.layout, self.folder = config, layout, config.run_folder
        self._lock = lock(self.folder)
        with disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.header: dict[str, Any] = {
            "schema": SCHEMA,
            "status": "running",
            "settings": config.settings(),
            "facts": {},
        }

    @staticmethod
    def create(config: RunConfig, layout: Layout) -> "RunWriter":
        """Start a new record; an earlier run of the same name is moved aside, never overwritten."""
        set_aside(config.run_folder)
        writer = RunWriter(config, layout)
        with disk(writer.folder):
            (writer.folder / "rounds.jsonl").write_text("")
        writer.write_header()
        return writer

    @staticmethod
    def resume(config: RunConfig, layout: Layout) -> "tuple[RunWriter, int, Tensor | None, dict[str, Tensor]]":
        """Open an interrupted record; returns (writer, last finished round, its model or None, server's memory)."""
        before = read_run(config.run_folder)
        _check_same(before.config, config)
        writer = RunWriter(config, layout)
        writer.header = {**_read_header(writer.folder), "status": "running", "settings": config.settings()}
        last, vector, memory = writer._recover()
        writer.write_header()
        return writer, last, vector, memory

    def write_header(self, **changes: Any) -> None:
        """Write run.json, in one step."""
        self.header.update(changes)
        replace_file(self.folder / "run.json", (json.dumps(self.header, indent=2) + "\n").encode())

    def write_round(
        self,
        record: RoundRecord,
        vector: Tensor,
        updates: tuple[list[int], Tensor] | None,
        memory: Mapping[str, Tensor] = MappingProxyType({}),
        beside: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write a finished round: optional stores first, then the checkpoint, then the line.

        `memory` is what rules and server optimisers keep between rounds; it goes into the checkpoint. `beside` are
        tensors that the rule had besides the updates; they are stored with them, for replay.
        """
        if updates is not None and self.config.keep_updates:
            clients, stack = updates
            tensors = {"updates": stack.contiguous(), "clients": torch.tensor(clients, dtype=torch.int64), **beside}
            self._store(f"updates/round-{record.round:05d}.safetensors", tensors)
        if self.config.keep_models and record.round % self.config.keep_models == 0:
            self._store(f"models/round-{record.round:05d}.safetensors", self.layout.split(vector))
        line = json.dumps(dataclasses.asdict(record), allow_nan=False)
        kept = {MEMORY + name: tensor for name, tensor in memory.items()}
        self._store("checkpoint.safetensors", {"vector": vector, **kept}, {"line": line})
        with disk(self.folder), (self.folder / "rounds.jsonl").open("a") as file:
            write_down(file, line + "\n")

    def finish(self, vector: Tensor, **facts: Any) -> None:
        """Write the final model as named arrays and mark the run finished."""
        self._store("model.safetensors", self.layout.split(vector))
        self.header["facts"].update(facts)
        self.write_header(status="finished", ended=time.time())

    def close(self) -> None:
        """Give up the folder's lock."""
        self._lock.close()

    def _recover(self) -> tuple[int, Tensor | None, dict[str, Tensor]]:
        path, rounds = self.folder / "checkpoint.safetensors", self.folder / "rounds.jsonl"
        lines = _whole_lines(rounds)
        if not path.exists():
            rounds.write_text("")
            return 0, None, {}
        try:
            with safe_open(path, "pt") as file:
                line, vector = file.metadata()["line"], file.get_tensor("vector")
                kept = [name for name in file.keys() if name.startswith(MEMORY)]  # noqa: SIM118
                memory = {name.removeprefix(MEMORY): file.get_tensor(name) for name in kept}
        except (SafetensorError, KeyError, TypeError) as error:
            raise RecordError(f"{path} cannot be read ({error}); start the run anew") from None
        last = RoundRecord.from_json(line).round
        kept = [text for text in lines if RoundRecord.from_json(text).round < last]
        replace_file(rounds, "".join(text + "\n" for text in [*kept, line]).encode())
        return last, vector, memory

    def _store(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
        path = self.folder / name
        partial = path.with_suffix(".partial")
        with disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial, metadata)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # before the rename: a power cut must not leave an empty file of that name
            os.replace(partial, path)


def set_aside(folder: Path) -> Path | None:
    """Move an existing run folder to ``earlier/NAME.1``, ``earlier/NAME.2``, ... beside it; returns the new path.

    Raises `RecordError` while another process writes that run.
    """
    if not (folder / "run.json").exists():
        return None
    number = 1
    with lock(folder), disk(folder):
        earlier = folder.parent / "earlier"
        earlier.mkdir(exist_ok=True)
        while (aside := earlier / f"{folder.name}.{number}").exists():
            number += 1
        folder.rename(aside)
    return aside


def _check_same(before: RunConfig, now: RunConfig) -> None:
    """A resumed run must be the same experiment: only settings that do not touch its numbers may differ."""
    for f in dataclasses.fields(RunConfig):
        old, new = getattr(before, f.name), getattr(now, f.name)
        if old != new and f.name not in MAY_CHANGE:
            raise RecordError(
                f"cannot resume with {f.name.replace('_', '-')} = {new!r}: the run was started with {old!r}"
            )
