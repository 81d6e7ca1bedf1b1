"""Starting, running and ending the certification service.

SIGTERM or SIGINT drains it: health turns NOT_SERVING, new work is refused with UNAVAILABLE, what runs is finished for
up to the grace period, and what is not finished by then saves its progress.
"""

import contextlib
import logging
import signal
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from certify.crfl.certificates import BrokenAssumption
from certify.service import auth
from certify.service import certify_pb2_grpc as rpc
from certify.service.engine import Engine
from certify.service.interceptors import BearerToken, Few, Readable
from certify.service.limits import Limits
from certify.service.log import log_to
from certify.service.metrics import Metrics
from certify.service.queue import WorkQueue
from certify.service.server import Servicer
from certify.service.store import Store
from certify.service.wire import SERVICE
from tasks.errors import ConfigError

MAX_MESSAGE = 4 * 2**20
_SPARE_THREADS = 8  # for health checks and questions about the service
_log = logging.getLogger("hawthorn.certify")


class RunningService:
    """A started service: its bound ports, and how it ends."""

    def __init__(self, server: grpc.Server, servicer: Servicer, health_servicer: health.HealthServicer) -> None:
        self._server, self.servicer, self._health = server, servicer, health_servicer
        self.port = 0
        self.metrics_port: int | None = None
        self.on_close: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._closing = threading.Lock()

    @property
    def queue(self) -> WorkQueue:
        return self.servicer.queue

    @property
    def store(self) -> Path:
        return self.servicer.store.folder

    def metrics_value(self, name: str, **labels: str) -> float:
        """Return the value of one metric; 0 where nothing was counted yet."""
        return self.servicer.metrics.registry.get_sample_value(name, labels) or 0.0

    def close(self, grace: float = 30.0) -> bool:
        """Drain for up to `grace` seconds and end; True where all running work was finished."""
        with self._closing:
            if self._closed.is_set():
                return True
            _log.info("draining", extra={"fields": {"grace": grace, "running": self.queue.num_running}})
            self._health.enter_graceful_shutdown()
            finished = self.queue.close(grace)
            self._server.stop(5.0).wait()  # answers on their way still leave
            self.on_close()
            self._closed.set()
            _log.info("stopped", extra={"fields": {"finished": finished}})
            return finished

    def __enter__(self) -> "RunningService":
        return self

    def __exit__(self, *_: object) -> None:
        self.close(grace=0.0)


