"""What clients keep between rounds, on disk, so that an interrupted run of the in-process engine goes on as it was.

One safetensors file per client and round in which its state changed, written in one step before the round's checkpoint.
Of each client the files of its last two changes stay: should the last one belong to a round that was never finished,
resumption starts from the one before. Nothing is written for clients that keep nothing.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tasks.errors import RecordError

NAME = re.compile(r"client-(\d{5,})\.round-(\d{5,})\.safetensors")


class ClientStates:
    """The states of a run's clients in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def load(self, round: int) -> dict[int, dict[str, Tensor]]:
        """Return each client's state as it was before `round`, and delete what an unfinished round left behind."""
        states: dict[int, dict[str, Tensor]] = {}
        for client, rounds in self._rounds().items():
            for late in (r for r in rounds if r >= round):
                self._path(client, late).unlink()
            if earlier := [r for r in rounds if r < round]:
                states[client] = self._read(self._path(client, max(earlier)))
        return states

    def store(self, round: int, states: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Write the states that changed in `round`; files that no resumption can need any more are deleted."""
        if not states:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            known = self._rounds()
            for client, state in states.items():
                path = self._path(client, round)
                partial = path.with_suffix(".partial")
                save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial)
                with partial.open("rb+") as file:
                    os.fsync(file.fileno())  # before the rename: a power cut must not leave an empty file of that name
                os.replace(partial, path)
                for old in sorted(r for r in known.get(client, ()) if r < round)[:-1]:
                    self._path(client, old).unlink()
        except (OSError, SafetensorError) as error:
            raise RecordError(f"cannot write the clients' states to {self.folder}: {error}") from error

    def _path(self, client: int, round: int) -> Path:
        return self.folder / f"client-{client:05d}.round-{round:05d}.safetensors"

    def _rounds(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for path in self.folder.glob("client-*.safetensors"):
            if match := NAME.fullmatch(path.name):
                found.setdefault(int(match[1]), []).append(int(match[2]))
        return found

    @staticmethod
    def _read(path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise RecordError(f"{path} cannot be read ({error}); start the run anew") from None
