"""The servicer: reads requests, asks the engine, streams answers; every error leaves with the code it deserves.

One thread answers one request. Those with work or an upload are counted, so that a few threads stay free for health
checks and questions about the service whatever the load.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import grpc

from certify.service import certify_pb2 as pb
from certify.service import certify_pb2_grpc as rpc
from certify.service import uploads, wire
from certify.service.engine import Engine, Question
from certify.service.interceptors import readable
from certify.service.limits import Limits
from certify.service.metrics import Metrics
from certify.service.queue import CLOSED, ClosedError, QueueFullError, Ticket, WorkQueue
from certify.service.stalled import Stalled
from certify.service.status import status_of
from certify.service.store import Incoming, Store

VERSION = "1"
_log = logging.getLogger("hawthorn.certify")


def answers(method: Callable[..., Any]) -> Callable[..., Any]:
    """Answer one request with one message; whatever `method` raises becomes a status code."""

    @functools.wraps(method)
    def answer(self: "Servicer", request: Any, context: grpc.ServicerContext) -> Any:
        with self.observed(method.__name__, context) as outcome:
            try:
                return method(self, readable(request), context)
            except Exception as error:
                outcome.append(status_of(error))
        context.abort(*outcome[0])

    return answer


def streams(method: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """Answer one request with a stream; whatever `method` raises becomes a status code."""

    @functools.wraps(method)
    def stream(self: "Servicer", request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        with self.observed(method.__name__, context) as outcome:
            try:
                yield from self.stalled.watched(method(self, readable(request), context), context)
                return
            except Exception as error:
                outcome.append(status_of(error))
        context.abort(*outcome[0])

    return stream


class Servicer(rpc.CertifyServiceServicer):
    """Hawthorn's certification service."""

    def __init__(self, store: Store, engine: Engine, queue: WorkQueue, limits: Limits, metrics: Metrics) -> None:
        self.store, self.engine, self.queue, self.limits, self.metrics = store, engine, queue, limits, metrics
        self._streams = threading.BoundedSemaphore(limits.max_streams)
        self.stalled = Stalled(limits.idle_seconds)
        self._lock = threading.Lock()
        self._uploads: dict[str, int] = {}  # on their way, by the caller's address
        self._checks = threading.BoundedSemaphore(2)  # uploads being checked, each of which fills memory

    @contextlib.contextmanager
    def observed(self, method: str, context: grpc.ServicerContext) -> Iterator[list[tuple[grpc.StatusCode, str]]]:
        """Count, time and log one request."""
        start, outcome = time.monotonic(), []
        self.metrics.in_flight.inc()
        try:
            yield outcome
        except GeneratorExit:  # gRPC drops the stream of a client that is gone
            outcome.append((grpc.StatusCode.CANCELLED, "the client is gone"))
            raise
        finally:
            seconds = time.monotonic() - start
            code, message = outcome[0] if outcome else (grpc.StatusCode.OK, "")
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(method, code.name).inc()
            self.metrics.seconds.labels(method).observe(seconds)
            fields = {"method": method, "peer": context.peer(), "code": code.name, "seconds": round(seconds, 4)}
            _log.info("request", extra={"fields": fields | ({"message": message} if message else {})})

    @contextlib.contextmanager
    def uploading(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Take one of the caller's places for uploads, so that none can take all places of all callers."""
        caller = context.peer().rsplit(":", 1)[0]  # the address without its port
        with self._lock:
            if self._uploads.get(caller, 0) >= self.limits.max_uploads:
                raise QueueFullError(
                    f"{self.limits.max_uploads} uploads from {caller} are on their way already; try again later"
                )
            self._uploads[caller] = self._uploads.get(caller, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._uploads[caller] -= 1
                if not self._uploads[caller]:
                    del self._uploads[caller]

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Take one of the places for requests that last; there is none in a service that is shutting down."""
        if self.queue.closed:
            raise ClosedError(CLOSED)
        if not self._streams.acquire(blocking=False):
            raise QueueFullError(f"{self.limits.max_streams} requests are being answered already; try again later")
        try:
            yield
        finally:
            self._streams.release()

    @answers
    def GetServiceInfo(self, request: pb.GetServiceInfoRequest, context: grpc.ServicerContext) -> pb.ServiceInfo:
        limits = self.limits
        if self.queue.closed:
            raise ClosedError(CLOSED)
        return pb.ServiceInfo(
            version=VERSION,
            device=str(self.engine.device),
            max_model_bytes=limits.max_model_bytes,
            max_set_bytes=limits.max_set_bytes,
            max_points=limits.max_points,
            max_draws=limits.max_draws,
            queue_size=limits.queue_size,
            workers=limits.workers,
        )

    @answers
    def UploadModel(self, request: Iterable[pb.UploadRequest], context: grpc.ServicerContext) -> pb.ModelInfo:
        def check(incoming: Incoming) -> None:
            with self._checks:
                self.engine.learn_model(incoming.sha256(), wire.read_model(incoming.path))

        with self.counted(), self.uploading(context):
            sha256 = uploads.receive(
                map(readable, request), self.store, "models", max_bytes=self.limits.max_model_bytes, check=check,
                idle_seconds=self.limits.idle_seconds, received=self.metrics.received.inc,
            )  # fmt: skip
            return self.engine.model_info(sha256)

    @answers
    def UploadCertificationSet(
        self, request: Iterable[pb.UploadRequest], context: grpc.ServicerContext
    ) -> pb.CertificationSetInfo:
        def check(incoming: Incoming) -> None:
            with self._checks:
                wire.read_set(incoming.path, max_points=self.limits.max_points)

        with self.counted(), self.uploading(context):
            sha256 = uploads.receive(
                map(readable, request), self.store, "sets", max_bytes=self.limits.max_set_bytes, check=check,
                idle_seconds=self.limits.idle_seconds, received=self.metrics.received.inc,
            )  # fmt: skip
            return self.engine.set_info(sha256)

    @answers
    def GetModel(self, request: pb.GetModelRequest, context: grpc.ServicerContext) -> pb.ModelInfo:
        return self.engine.model_info(request.model)

    @answers
    def GetCertificationSet(
        self, request: pb.GetCertificationSetRequest, context: grpc.ServicerContext
    ) -> pb.CertificationSetInfo:
        return self.engine.set_info(request.set)

    @streams
    def CertifySmoothing(
        self, request: pb.CertifySmoothingRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CertifySmoothingResponse]:
        with self.counted():
            question = self.engine.smoothing(request)
            content = yield from self._work(question, context, pb.CertifySmoothingResponse)
            yield from _result(content, pb.CertifySmoothingResponse)

    @streams
    def CheckZonotope(
        self, request: pb.CheckZonotopeRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.CheckZonotopeResponse]:
        with self.counted():
            question = self.engine.zonotope(request)
            content = yield from self._work(question, context, pb.CheckZonotopeResponse)
            yield from _result(content, pb.CheckZonotopeResponse)

    @streams
    def Gate(self, request: pb.GateRequest, context: grpc.ServicerContext) -> Iterator[pb.GateResponse]:
        with self.counted():
            decide = self.engine.deciding(request)  # read before anything is measured: a wrong policy costs nothing
            question = self.engine.gate(request)
            content = yield from self._work(question, context, pb.GateResponse)
            yield pb.GateResponse(decision=decide(content))

    def _work(self, question: Question, context: grpc.ServicerContext, response: Any) -> Any:
        """Yield what happens until the answer is there and return it; stops the work where the client is gone."""
        if (content := self.store.read("results", question.key)) is not None:
            self.metrics.cached.inc()
            yield response(accepted=pb.Accepted(request_sha256=question.key, cached=True))
            return content
        ticket = self.queue.submit(question.key, question.work)
        try:
            if not context.add_callback(ticket.leave):
                ticket.leave()
            yield response(accepted=pb.Accepted(request_sha256=question.key, waiting=ticket.ahead))
            yield from _progress(ticket, response)
            return ticket.result()
        finally:
            ticket.leave()


def _progress(ticket: Ticket, response: Any) -> Iterator[Any]:
    for tick in ticket.follow():
        yield response(progress=pb.Progress(done=tick.done, total=tick.total, phase=tick.phase))


def _result(content: bytes, response: Any) -> Iterator[Any]:
    """Yield a result: its arrays in parts, then the rest."""
    arrays, text = wire.unpack(content)
    for part in wire.parts(arrays):
        yield response(array=part)
    yield response(summary=pb.Summary(json=text, result_sha256=wire.result_sha256(arrays, text)))
