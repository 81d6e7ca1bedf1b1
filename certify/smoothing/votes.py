"""Counted votes: the state of a sampling run, complete or not, and its file.

Draws are numbered from 0 and each has its own generator, so the number of draws done is all that resuming needs.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from certify.network import HASHED_AT_ONCE, Network
from tasks.errors import CertificationError, RecordError

SCHEMA = 1
Noise = Literal["weights", "logits"]  # one noisy model for all points, or independent noise per point


@dataclass(frozen=True)
class Plan:
    """What is to be drawn: two plans that are equal give the same counts."""

    noise: Noise
    sigma: float
    seed: int
    stream: str  # a name; other streams of the same seed are independent
    num_draws: int
    model_sha256: str
    inputs_sha256: str

    def __post_init__(self) -> None:
        if not (isinstance(self.sigma, int | float) and 0 < self.sigma < float("inf")):
            raise CertificationError(f"sigma must be above 0, got {self.sigma!r}; without noise there is one vote")
        for name, least in (("num_draws", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise CertificationError(f"{name} must be a whole number from {least}, got {value!r}")
        if not self.stream or not isinstance(self.stream, str):
            raise CertificationError(f"stream must be a name, got {self.stream!r}")


@dataclass(frozen=True)
class ModelForm:
    """What a network is, as far as a training record speaks of it."""

    layers: tuple[str, ...]  # their kinds, but for flatten
    num_classes: int
    num_params: int
    bias: bool  # of the last layer
    dtype: str

    @staticmethod
    def of(network: Network) -> "ModelForm":
        """Return the form of `network`."""
        kinds = tuple(layer.kind for layer in network.layers if layer.kind != "flatten")
        bias = bool(network.layers) and any(role == "bias" for role, _ in network.layers[-1].roles)
        dtype = str(network.vector().dtype).removeprefix("torch.")
        return ModelForm(kinds, network.num_classes, network.num_params, bias, dtype)


@dataclass(frozen=True, eq=False)
class Votes:
    """Votes per class [points, classes] of the first `num_draws` draws of a plan."""

    plan: Plan
    counts: NDArray[np.int64]
    num_draws: int
    form: ModelForm | None = None  # of the model that voted; None for votes read from a file

    @property
    def complete(self) -> bool:
        """True where every draw of the plan is counted."""
        return self.num_draws == self.plan.num_draws

    @staticmethod
    def none(plan: Plan, num_points: int, num_classes: int) -> "Votes":
        """Return the state before the first draw."""
        return Votes(plan, np.zeros((num_points, num_classes), dtype=np.int64), 0)

    def save(self, path: Path) -> None:
        """Write the state as safetensors; the file appears whole or not at all."""
        described = {"schema": SCHEMA, "num_done": self.num_draws, **asdict(self.plan)}
        part = path.with_name(f".{path.name}.part")
        save_file({"counts": self.counts}, part, metadata={"votes": json.dumps(described, sort_keys=True)})
        part.replace(path)

    @staticmethod
    def load(path: Path) -> "Votes":
        """Read what `save` wrote; raises `RecordError` where it is something else."""
        try:
            with safe_open(path, framework="numpy") as file:
                described = json.loads((file.metadata() or {}).get("votes", "{}"))
                counts = file.get_tensor("counts")
        except (OSError, SafetensorError, json.JSONDecodeError) as error:
            raise RecordError(f"{path} holds no votes: {error}") from None
        if not isinstance(described, dict) or described.pop("schema", None) != SCHEMA:
            raise RecordError(f"{path} holds no votes of schema {SCHEMA}")
        return _read(path, described, counts)


def resumed(plan: Plan, start: Votes | None, num_points: int, form: ModelForm) -> Votes:
    """Return the state to go on from: `start` if it is of the same plan, the state before the first draw if None."""
    if start is None:
        return replace(Votes.none(plan, num_points, form.num_classes), form=form)
    differ = [f.name for f in fields(Plan) if getattr(plan, f.name) != getattr(start.plan, f.name)]
    if set(differ) - {"num_draws"} or start.num_draws > plan.num_draws:
        raise CertificationError(f"votes can be resumed under their own plan only; {', '.join(differ)} differ")
    return Votes(plan, start.counts.copy(), start.num_draws, form)


def inputs_sha256(inputs: torch.Tensor) -> str:
    """Return the SHA-256 of inputs as float64, with their shape: the identity of the points of a certificate.

    It is the same for the same numbers in every type, and differs where any number does.
    """
    digest = hashlib.sha256(json.dumps(list(inputs.shape)).encode())
    for piece in inputs.detach().reshape(-1).split(HASHED_AT_ONCE):
        digest.update(piece.cpu().to(torch.float64).numpy().astype("<f8").tobytes())
    return digest.hexdigest()


def _read(path: Path, described: Mapping[str, Any], counts: NDArray[Any]) -> Votes:
    try:
        num_done = described["num_done"]
        plan = Plan(**{key: value for key, value in described.items() if key != "num_done"})
    except (KeyError, TypeError, CertificationError) as error:
        raise RecordError(f"{path} holds votes of no plan: {error}") from None
    good = counts.ndim == 2 and counts.dtype == np.int64 and type(num_done) is int and 0 <= num_done <= plan.num_draws
    if not good or (counts < 0).any() or (counts.sum(axis=1) > num_done).any():
        raise RecordError(f"{path} holds counts that {num_done} draws cannot give")
    return Votes(plan, counts, num_done)
