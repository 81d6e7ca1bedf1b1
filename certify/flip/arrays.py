"""What FLIP's theory takes: finite float64 arrays of fitting shapes, and the rounding errors of products of them."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certify.bounds import Floats
from tasks.errors import CertificationError

Labels = NDArray[np.int64]
UNIT = float(np.finfo(np.float64).eps) / 2  # one rounding to nearest, relative
TINY = float(np.finfo(np.float64).tiny)
LARGEST = 1e120  # sums of products of two such numbers, and their squares, stay inside float64


def matrix(name: str, values: Any, columns: int | None = None) -> Floats:
    """Return finite numbers as float64 [rows, columns]; inputs of any shape are flattened, one row per sample."""
    array = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    if array.dtype.kind not in "iuf" or array.ndim < 2:
        raise CertificationError(f"{name} must be numbers in 2 dimensions or more, got {array.dtype} {array.shape}")
    array = np.ascontiguousarray(array, dtype=np.float64).reshape(len(array), math.prod(array.shape[1:]))
    if not (np.abs(array) <= LARGEST).all():  # NaN is not, either
        raise CertificationError(f"{name} must be finite numbers of size at most {LARGEST:g}")
    if columns is not None and array.shape[1] != columns:
        raise CertificationError(f"{name} must have {columns} columns, got {array.shape[1]}")
    return array


def logits(name: str, values: Any, like: Floats | None = None) -> Floats:
    """Return logits as float64 [samples, 2 classes or more], of the shape of `like` if given."""
    array = matrix(name, values)
    if array.shape[1] < 2:
        raise CertificationError(f"{name} must be [samples, classes] with 2 classes or more, got {array.shape}")
    if like is not None and array.shape != like.shape:
        raise CertificationError(f"{name} must have shape {like.shape}, got {array.shape}")
    return array


def labels(values: Any, num_samples: int, num_classes: int) -> Labels:
    """Return one class per sample as int64; a single number stands for all samples."""
    array = np.asarray(values.detach().cpu().numpy() if hasattr(values, "detach") else values)
    array = np.full(num_samples, array) if array.ndim == 0 else array
    whole = array.dtype.kind in "iu" and array.shape == (num_samples,)
    if not whole or (num_samples and not (array.min() >= 0 and array.max() < num_classes)):
        raise CertificationError(f"labels must be {num_samples} whole numbers from 0 to {num_classes - 1}")
    return array.astype(np.int64)


def bias(values: Any, num_classes: int) -> Floats:
    """Return one finite number per class; None: zeros."""
    if values is None:
        return np.zeros(num_classes)
    array = matrix("bias_change", np.asarray(values.detach().cpu() if hasattr(values, "detach") else values)[None, ...])
    if array.shape[1] != num_classes:
        raise CertificationError(f"bias_change must be {num_classes} numbers, got {array.shape[1]}")
    return array[0]


def dot_error_upper(terms: int, absolute: Floats) -> Floats:
    """Return a bound of the rounding error of sums of `terms` products, whose absolute values sum to `absolute`.

    Higham's gamma, in any order of summation; two more roundings are allowed for each factor, and `absolute` may be
    computed itself. Products below the normal numbers are each off by less than the smallest of them.
    """
    share = (terms + 6) * UNIT
    return absolute * (1.01 * share / (1 - share)) + 2 * (terms + 2) * TINY
