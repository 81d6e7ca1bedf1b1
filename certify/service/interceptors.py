"""What stands before the servicer: the token, bytes that are no message, and streams that would take every thread."""

import hashlib
import hmac
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from certify.service.status import invalid
from certify.service.wire import SERVICE

# Asked by orchestrators that hold no secret; says nothing but whether the service serves.
OPEN = "/grpc.health.v1.Health/"
REFUSAL = 'this service wants the metadata entry "authorization: Bearer <token>"'


class BearerToken(grpc.ServerInterceptor):
    """Answers UNAUTHENTICATED to every request without the token, but for health checks."""

    def __init__(self, token: str, refused: Callable[[str], None] = lambda method: None) -> None:
        self._wanted = _digest(f"Bearer {token}".encode())
        self._refused = refused

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(OPEN) or self._allowed(handler_call_details.invocation_metadata):
            return handler
        self._refused(method)
        return _refusing(handler)

    def _allowed(self, metadata: Any) -> bool:
        given = [entry.value for entry in metadata or () if entry.key == "authorization"]
        if len(given) != 1:
            return False
        value = given[0] if isinstance(given[0], bytes) else given[0].encode("utf-8", "surrogateescape")
        return hmac.compare_digest(_digest(value), self._wanted)  # digests: neither length nor content shows in time


def _digest(value: bytes) -> bytes:
    return hashlib.sha256(value).digest()


def _same_kind(handler: Any, behave: Any, read: Any) -> Any:
    """Return a handler with other behaviour and reader that streams where `handler` does."""
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    return make(behave, read, handler.response_serializer)


def _refusing(handler: Any) -> Any:
    """Return a handler of the same kind that refuses before anything of the request is read."""

    def refuse(_: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNAUTHENTICATED, REFUSAL)

    return _same_kind(handler, refuse, None)


class Unreadable:
    """Stands where bytes came that are no message of the wanted kind."""


class Readable(grpc.ServerInterceptor):
    """Lets the servicer answer bytes that are no message; gRPC itself would call them a defect of the service."""

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or f"/{SERVICE}/" not in handler_call_details.method:
            return handler
        read = handler.request_deserializer

        def lenient(content: bytes) -> Any:
            try:
                return read(content)
            except Exception:
                return Unreadable()

        return _same_kind(handler, handler.unary_unary or handler.unary_stream or handler.stream_unary, lenient)


class Few(grpc.ServerInterceptor):
    """Lets a few streams of other services (reflection) be open at a time, as each holds a thread until it ends."""

    def __init__(self, number: int) -> None:
        self._places = threading.BoundedSemaphore(number)

    def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        handler = continuation(handler_call_details)
        if handler is None or handler.stream_stream is None:
            return handler

        def counted(messages: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            if not self._places.acquire(blocking=False):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many such streams are open; try again later")
            try:
                yield from handler.stream_stream(messages, context)
            finally:
                self._places.release()

        return _same_kind(handler, counted, handler.request_deserializer)


def readable(message: Any) -> Any:
    """Return a message; refuse what stands for bytes that are none."""
    if isinstance(message, Unreadable):
        raise invalid(f"the bytes that came are no message of {SERVICE}; generate the code anew from its .proto")
    return message
