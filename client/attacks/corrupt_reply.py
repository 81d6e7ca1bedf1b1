"""Malformed replies: what a broken or hostile client may send instead of a model; a server must survive each.

Kinds: nan, inf, huge (1e30 everywhere), shape, dtype (float64), names, missing, extra, bytes (random content),
empty (no arrays), silent (raises, as a crash does). Attackers take the kinds in turn.
"""

import numpy as np

from client.attack import Attack, chosen_rank, edit_reply
from client.trainer import LocalJob
from tasks.errors import HawthornError, SpecError

KINDS = ("nan", "inf", "huge", "shape", "dtype", "names", "missing", "extra", "bytes", "empty", "silent")


def corrupt_reply(*, kinds: tuple[str, ...] = KINDS) -> Attack:
    """Send a reply of the attacker's kind; see `KINDS`."""
    if not kinds or not set(kinds) <= set(KINDS):
        raise SpecError(f"corrupt_reply wants some of these kinds: {', '.join(KINDS)}; got {kinds}")
    return edit_reply(lambda record, job: _corrupt(record, chosen_rank(job, kinds), job))


def _corrupt(record, kind: str, job: LocalJob):
    from flwr.app import Array, ArrayRecord

    if kind == "silent":
        raise HawthornError("this client refuses to reply (attack corrupt_reply, kind silent)")
    arrays = {key: record[key].numpy() for key in record}
    first = next(iter(arrays))
    fill = {"nan": np.nan, "inf": np.inf, "huge": 1e30}
    if kind in fill:
        arrays = {key: np.full_like(value, fill[kind]) for key, value in arrays.items()}
    elif kind == "shape":
        arrays[first] = np.zeros((3, *arrays[first].shape), np.float32)
    elif kind == "dtype":
        arrays = {key: value.astype(np.float64) for key, value in arrays.items()}
    elif kind == "names":
        arrays = {f"renamed.{key}": value for key, value in arrays.items()}
    elif kind == "missing":
        del arrays[first]
    elif kind == "extra":
        arrays["extra"] = np.zeros(1, np.float32)
    elif kind == "empty":
        arrays = {}
    encoded = {key: Array(value) for key, value in arrays.items()}
    if kind == "bytes":
        size = len(encoded[first].data)
        noise = job.generator("corrupt_reply")
        data = bytes(np.random.default_rng(noise.initial_seed()).integers(0, 256, size, dtype=np.uint8))
        encoded[first] = Array(dtype="float32", shape=encoded[first].shape, stype="numpy.ndarray", data=data)
    return ArrayRecord(encoded)
