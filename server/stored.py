"""Reading the tensors that a run stored: updates, what the rule had besides them, models."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tasks.errors import ConfigError, RecordError
from tasks.params import Layout


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
