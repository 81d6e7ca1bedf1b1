"""What the certification service is sent: spoiled files of models and sets, and odd requests."""

import math
import random
import struct
from collections.abc import Callable
from typing import Any

import torch
from google.protobuf.message import DecodeError
from torch import Tensor

from benchmarks.fuzzing.case import NUMBERS, TEXTS, Broken, Outcome, Place, refused
from certify.network import Network
from certify.service import certify_pb2 as pb
from certify.service import messages, wire
from tasks.errors import HawthornError


def spoil(draw: random.Random, content: bytes) -> bytes:
    """Return bytes with a few of them changed, cut, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place : place + draw.choice((1, 4, 64))]
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.choice((1, 4, 64)))
        elif kind == 3:
            data[place : place + 4] = struct.pack(
                "<f", draw.choice([n for n in NUMBERS if abs(n) < 3.5e38 or math.isinf(n) or n != n])
            )
        else:
            data[place:place] = data[: draw.randrange(64)]
    return bytes(data)


def fuzz_model(draw: random.Random) -> Outcome:
    """Read a spoiled model or a spoiled certification set as the service does."""
    if not BLOBS:
        network = Network.from_module(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)), (6,)
        )
        BLOBS.append(wire.model_file(network))
        BLOBS.append(wire.set_file(torch.rand(4, 6), torch.tensor([0, 1, 2, 0])))
    which = draw.randrange(2)
    path = Place.folder / "blob"
    path.write_bytes(spoil(draw, BLOBS[which]))
    try:
        read: Any = wire.read_model(path) if which == 0 else wire.read_set(path, max_points=1000)
    except HawthornError as error:
        return refused(error)
    tensors = [t for t in (vars(read).values() if hasattr(read, "__dict__") else read) if isinstance(t, Tensor)]
    if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
        raise Broken("numbers that are not finite were taken")
    return "read"


REQUESTS = ("CertifySmoothingRequest", "CheckZonotopeRequest", "GateRequest", "UploadRequest", "GetModelRequest")


def fuzz_message(draw: random.Random) -> Outcome:
    """Decode spoiled bytes of a request, or check a request of odd numbers and texts."""
    kind = getattr(pb, draw.choice(REQUESTS))
    message = kind()
    fill(draw, message, 0)
    content = message.SerializeToString()
    if draw.random() < 0.6:
        try:
            message = kind.FromString(spoil(draw, content))
        except DecodeError:
            return "no message"
    check = CHECKS.get(type(message).__name__)
    if check is None:
        return "read"
    try:
        check(message)
    except HawthornError as error:
        return refused(error)
    return "read"


def fill(draw: random.Random, message: Any, depth: int) -> None:
    """Fill a message with odd values."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.3 or depth > 3:
            continue
        many = draw.choice((0, 1, 3, 40)) if field.is_repeated else 1
        for _ in range(many):
            if field.message_type is not None:
                inner = getattr(message, field.name)
                fill(draw, inner.add() if field.is_repeated else inner, depth + 1)
                if not field.is_repeated:
                    inner.SetInParent()
                continue
            value = odd_value(draw, field)
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)


def odd_value(draw: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return draw.choice(NUMBERS)
    if kind == field.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return draw.randbytes(draw.choice((0, 8, 300)))
        return draw.choice((*TEXTS, "0" * 64, "{}", '{"a": NaN}', "[1", "paper", "hardened", "float64"))
    return draw.choice((0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1 if kind == field.CPPTYPE_UINT32 else 2**64 - 1))


CHECKS: dict[str, Callable[[Any], Any]] = {
    "CertifySmoothingRequest": messages.smoothing,
    "CheckZonotopeRequest": messages.zonotope,
    "GateRequest": lambda request: (
        messages.settings(request),
        messages.policy(request.policy),
        messages.state(request.state),
    ),
}
BLOBS: list[bytes] = []
