"""Watching a run from outside: Prometheus metrics, log lines that machines read, TensorBoard's event files.

Settings: `metrics-port`, `log-format = "json"`, `tensorboard`. All of it follows the record and changes no number of a
run; a port that is taken is logged and left out, but a missing TensorBoard is refused at the start.
"""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable
from logging import INFO, WARNING
from typing import Any

from flwr.common import log
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from certify.service.log import JsonLines
from server.record import RoundRecord
from tasks.config import RunConfig
from tasks.errors import ConfigError

HOST_VARIABLE = "HAWTHORN_METRICS_HOST"  # where metrics are served; default: this machine alone
SECONDS = (0.05, 0.2, 1, 5, 20, 60, 300, 1200)
# Why a reply was dropped, by words of the reason. The reason itself may hold foreign text, which is no label.
KINDS = {
    "late": ("no reply within",),
    "error": ("error ", "empty reply"),
    "not finite": ("not finite",),
    "norm": ("update norm",),
    "claim": ("claim",),
    "form": ("array names", "has shape", "has dtype", "serialised", "carries", "cannot be read", "holds", "no arrays"),
}


class Observers:
    """What follows a run's rounds from the `first` on; `close` ends it."""

    def __init__(self, config: RunConfig, first: int = 1) -> None:
        self._opened = contextlib.ExitStack()
        self.port: int | None = None
        self._followers: list[Callable[[RoundRecord], None]] = []
        self._context = context = RunContext(config.name, first)
        with self._opened:  # closes what was opened if a later part fails
            self._opened.enter_context(json_logs(context) if config.log_format == "json" else contextlib.nullcontext())
            if config.metrics_port:
                metrics = RunMetrics(config)
                self.port = self._serve(metrics.registry, config.metrics_port)
                self._followers.append(metrics.add)
            if config.tensorboard:
                events = EventFiles(config)
                self._opened.callback(events.close)
                self._followers.append(events.add)
            self._opened = self._opened.pop_all()

    def follow(self, on_round: Callable[[RoundRecord], None] | None) -> Callable[[RoundRecord], None]:
        """Return what is to be called after each round: everything here, then `on_round`."""

        def followed(record: RoundRecord) -> None:
            for follower in self._followers:
                follower(record)
            if on_round is not None:
                on_round(record)
            self._context.add(record)  # last: what is said of a round before is said in it

        return followed

    def close(self) -> None:
        """Stop serving and close files."""
        self._opened.close()

    def _serve(self, registry: CollectorRegistry, port: int) -> int | None:
        host = os.environ.get(HOST_VARIABLE, "127.0.0.1")
        try:
            server, thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            log(WARNING, "no metrics at %s:%d: %s; the run goes on without", host, port, error.strerror)
            return None

        def end() -> None:
            server.shutdown()
            server.server_close()
            thread.join(5.0)

        self._opened.callback(end)
        log(INFO, "metrics: http://%s:%d/metrics", host, server.server_port)
        return server.server_port


