"""Writing the run record, see `server.record`: round by round, so that a killed process loses nothing finished."""

import dataclasses
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from server.files import disk, lock, replace_file, write_down
from server.record import SCHEMA, RoundRecord, read_header, read_run, whole_lines
from tasks.config import RunConfig
from tasks.errors import RecordError
from tasks.params import Layout

MEMORY = "memory."  # prefix, in the checkpoint, of what rules and optimisers keep
MAY_CHANGE = {"resume", "name", "runs_dir", "data_dir", "num_rounds", "workers", "round_timeout", "startup_timeout"}
MAY_CHANGE |= {"metrics_port", "log_format", "tensorboard"}
MAY_CHANGE |= {"gate_workers", "gate_service", "gate_timeout", "gate_attempts"}
MAY_CHANGE |= {"gate_tls", "gate_tls_ca", "gate_tls_cert", "gate_tls_key", "gate_token_file"}


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
        try:
            writer.header = {**read_header(writer.folder), "status": "running", "settings": config.settings()}
            last, vector, memory = writer._recover()
            writer.write_header()
        except BaseException:
            writer.close()
            raise
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
        lines = whole_lines(rounds)
        if not path.exists():
            if lines:  # every line is written after its checkpoint
                raise RecordError(
                    f"{path} is missing, though {len(lines)} rounds are recorded: put it back, or start the run anew"
                )
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
