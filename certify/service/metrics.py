"""What the service counts, in Prometheus' text format; with an HTTP port of its own where asked for."""

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.005, 0.02, 0.1, 0.5, 1, 5, 20, 60, 300, 1200, 3600)


class Metrics:
    """Counters of one service, in a registry of their own, so that two services in one process stay apart."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self.registry}
        name = "hawthorn_certify"
        self.requests = Counter(f"{name}_requests", "Finished requests", ["method", "code"], **kwargs)
        self.in_flight = Gauge(f"{name}_in_flight", "Requests being answered", **kwargs)
        self.seconds = Histogram(f"{name}_request_seconds", "Time to answer", ["method"], buckets=_SECONDS, **kwargs)
        self.work_seconds = Histogram(f"{name}_work_seconds", "Time of work", ["kind"], buckets=_SECONDS, **kwargs)
        self.stopped = Counter(f"{name}_stopped", "Work given up as nobody waited for it", **kwargs)
        self.cached = Counter(f"{name}_cached", "Questions answered from finished results", **kwargs)
        self.resumed = Counter(f"{name}_resumed", "Work taken up from saved progress", **kwargs)
        self.received = Counter(f"{name}_received_bytes", "Bytes of uploads", **kwargs)

    def watch(self, name: str, documentation: str, read: Callable[[], float]) -> None:
        """Report what `read` returns whenever the metrics are read."""
        Gauge(f"hawthorn_certify_{name}", documentation, registry=self.registry).set_function(read)

    def serve(self, host: str, port: int) -> tuple[int, Callable[[], None]]:
        """Serve the metrics at http://host:port/metrics; returns the bound port and what ends it."""
        server, thread = start_http_server(port, addr=host, registry=self.registry)

        def close() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5.0)

        return server.server_port, close