def choose_device(device: str) -> torch.device:
    """Return the device of a name; "auto" is CUDA where there is one. `ConfigError` for one that cannot be used."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(name)
        torch.zeros(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"the device {device!r} cannot be used ({reason}); there are: auto, cpu, cuda") from None
    if chosen.type == "meta":
        raise ConfigError("the device 'meta' computes nothing; there are: auto, cpu, cuda")
    return chosen


def start(
    *, store: Path | str, host: str = "127.0.0.1", port: int = 0, device: str = "auto", token: str | None = None,
    tls_cert: Path | None = None, tls_key: Path | None = None, tls_client_ca: Path | None = None,
    insecure: bool = False, metrics_port: int | None = None, limits: Limits | None = None,
) -> RunningService:  # fmt: skip
    """Start a service in this process and return it once it listens; port 0 takes a free one."""
    limits = Limits() if limits is None else limits
    token = auth.check_token(token)
    credentials = auth.server_credentials(tls_cert, tls_key, tls_client_ca)
    auth.check_exposure(
        host, tls=credentials is not None, token=token, insecure=insecure, client_ca=tls_client_ca is not None
    )
    chosen = choose_device(device)
    metrics = Metrics()
    with contextlib.ExitStack() as opened:  # what is open is closed again where a later step fails
        folder = Store(Path(store), max_bytes=limits.max_store_bytes, max_result_bytes=limits.max_result_bytes)
        opened.callback(folder.close)
        server = _grpc_server(limits, metrics, token)
        bound = _bind(server, host, port, credentials)
        bound_metrics = None
        if metrics_port is not None:
            bound_metrics, close = _serve_metrics(metrics, host, metrics_port)
            opened.callback(close)
        queue = WorkQueue(size=limits.queue_size, workers=limits.workers)
        servicer = Servicer(folder, Engine(folder, chosen, limits, metrics), queue, limits, metrics)
        opened.callback(servicer.stalled.close)
        running = RunningService(server, servicer, _add_services(server, servicer))
        running.port, running.metrics_port = bound, bound_metrics
        metrics.watch("queue_waiting", "Work that waits", lambda: queue.num_waiting)
        metrics.watch("queue_size", "Work that may wait", lambda: limits.queue_size)
        metrics.watch("running", "Work that runs", lambda: queue.num_running)
        metrics.watch("store_bytes", "Bytes of the store", folder.num_bytes)
        server.start()
        running.on_close = opened.pop_all().close
    return running


def serve(
    *, host: str = "127.0.0.1", port: int = 50051, device: str = "auto", store: Path | str = "certify-store",
    token: str | None = None, tls_cert: Path | None = None, tls_key: Path | None = None,
    tls_client_ca: Path | None = None, insecure: bool = False, metrics_port: int | None = None,
    queue_size: int = 32, workers: int = 1, max_model_bytes: int = 2**30, max_set_bytes: int = 2**30,
    max_store_bytes: int = 20 * 2**30, max_result_bytes: int = 5 * 2**30, max_points: int = 100_000,
    max_draws: int = 1_000_000, max_operations: int = 10**17, max_batch_bytes: int = 8 * 2**30,
    memory_bytes: int | None = None, idle_seconds: float = 60.0, save_seconds: float = 5.0,
    grace: float = 30.0, log_level: str = "INFO",
) -> bool:  # fmt: skip
    """Serve until SIGTERM or SIGINT, then drain; prints a line with the bound port once requests are answered.

    Returns whether all running work was finished. A second signal ends the draining at once.
    """
    log_to(level=log_level)
    warnings.simplefilter("ignore", BrokenAssumption)  # it stands in the certificate, which is who it is for
    limits = Limits(
        queue_size=queue_size, workers=workers, max_model_bytes=max_model_bytes, max_set_bytes=max_set_bytes,
        max_store_bytes=max_store_bytes, max_result_bytes=max_result_bytes, max_points=max_points,
        max_draws=max_draws, max_operations=max_operations, max_batch_bytes=max_batch_bytes,
        memory_bytes=memory_bytes, idle_seconds=idle_seconds, save_seconds=save_seconds,
    )  # fmt: skip
    stop = threading.Event()
    previous = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        running = start(
            store=store, host=host, port=port, device=device, token=token, tls_cert=tls_cert, tls_key=tls_key,
            tls_client_ca=tls_client_ca, insecure=insecure, metrics_port=metrics_port, limits=limits,
        )  # fmt: skip
        scheme = "grpcs" if tls_cert is not None else "grpc"
        place = f"[{host}]" if ":" in host else host
        extra = "" if running.metrics_port is None else f" metrics=http://{place}:{running.metrics_port}/metrics"
        print(f"hawthorn certify: ready on {scheme}://{place}:{running.port}{extra}", flush=True)
        stop.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)
        return running.close(grace)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _grpc_server(limits: Limits, metrics: Metrics, token: str | None) -> grpc.Server:
    def refused(method: str) -> None:
        metrics.requests.labels(method.rsplit("/", 1)[-1], "UNAUTHENTICATED").inc()
        _log.warning("unauthenticated", extra={"fields": {"method": method}})

    return grpc.server(
        ThreadPoolExecutor(limits.max_streams + _SPARE_THREADS, thread_name_prefix="certify-rpc"),
        interceptors=[
            *([] if token is None else [BearerToken(token, refused)]),
            Readable(),
            Few(_SPARE_THREADS // 2),
        ],
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE),
            ("grpc.max_send_message_length", MAX_MESSAGE),
            ("grpc.so_reuseport", 0),  # two services on one port would each get some of the requests
            ("grpc.keepalive_time_ms", 30_000),  # a client whose network is gone is noticed, and its work stopped
            ("grpc.keepalive_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
            ("grpc.max_metadata_size", 16 * 1024),
        ],
    )


def _bind(server: grpc.Server, host: str, port: int, credentials: grpc.ServerCredentials | None) -> int:
    if not 0 <= port < 2**16:  # gRPC would take it modulo 65536
        raise ConfigError(f"a port is from 0 (a free one) to 65535, got {port}")
    address = f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except (RuntimeError, ValueError):
        hint = "is the port taken, or the certificate not that of the key?" if credentials else "is the port taken?"
        raise ConfigError(f"cannot listen on {address}: {hint} Port 0 takes a free one") from None


def _serve_metrics(metrics: Metrics, host: str, port: int) -> tuple[int, Callable[[], None]]:
    if not 0 <= port < 2**16:
        raise ConfigError(f"a port is from 0 (a free one) to 65535, got {port}")
    try:
        return metrics.serve(host, port)
    except OSError as error:
        raise ConfigError(f"cannot serve metrics on {host}:{port}: {error.strerror}; port 0 takes a free one") from None


def _add_services(server: grpc.Server, servicer: Servicer) -> health.HealthServicer:
    """Add the service, health checks ("" and by name) and reflection."""
    rpc.add_CertifyServiceServicer_to_server(servicer, server)
    health_servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    for name in ("", SERVICE):
        health_servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return health_servicer
