"""The run record `runs/<name>/`: what happened, in files that a killed process cannot spoil.

    run.json            schema, settings, task facts, versions, status, initial metrics
    rounds.jsonl        one JSON object per finished round (`RoundRecord`)
    checkpoint.safetensors   the global model after the last finished round and what rules and optimisers keep, with
                        that round's line in its metadata
    model.safetensors   the same model as named arrays, at the end
    updates/, models/   per round, when the settings ask for them
    crfl.json           what certificates need to know of the training, where CRFL runs (see `server.crfl`)

The checkpoint is written first and renamed into place; the line of `rounds.jsonl` is inside it, so a kill between
the two writes loses nothing: opening for resumption appends the missing line and cuts a half-written one.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, TextIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.config import RunConfig
from tasks.errors import ConfigError, RecordError
from tasks.params import Layout

SCHEMA = 1
MEMORY = "memory."  # prefix, in the checkpoint, of what rules and optimisers keep
MAY_CHANGE = {"resume", "name", "runs_dir", "data_dir", "num_rounds", "workers", "round_timeout", "startup_timeout"}


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
    broadcast_norm: float | None = None  # of what clients get next, where that is not the model but a noisy one

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
        self._lock = _lock(self.folder)
        with _disk(self.folder):
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
        with _disk(writer.folder):
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
        with _disk(self.folder), (self.folder / "rounds.jsonl").open("a") as file:
            _write_down(file, line + "\n")

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
        with _disk(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous().clone() for k, v in tensors.items()}, partial, metadata)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())  # before the rename: a power cut must not leave an empty file of that name
            os.replace(partial, path)


def read_updates(folder: Path, round: int) -> tuple[list[int], Tensor]:
    """Return (clients, updates [clients, params]) that a run stored for a round; `RecordError` if it did not."""
    path = Path(folder) / f"updates/round-{round:05d}.safetensors"
    if not path.exists():
        raise RecordError(f"{path} does not exist: run with --keep-updates to store the updates of every round")
    tensors = load_file(path)
    return tensors["clients"].tolist(), tensors["updates"]


def read_beside(folder: Path, round: int) -> dict[str, Tensor]:
    """Return what the rule had besides the updates in a stored round: `claims` [clients], `root_update` [params]."""
    tensors = load_file(Path(folder) / f"updates/round-{round:05d}.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name not in ("updates", "clients")}


def read_model(path: Path, layout: Layout) -> Tensor:
    """Read a model.safetensors as a vector ([params]); wrong names or shapes raise `ConfigError` saying which."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot read model {path}: {error}") from None
    wanted = dict(zip(layout.names, layout.shapes, strict=True))
    came = {
        name: tuple(tensor.shape) for name, tensor in tensors.items() if name in wanted or tensor.is_floating_point()
    }
    if wrong := {n for n in wanted.keys() | came.keys() if wanted.get(n) != came.get(n)}:
        details = ", ".join(f"{n}: wanted {wanted.get(n)}, came {came.get(n)}" for n in sorted(wrong)[:4])
        raise ConfigError(f"{path} does not fit the model of this run: {details}")
    vector = layout.join(tensors)
    if not bool(torch.isfinite(vector).all()):
        raise ConfigError(f"{path} holds values that are not finite")
    return vector


def set_aside(folder: Path) -> Path | None:
    """Move an existing run folder to ``earlier/NAME.1``, ``earlier/NAME.2``, ... beside it; returns the new path.

    Raises `RecordError` while another process writes that run.
    """
    if not (folder / "run.json").exists():
        return None
    lock, number = _lock(folder), 1
    with lock, _disk(folder):
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


def _lock(folder: Path) -> TextIO:
    """Take the lock of a run's name; it lies beside the folder, so that it stays when the folder is moved."""
    with _disk(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = (folder.parent / f".{folder.name}.lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise RecordError(f"another process is writing {folder}; wait for it or choose another --name") from None
    return file


@contextlib.contextmanager
def _disk(path: Path) -> Iterator[None]:
    """Turn what a disk refuses (full, read-only, gone) into a `RecordError` that says what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RecordError(
            f"cannot write {path}: {error}; finished rounds are safe: make room, then hawthorn run --resume RUN-FOLDER"
        ) from error


def _write_down(file: TextIO, text: str) -> None:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file in one step: a reader, or a kill, meets the old content or the new."""
    partial = path.with_name(path.name + ".partial")
    with _disk(path):
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
