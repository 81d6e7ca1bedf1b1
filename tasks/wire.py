"""Model vectors in Flower's messages: named float32 arrays, encoded and read without needless copies.

`ArrayRecord(model.state_dict())` copies every array several times. Here the header of the `.npy` form is
made once per shape, a vector is cut into views, and a well-formed reply is read in place with
`numpy.frombuffer`. Flower is imported only when a record is made, so this module loads without it.
"""

import functools
import io
import math
import typing

import numpy as np
from torch import Tensor

from tasks.params import Layout

if typing.TYPE_CHECKING:
    from flwr.app import Array, ArrayRecord

STYPE = "numpy.ndarray"  # Flower's name for the .npy serialisation


class WireError(ValueError):
    """An array of a message is not what the layout wants; the text is the reason that gets logged."""


@functools.lru_cache(maxsize=4096)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """Return the .npy header of a C-ordered little-endian float32 array of `shape`."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def to_record(vector: Tensor, layout: Layout) -> "ArrayRecord":
    """Encode a float32 vector ([num_params]) as a record of named arrays; the bytes are a snapshot."""
    from flwr.app import Array, ArrayRecord

    values, start = vector.detach().numpy().data.cast("B"), 0
    arrays: dict[str, Array] = {}
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        data = b"".join((npy_header(shape), values[4 * start : 4 * (start + size)]))
        arrays[name] = Array(dtype="float32", shape=shape, stype=STYPE, data=data)
        start += size
    return ArrayRecord(arrays)


def from_record(record: "ArrayRecord", layout: Layout, out: Tensor) -> None:
    """Copy the arrays of a record into `out` ([num_params], float32); raises `WireError` when they do not fit."""
    if record.keys() != set(layout.names):
        missing, extra = sorted(set(layout.names) - record.keys()), sorted(record.keys() - set(layout.names))
        raise WireError(f"array names differ: missing {missing[:3]}, unexpected {[str(e)[:40] for e in extra[:3]]}")
    target, start = out.numpy(), 0
    for name, shape, size in zip(layout.names, layout.shapes, layout.sizes, strict=True):
        target[start : start + size] = _read(name, record[name], shape).reshape(-1)
        start += size


def _read(name: str, array: "Array", shape: tuple[int, ...]) -> np.ndarray:
    if tuple(array.shape) != shape:
        raise WireError(f"{name} has shape {_short(tuple(array.shape))}, wanted {shape}")
    if array.dtype != "float32":
        raise WireError(f"{name} has dtype {str(array.dtype)[:40]}, wanted float32")
    if array.stype != STYPE:
        raise WireError(f"{name} is serialised as {str(array.stype)[:40]!r}, wanted {STYPE!r}")
    header = npy_header(shape)
    wanted = len(header) + 4 * math.prod(shape)
    if len(array.data) == wanted and array.data.startswith(header):
        return np.frombuffer(array.data, dtype="<f4", offset=len(header))
    if len(array.data) > wanted + 1024:
        raise WireError(f"{name} carries {len(array.data)} bytes, wanted {wanted}")
    return _read_other_order(name, array.data, shape)


def _read_other_order(name: str, data: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """Read a .npy whose header is written differently (Fortran order, other version); same checks on the content."""
    try:
        values = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)  # .npy only, never a zip
    except Exception as error:  # numpy raises many types on malformed bytes; every one means the same here
        raise WireError(f"{name} cannot be read: {str(error)[:80]}") from None
    if values.shape != shape or values.dtype != np.float32:
        raise WireError(f"{name} holds {values.dtype} {_short(values.shape)}, wanted float32 {shape}")
    return values


def _short(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"of {len(shape)} dimensions"
