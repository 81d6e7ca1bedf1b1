"""A client's state between rounds: named tensors in the Flower context of its node.

Flower keeps `Context.state` where the client lives: in the SuperNode's memory, in the simulation's, in the in-process
engine's. A training that keeps nothing leaves it empty.
"""

from collections.abc import Mapping

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor

RECORD = "training"


def read_state(records: RecordDict) -> dict[str, Tensor]:
    """Return the tensors of a context's state; they are the caller's to change."""
    if RECORD not in records.array_records:
        return {}
    return {str(name): torch.from_numpy(array.numpy().copy()) for name, array in records.array_records[RECORD].items()}


def write_state(records: RecordDict, state: Mapping[str, Tensor]) -> None:
    """Store tensors in a context's state, in place of what was there; an empty mapping stores nothing."""
    if state:
        records[RECORD] = ArrayRecord({name: Array(_array(tensor)) for name, tensor in state.items()})
    elif RECORD in records:
        del records[RECORD]


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())