class RunMetrics:
    """A run's counters, in a registry of their own: two runs in one process stay apart."""

    def __init__(self, config: RunConfig) -> None:
        self.registry = CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self.registry}
        about = Gauge("hawthorn_run_info", "The run that these metrics are of", ["run", "rule", "dataset"], **kwargs)
        about.labels(config.name, config.rule, config.dataset).set(1)
        Gauge("hawthorn_run_num_rounds", "Rounds that the run will have", **kwargs).set(config.num_rounds)
        self.round = Gauge("hawthorn_run_round", "Last finished round", **kwargs)
        self.rounds = Counter("hawthorn_run_rounds", "Finished rounds", ["outcome"], **kwargs)
        self.seconds = Histogram("hawthorn_run_phase_seconds", "Time of a phase", ["phase"], buckets=SECONDS, **kwargs)
        self.rates = Gauge("hawthorn_run_rate", "ACC and ASR of the last evaluation", ["rate"], **kwargs)
        self.replies = Counter("hawthorn_run_replies", "Replies, used or dropped and why", ["outcome"], **kwargs)
        self.norm = Gauge("hawthorn_run_norm", "l2 norms of the last round", ["of"], **kwargs)
        self.sampled = Gauge("hawthorn_run_sampled", "Clients asked in the last round", **kwargs)
        self.rounds.labels("taken")
        self.rounds.labels("skipped")

    def add(self, record: RoundRecord) -> None:
        """Count one round."""
        self.round.set(record.round)
        self.rounds.labels("taken" if record.skipped is None else "skipped").inc()
        for phase in ("train", "aggregate", "evaluate"):
            self.seconds.labels(phase).observe(getattr(record, f"seconds_{phase}"))
        for rate, value in (("acc", record.acc), ("asr", record.asr)):
            if value is not None:
                self.rates.labels(rate).set(value)
        self.replies.labels("used").inc(len(record.clients))
        for reason in record.dropped.values():
            self.replies.labels(drop_kind(reason)).inc()
        self.norm.labels("aggregate").set(record.aggregate_norm)
        self.norm.labels("model").set(record.model_norm)
        self.norm.labels("largest update").set(max(record.norms, default=0.0))
        self.sampled.set(len(record.sampled))


def drop_kind(reason: str) -> str:
    """Return the kind of a drop's reason, one of `KINDS` or "other"."""
    return next((kind for kind, words in KINDS.items() if any(word in reason for word in words)), "other")


class EventFiles:
    """TensorBoard's event files of a run, in ``tensorboard/`` of its folder."""

    def __init__(self, config: RunConfig) -> None:
        if importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "tensorboard = true wants TensorBoard: pip install 'hawthorn[tensorboard]', or set it false"
            )
        from torch.utils.tensorboard.writer import SummaryWriter

        self._writer = SummaryWriter(str(config.run_folder / "tensorboard"), flush_secs=10)
        self._writer.add_text(
            "settings", "\n".join(f"    {key} = {value!r}" for key, value in config.settings().items())
        )

    def add(self, record: RoundRecord) -> None:
        """Write one round's numbers."""
        values = {"rate/acc": record.acc, "rate/asr": record.asr, "loss": record.loss}
        values |= {"norm/aggregate": record.aggregate_norm, "norm/model": record.model_norm}
        values |= {"replies/used": len(record.clients), "replies/dropped": len(record.dropped)}
        values |= {"skipped": float(record.skipped is not None)}
        values |= {
            f"seconds/{phase}": getattr(record, f"seconds_{phase}") for phase in ("train", "aggregate", "evaluate")
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add_scalar(name, value, record.round)

    def close(self) -> None:
        """Write what is not written yet."""
        self._writer.close()


class RunContext(logging.Filter):
    """Gives every log line the run it belongs to and the round that is under way."""

    def __init__(self, run: str, first: int) -> None:
        super().__init__()
        self.run, self.round = run, first

    def add(self, record: RoundRecord) -> None:
        """A round is finished: the next one is under way."""
        self.round = record.round + 1

    def filter(self, record: logging.LogRecord) -> bool:
        """Add the fields that `JsonLines` writes."""
        record.fields = {"run": self.run, "round": self.round, **getattr(record, "fields", {})}
        return True


@contextlib.contextmanager
def json_logs(context: RunContext) -> Any:
    """Write Flower's log, which the server's is part of, as one JSON object per line until the block ends.

    Flower's own handler has a `format` that asks no formatter; one of the instance's takes its place.
    """
    handlers = list(logging.getLogger("flwr").handlers)
    for handler in handlers:
        handler.format = JsonLines().format  # type: ignore[method-assign]
        handler.addFilter(context)
    try:
        yield
    finally:
        for handler in handlers:
            del handler.format
            handler.removeFilter(context)
