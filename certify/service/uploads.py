"""Uploads: a header that announces hash and size, then chunks; all of it arrives as announced or nothing is kept."""

import contextlib
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import TypeVar

import grpc

from certify.service import certify_pb2 as pb
from certify.service.status import RefusalError, invalid, out_of_range
from certify.service.store import SHA256, Incoming, Kind, Store

Item = TypeVar("Item")
_END = object()


def receive(
    messages: Iterable[pb.UploadRequest], store: Store, kind: Kind, *,
    max_bytes: int, idle_seconds: float, check: Callable[[Incoming], None], received: Callable[[int], None],
) -> str:  # fmt: skip
    """Read an upload, pass it to `check` and keep it; returns its hash. What is there already is not read again."""
    with contextlib.closing(paced(messages, idle_seconds)) as paced_messages:
        header = _header(paced_messages, max_bytes)
        if store.has(kind, header.sha256):
            return header.sha256
        with store.receive(header.num_bytes) as incoming:
            for message in paced_messages:
                _append(message, incoming, header)
                received(len(message.chunk))
            if incoming.num_bytes < header.num_bytes:
                raise _lost(f"only {incoming.num_bytes} of {header.num_bytes} bytes came before the upload ended")
            if incoming.sha256() != header.sha256:
                raise _lost(f"the bytes have SHA-256 {incoming.sha256()}, announced was {header.sha256}")
            check(incoming)
            return store.commit(kind, incoming)


def _header(messages: Iterator[pb.UploadRequest], max_bytes: int) -> pb.UploadHeader:
    first = next(messages, None)
    if first is None or first.WhichOneof("part") != "header":
        raise invalid("the first message of an upload is its header with sha256 and num_bytes")
    if SHA256.fullmatch(first.header.sha256) is None:
        raise invalid(f"sha256 is 64 lower-case hexadecimal digits, got {first.header.sha256[:80]!r}")
    if first.header.num_bytes == 0:
        raise invalid("num_bytes says how long the file is, got 0")
    if first.header.num_bytes > max_bytes:
        raise out_of_range(f"this service takes files of at most {max_bytes} bytes, got {first.header.num_bytes}")
    return first.header


def _append(message: pb.UploadRequest, incoming: Incoming, header: pb.UploadHeader) -> None:
    if message.WhichOneof("part") != "chunk" or not message.chunk:
        raise invalid("after the header an upload has chunks, none of them empty")
    if incoming.num_bytes + len(message.chunk) > header.num_bytes:
        raise out_of_range(f"more bytes came than the {header.num_bytes} announced")
    incoming.write(message.chunk)


def _lost(what: str) -> RefusalError:
    return RefusalError(grpc.StatusCode.DATA_LOSS, f"{what}; nothing was kept, send the file again")


def paced(messages: Iterable[Item], idle_seconds: float) -> Generator[Item]:
    """Yield `messages` as they come; DEADLINE_EXCEEDED where the next is not there within `idle_seconds`.

    A thread reads ahead, as gRPC's own iterator waits for ever for a client that has fallen silent.
    """
    ahead: queue.Queue[object] = queue.Queue(2)
    gone = threading.Event()

    def put(item: object) -> bool:
        while not gone.is_set():
            with contextlib.suppress(queue.Full):
                ahead.put(item, timeout=0.2)
                return True
        return False

    def read() -> None:
        try:
            for message in messages:
                if not put(message):
                    return
            put(_END)
        except Exception as error:  # gRPC raises a bare one when the client is gone
            put(error)

    threading.Thread(target=read, name="certify-upload", daemon=True).start()
    try:
        while True:
            try:
                item = ahead.get(timeout=idle_seconds)
            except queue.Empty:
                message = f"nothing came for {idle_seconds:g} seconds; send the file again"
                raise RefusalError(grpc.StatusCode.DEADLINE_EXCEEDED, message) from None
            if item is _END:
                return
            if isinstance(item, RefusalError):
                raise item
            if isinstance(item, Exception):
                raise RefusalError(grpc.StatusCode.CANCELLED, "the upload was broken off; nothing was kept") from item
            yield item  # type: ignore[misc]
    finally:
        gone.set()
