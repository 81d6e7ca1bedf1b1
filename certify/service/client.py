"""The service's client: the functions of the local library, worked out elsewhere, with the same results.

Models and sets go over once and again when the service has lost them; a service that is away or full is asked again
after a pause that doubles and is drawn at random, so that many clients do not come back at the same moment. Asking
again never costs work twice: the service knows a question by its hash.
"""

import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from torch import Tensor

from certify.crfl.training_record import TrainingRecord
from certify.gate import GateDecision, GateState
from certify.network import Network
from certify.record import Certificate
from certify.service import auth, messages, wire, work
from certify.service import certify_pb2 as pb
from certify.service import certify_pb2_grpc as rpc
from certify.service.measure import GateSettings
from certify.service.queue import Tick
from certify.smoothing.votes import Votes
from certify.zonotope import ZonotopeResult
from tasks.errors import ConfigError, DataError, HawthornError

_AGAIN = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_MAX_PAUSE = 20.0
Answer = TypeVar("Answer")
OnProgress = Callable[[Tick], None]


class ServiceError(HawthornError):
    """The service refused or could not be reached; `code` is the name of gRPC's status code."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class CertifyClient:
    """A connection to a certification service; use it in a `with` block. Methods block and may be called by threads.

    `timeout` is of one whole call in seconds, attempts and pauses included; None waits for ever. What `on_progress`
    raises ends the call, and the service stops the work.
    """

    def __init__(
        self, address: str = "127.0.0.1:50051", *, token: str | None = None, tls: bool = False,
        tls_ca: Path | None = None, tls_cert: Path | None = None, tls_key: Path | None = None,
        timeout: float | None = None, attempts: int = 6, first_pause: float = 0.25,
    ) -> None:  # fmt: skip
        if attempts < 1:
            raise ConfigError(f"attempts must be 1 or more, got {attempts}")
        self.address, self.timeout, self.attempts, self.first_pause = address, timeout, attempts, first_pause
        options: list[tuple[str, Any]] = [
            ("grpc.max_receive_message_length", 4 * 2**20),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.enable_retries", 0),  # retried here, where an upload can be sent again as well
        ]
        secure = tls or tls_ca is not None or tls_cert is not None
        if auth.is_loopback(_host(address)):
            options.append(("grpc.enable_http_proxy", 0))  # a proxy would take a token off this machine
        if token is not None and not secure and not auth.is_loopback(_host(address)):
            raise ConfigError(f"the token would go to {address} in the clear: give tls=True or tls_ca")
        if secure:
            credentials = auth.channel_credentials(tls_ca, tls_cert, tls_key)
            self._channel = grpc.secure_channel(address, credentials, options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._metadata = () if token is None else (("authorization", f"Bearer {auth.check_token(token)}"),)
        self._stub = rpc.CertifyServiceStub(self._channel)
        self._pause = random.SystemRandom()  # not of an experiment: two clients must not draw alike

    def close(self) -> None:
        """Close the connection; calls under way end."""
        self._channel.close()

    def __enter__(self) -> "CertifyClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def info(self, *, timeout: float | None = None) -> pb.ServiceInfo:
        """Return what the service runs on and what it allows."""
        request = pb.GetServiceInfoRequest()
        return self._call(lambda rest: self._unary(self._stub.GetServiceInfo, request, rest), timeout)

    def healthy(self, *, timeout: float = 5.0) -> bool:
        """Return whether the service is there and takes new work; asked once, and without a token."""
        stub: Any = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=wire.SERVICE), timeout=timeout)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def upload_model(self, network: Network, *, timeout: float | None = None) -> str:
        """Send a model unless the service has it; returns its id."""
        return self._upload(self._stub.UploadModel, wire.model_file(network), timeout)

    def upload_set(self, inputs: Tensor, labels: Tensor, *, timeout: float | None = None) -> str:
        """Send a certification set unless the service has it; returns its id."""
        return self._upload(self._stub.UploadCertificationSet, wire.set_file(inputs, labels), timeout)

    def count_votes(
        self, network: Network, inputs: Tensor, *, sigma: float, num_draws: int, seed: int, stream: str = "votes",
        on_progress: OnProgress | None = None, timeout: float | None = None,
    ) -> Votes:  # fmt: skip
        """Return what `certify.smoothing.sampled.count_votes` returns for the same arguments."""
        files = [(self._stub.UploadModel, wire.model_file(network))]
        files.append((self._stub.UploadCertificationSet, wire.set_file(inputs, _no_labels(inputs))))
        model, points = (_sha256(content) for _, content in files)
        request = _message(
            pb.CertifySmoothingRequest, model=model, set=points, sigma=sigma, num_draws=num_draws, seed=seed,
            stream=stream,
        )  # fmt: skip

        def ask(rest: float | None) -> Votes:
            return work.read_votes(*self._result(self._stub.CertifySmoothing, request, on_progress, rest))

        return self._call(ask, timeout, files)

    def certify(
        self, network: Network, inputs: Tensor, record: TrainingRecord, *, sigma: float, num_draws: int, seed: int,
        alpha: float, bounds: str = "two_stage", selection_draws: int = 100, interval: str = "", num_points: int = 1,
        certificate: str = "sound", level: str = "feature", form: str = "", change_norm: float | None = None,
        stream: str = "votes", on_progress: OnProgress | None = None, timeout: float | None = None,
    ) -> tuple[Votes, list[Certificate]]:  # fmt: skip
        """Return votes and what `certify_crfl` makes of their bounds; selection draws are of "<stream>/selection"."""
        files = [(self._stub.UploadModel, wire.model_file(network))]
        files.append((self._stub.UploadCertificationSet, wire.set_file(inputs, _no_labels(inputs))))
        model, points = (_sha256(content) for _, content in files)
        claim = _message(
            pb.Claim, training_record=record.to_json(), certificate=certificate, level=level, form=form,
            change_norm=change_norm, bounds=bounds, interval=interval, alpha=alpha, num_points=num_points,
            selection_draws=selection_draws if bounds == "two_stage" else 0,
        )  # fmt: skip
        request = _message(
            pb.CertifySmoothingRequest, model=model, set=points, sigma=sigma, num_draws=num_draws, seed=seed,
            stream=stream, claim=claim,
        )  # fmt: skip

        def ask(rest: float | None) -> tuple[Votes, list[Certificate]]:
            arrays, fields = self._result(self._stub.CertifySmoothing, request, on_progress, rest)
            return work.read_votes(arrays, fields), work.read_certificates(arrays)

        return self._call(ask, timeout, files)

    def check(
        self, network: Network, inputs: Tensor, labels: Tensor, *, eps: float, method: str = "", dtype: str = "",
        input_range: tuple[float, float] = (0.0, 1.0), on_progress: OnProgress | None = None,
        timeout: float | None = None,
    ) -> ZonotopeResult:  # fmt: skip
        """Return what `certify.zonotope.check` returns for the same arguments; an empty one is the default."""
        files = [(self._stub.UploadModel, wire.model_file(network))]
        files.append((self._stub.UploadCertificationSet, wire.set_file(inputs, labels)))
        model, points = (_sha256(content) for _, content in files)
        request = _message(
            pb.CheckZonotopeRequest, model=model, set=points, eps=eps, method=method, dtype=dtype,
            input_range=pb.InputRange(low=input_range[0], high=input_range[1]),
        )  # fmt: skip

        def ask(rest: float | None) -> ZonotopeResult:
            return work.read_zonotope(*self._result(self._stub.CheckZonotope, request, on_progress, rest))

        return self._call(ask, timeout, files)

    def gate(
        self, network: Network, validation: tuple[Tensor, Tensor], certification: tuple[Tensor, Tensor],
        settings: GateSettings, *, state: GateState, policy: str = "hardened", options: dict[str, Any] | None = None,
        on_progress: OnProgress | None = None, timeout: float | None = None,
    ) -> GateDecision:  # fmt: skip
        """Measure a candidate and decide on it as `certify.gate.decide` does; the decision has the next state."""
        files = [(self._stub.UploadModel, wire.model_file(network))]
        files += [(self._stub.UploadCertificationSet, wire.set_file(*points)) for points in (validation, certification)]
        model, validation_id, certification_id = (_sha256(content) for _, content in files)
        request = _message(
            pb.GateRequest, model=model, validation_set=validation_id, certification_set=certification_id,
            eps=settings.eps, attack_eps=settings.attack_eps, attack_steps=settings.attack_steps,
            attack_step_size=settings.attack_step_size or 0.0, temperature=settings.temperature, seed=settings.seed,
            probes=settings.probes, state=messages.write_state(state),
            input_range=pb.InputRange(low=settings.input_range[0], high=settings.input_range[1]),
            policy=pb.GatePolicy(name=policy, options=json.dumps(options or {})),
        )  # fmt: skip

        def ask(rest: float | None) -> GateDecision:
            last = None
            for response in self._events(self._stub.Gate, request, on_progress, rest):
                last = response
            if last is None or last.WhichOneof("event") != "decision":
                raise DataError("the answer of the service ended before its decision; ask again")
            return messages.decision(last.decision)

        return self._call(ask, timeout, files)

    def _upload(self, method: Any, content: bytes, timeout: float | None) -> str:
        return self._call(lambda rest: self._send(method, content, rest), timeout)

    def _send(self, method: Any, content: bytes, rest: float | None) -> str:
        def requests() -> Iterator[pb.UploadRequest]:
            yield pb.UploadRequest(header=pb.UploadHeader(sha256=_sha256(content), num_bytes=len(content)))
            view = memoryview(content)
            for start in range(0, len(content), wire.CHUNK):
                yield pb.UploadRequest(chunk=bytes(view[start : start + wire.CHUNK]))

        return method(requests(), timeout=rest, metadata=self._metadata).id

    def _unary(self, method: Any, request: Any, rest: float | None) -> Any:
        return method(request, timeout=rest, metadata=self._metadata)

    def _events(self, method: Any, request: Any, on_progress: OnProgress | None, rest: float | None) -> Iterator[Any]:
        """Yield what a stream says beyond progress; ends the request whenever the caller stops listening."""
        call = method(request, timeout=rest, metadata=self._metadata)
        try:
            for response in call:
                if response.WhichOneof("event") == "progress":
                    if on_progress is not None:
                        progress = response.progress
                        on_progress(Tick(progress.done, progress.total, progress.phase))
                else:
                    yield response
        finally:
            call.cancel()  # does nothing where the stream ended by itself

    def _result(
        self, method: Any, request: Any, on_progress: OnProgress | None, rest: float | None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return arrays and fields of a result after comparing them with the hash that the service sent."""
        assembly, last = wire.Assembly(), None
        for last in self._events(method, request, on_progress, rest):
            if last.WhichOneof("event") == "array":
                assembly.add(last.array)
        if last is None or last.WhichOneof("event") != "summary":
            raise DataError("the answer of the service ended before its summary; ask again")
        arrays, text = assembly.arrays(), last.summary.json
        if wire.result_sha256(arrays, text) != last.summary.result_sha256:
            raise DataError("the result that arrived is not the one that was sent; ask again")
        return arrays, wire.read_fields(text)

    def _call(
        self, ask: Callable[[float | None], Answer], timeout: float | None, files: list[tuple[Any, bytes]] | None = None
    ) -> Answer:
        """Ask until there is an answer, uploading `files` when the service misses one; raises `ServiceError`."""
        timeout = self.timeout if timeout is None else timeout
        end = None if timeout is None else time.monotonic() + timeout
        pause, failed, sent = self.first_pause, 0, 0
        while True:
            try:
                if sent:
                    for method, content in files or ():
                        self._send(method, content, _rest(end))
                return ask(_rest(end))
            except grpc.RpcError as error:
                code, message = error.code(), error.details() or ""  # type: ignore[attr-defined]
            if code is grpc.StatusCode.NOT_FOUND and files and sent < 3:
                sent += 1
                continue
            failed += 1
            wait = self._pause.uniform(pause / 2, pause)
            late = end is not None and time.monotonic() + wait >= end
            if code not in _AGAIN or failed >= self.attempts or late:
                raise ServiceError(code.name, message)
            time.sleep(wait)
            pause = min(2 * pause, _MAX_PAUSE)


def _rest(end: float | None) -> float | None:
    return None if end is None else max(0.001, end - time.monotonic())


def _message(kind: Any, **fields: Any) -> Any:
    """Return a message; `ConfigError` for a value that its field cannot hold."""
    try:
        return kind(**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ConfigError(f"the request cannot be written: {error}") from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _host(address: str) -> str:
    """Return the host of an address such as 127.0.0.1:50051, [::1]:50051 or dns:///name:50051."""
    place = address.rsplit("///", 1)[-1] if "///" in address else address
    if place.startswith(("unix:", "unix-abstract:")):
        return place
    place = place.removeprefix("dns:").removeprefix("ipv4:").removeprefix("ipv6:")
    return place.rsplit(":", 1)[0] if place.count(":") == 1 or place.startswith("[") else place


def _no_labels(inputs: Tensor) -> Tensor:
    """Return labels for points that are only to be voted on."""
    return inputs.new_zeros(len(inputs)).long()
