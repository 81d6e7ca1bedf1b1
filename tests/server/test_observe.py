"""Metrics, JSON logs and event files follow a run, change none of its numbers, and are gone when it ends."""

import dataclasses
import importlib.util
import io
import json
import logging
import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from flwr.common import log
from flwr.supercore.logger import ConsoleHandler
from prometheus_client.parser import text_string_to_metric_families

from hawthorn.engines import in_process
from server.observe import KINDS, Observers, RunMetrics, drop_kind
from server.record import RoundRecord, read_run
from tasks.config import RunConfig
from tasks.errors import ConfigError


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def fetch(port: int) -> dict[str, float]:
    """Return the metrics at a port: name with labels -> value."""
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {s.name + "".join(f"|{v}" for v in s.labels.values()): s.value for s in samples}


def test_a_run_shows_its_rounds_while_it_goes_on_and_its_numbers_stay(config: RunConfig) -> None:
    plain = config.replace(name="plain", malicious_clients="1", attack="corrupt_reply(kinds=('nan',))")
    in_process.run(plain)
    port, seen = free_port(), []
    watched = plain.replace(name="watched", metrics_port=port, log_format="json")
    in_process.run(watched, lambda record: seen.append(fetch(port)))
    last, record = seen[-1], read_run(watched.run_folder)
    assert [found["hawthorn_run_round"] for found in seen] == [1, 2, 3]
    assert last["hawthorn_run_rounds_total|taken"] == 3
    assert last["hawthorn_run_replies_total|used"] == sum(len(r.clients) for r in record.rounds) == 15
    assert last["hawthorn_run_replies_total|not finite"] == 3
    assert last["hawthorn_run_rate|acc"] == record.rounds[-1].acc
    assert last["hawthorn_run_phase_seconds_count|train"] == 3
    assert record.facts["sha256"] == read_run(plain.run_folder).facts["sha256"]
    with pytest.raises(urllib.error.URLError):
        fetch(port)


def test_a_port_that_is_taken_costs_the_metrics_and_not_the_run(config: RunConfig) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        observers = Observers(config.replace(metrics_port=held.getsockname()[1]))
    assert observers.port is None
    observers.close()


def test_what_was_opened_is_closed_where_a_part_fails(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def fail(_: RunConfig) -> None:
        raise ConfigError("no event files here")

    monkeypatch.setattr("server.observe.EventFiles", fail)
    with pytest.raises(ConfigError, match="no event files"):
        Observers(config.replace(metrics_port=port, tensorboard=True))
    again = Observers(config.replace(metrics_port=port))
    assert again.port == port
    again.close()


def test_every_line_of_a_json_log_has_run_and_round(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    stream, logger = io.StringIO(), logging.getLogger("flwr")
    handler = ConsoleHandler(stream=stream)  # Flower's own, which asks no formatter
    monkeypatch.setattr(logger, "handlers", [handler])
    before = logger.level
    logger.setLevel(logging.INFO)  # not the attribute: what other tests found disabled is remembered
    changes = {"log_format": "json", "malicious_clients": "2", "attack": "corrupt_reply(kinds=('nan',))"}
    try:
        in_process.run(config.replace(**changes), lambda record: log(logging.INFO, "over: %d", record.round))
    finally:
        logger.setLevel(before)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    dropped = [line for line in lines if "dropped" in line["event"]]
    assert {line["run"] for line in lines} == {"test"}
    assert [line["round"] for line in dropped] == [1, 2, 3]
    assert {line["level"] for line in dropped} == {"warning"}
    assert [line["round"] for line in lines if "over" in line["event"]] == [1, 2, 3]
    assert handler.format(logging.makeLogRecord({"msg": "as before", "levelname": "INFO"})).endswith("as before")
    assert "format" not in vars(handler)
    assert not handler.filters


def test_reasons_become_kinds_and_foreign_text_no_label(config: RunConfig) -> None:
    reasons = {
        "no reply within 5 s": "late",
        "error 8: <script>": "error",
        "values are not finite": "not finite",
        "update norm 1e9 is above max-update-norm 1e6": "norm",
        "w has shape (4,), wanted (5,)": "form",
        "something of tomorrow": "other",
    }
    assert {reason: drop_kind(reason) for reason in reasons} == reasons
    metrics = RunMetrics(config)
    record = RoundRecord(1, None, None, 0.1, [0], [], [], [], {}, None, [], 0.0, 1.0, "all dropped", "")
    for number in range(50):
        metrics.add(dataclasses.replace(record, dropped={"0": f"evil {number}"}))
    labels = {s.labels["outcome"] for f in metrics.registry.collect() if "replies" in f.name for s in f.samples}
    assert labels <= {*KINDS, "used", "other"}
    assert metrics.registry.get_sample_value("hawthorn_run_rounds_total", {"outcome": "skipped"}) == 50


def test_tensorboard_is_written_or_refused(config: RunConfig) -> None:
    config = config.replace(tensorboard=True)
    if importlib.util.find_spec("tensorboard") is None:
        with pytest.raises(ConfigError, match=r"pip install 'hawthorn\[tensorboard\]'"):
            in_process.run(config)
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    in_process.run(config)
    events = EventAccumulator(str(Path(config.run_folder) / "tensorboard"))
    events.Reload()
    written = {event.step: event.value for event in events.Scalars("rate/acc")}
    assert written == pytest.approx({r.round: r.acc for r in read_run(config.run_folder).rounds}, abs=1e-6)
