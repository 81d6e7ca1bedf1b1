"""What travels and lies on the disk: models, certification sets and results as safetensors files.

A file that came from outside is believed nothing: the header's length is looked at before the header, the tensors'
names, types and shapes before their numbers, and the layers go through `Network.from_parts`.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from certify.network import Network
from certify.service import certify_pb2 as pb
from tasks.errors import DataError

SERVICE = pb.DESCRIPTOR.services_by_name["CertifyService"].full_name
NETWORK = "hawthorn.network"  # metadata entry of a model's file
SUMMARY = "hawthorn.summary"  # metadata entry of a result's file
CHUNK = 2**20  # bytes of one message; gRPC's default limit is 4 MiB
MAX_HEADER = 2**23
_INFINITIES = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}
_DTYPES = {"int64": "<i8", "int32": "<i4", "float32": "<f4", "float64": "<f8", "bool": "|b1", "uint8": "|u1"}


@dataclass(frozen=True, eq=False)
class CertificationSet:
    """Inputs [points, *input_shape] in float32 or float64 and their labels [points]."""

    inputs: Tensor
    labels: Tensor


def model_file(network: Network) -> bytes:
    """Return a network as one safetensors file; equal networks give equal bytes."""
    described = {"architecture": network.architecture(), "input_shape": list(network.input_shape)}
    text = json.dumps(described, sort_keys=True, separators=(",", ":"))
    arrays = {name: _array(tensor) for name, tensor in network.tensors().items()}
    return safetensors.numpy.save(arrays, {NETWORK: text})


def read_model(path: Path) -> Network:
    """Read a model's file; `DataError` where it is no safetensors file, `CertificationError` where it is no network."""
    tensors, metadata = _open(path)
    try:
        described = json.loads(metadata[NETWORK])
        architecture, input_shape = described["architecture"], described["input_shape"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise DataError(
            f'a model\'s file has the metadata entry "{NETWORK}" with {{"architecture": [...], "input_shape": [...]}}'
        ) from None
    return Network.from_parts(architecture, tensors, input_shape)


def set_file(inputs: Tensor, labels: Tensor) -> bytes:
    """Return a certification set as one safetensors file."""
    return safetensors.numpy.save({"inputs": _array(inputs), "labels": _array(labels.long())})


def read_set(path: Path, *, max_points: int) -> CertificationSet:
    """Read a certification set's file; everything wrong with it raises `DataError`."""
    tensors, _ = _open(path)
    if tensors.keys() != {"inputs", "labels"}:
        names = ", ".join(sorted(tensors)[:5])
        raise DataError(f'a certification set has the tensors "inputs" and "labels", got: {names[:200]}')
    inputs, labels = tensors["inputs"], tensors["labels"]
    if inputs.dtype not in (torch.float32, torch.float64) or not 2 <= inputs.ndim <= 4 or 0 in inputs.shape:
        raise DataError(
            "inputs must be float32 or float64 of shape [points, features] or [points, channels, height, width], "
            f"got {inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != inputs.shape[:1]:
        raise DataError(f"labels must be int64 of shape [{len(inputs)}], got {labels.dtype} {tuple(labels.shape)}")
    if len(inputs) > max_points:
        raise DataError(f"this service takes certification sets of at most {max_points} points, got {len(inputs)}")
    if not bool(torch.isfinite(inputs).all()):
        raise DataError("inputs must be finite, got NaN or infinity")
    if not 0 <= int(labels.min()) <= int(labels.max()) < 2**31:
        raise DataError("labels must be whole numbers from 0")
    return CertificationSet(inputs, labels)


def pack(arrays: Mapping[str, NDArray[Any]], fields: Mapping[str, Any]) -> bytes:
    """Return a result as one safetensors file: arrays, and the rest as JSON."""
    text = json.dumps(_plain(fields), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return safetensors.numpy.save(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()}, {SUMMARY: text}
    )


def unpack(content: bytes) -> tuple[dict[str, NDArray[Any]], str]:
    """Return arrays and JSON of what `pack` made."""
    arrays = dict(sorted(safetensors.numpy.load(content).items()))
    length = int.from_bytes(content[:8], "little")
    return arrays, json.loads(content[8 : 8 + length])["__metadata__"][SUMMARY]


def read_fields(text: str) -> dict[str, Any]:
    """Return the fields of a result from its JSON; infinities and NaN were written as text."""
    return _restore(json.loads(text))


def parts(arrays: Mapping[str, NDArray[Any]]) -> Iterator[pb.ArrayPart]:
    """Yield all arrays in parts of at most `CHUNK` bytes."""
    for name, array in arrays.items():
        data = array.astype(_DTYPES[array.dtype.name]).tobytes()
        shape = list(array.shape)
        for offset in range(0, max(len(data), 1), CHUNK):
            chunk = data[offset : offset + CHUNK]
            yield pb.ArrayPart(name=name, dtype=array.dtype.name, shape=shape, offset=offset, data=chunk)


def result_sha256(arrays: Mapping[str, NDArray[Any]], text: str) -> str:
    """Return the hash of a result as it travels: the bytes of the arrays in their order, then the JSON."""
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(array.astype(_DTYPES[array.dtype.name]).tobytes())
    digest.update(text.encode())
    return digest.hexdigest()


class Assembly:
    """The arrays of a result, put together again from their parts."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
        self._data: dict[str, bytearray] = {}

    def add(self, part: pb.ArrayPart) -> None:
        """Append a part; `DataError` where it does not follow the one before."""
        kind = part.dtype, tuple(part.shape)
        data = self._data.setdefault(part.name, bytearray())
        if part.dtype not in _DTYPES or self._shapes.setdefault(part.name, kind) != kind or part.offset != len(data):
            raise DataError(f"a part of the array {part.name!r} does not follow the one before; ask again")
        data += part.data

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return all arrays; `DataError` where one is not whole."""
        found = {}
        for name, (dtype, shape) in self._shapes.items():
            kind = np.dtype(_DTYPES[dtype])
            if len(self._data[name]) != math.prod(shape) * kind.itemsize:
                raise DataError(f"the array {name!r} did not arrive whole; ask again")
            found[name] = np.frombuffer(self._data[name], kind).reshape(shape).astype(dtype)
        return found


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors (mapped, not read) and metadata of a safetensors file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if not 2 <= length <= MAX_HEADER:
        raise DataError(f"no safetensors file: its header may have 2 to {MAX_HEADER} bytes and claims {length}")
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"no safetensors file that can be read: {str(error)[:200]}") from None


def _array(tensor: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def _plain(value: Any) -> Any:
    """Return `value` as strict JSON has it; a tuple is a list, a number that is not finite is text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return value


def _restore(value: Any) -> Any:
    if isinstance(value, list):
        return [_restore(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"float"}:
            return _INFINITIES[value["float"]]
        return {key: _restore(item) for key, item in value.items()}
    return value
