"""The service against the local library: the same results bit for bit, for many clients, after restarts."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import Tensor, nn

from certify.bounds import crfl_top_two, two_stage
from certify.crfl.certificates import BrokenAssumption, certify_crfl
from certify.crfl.evidence import Evidence
from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.gate import HARDENED, GateState, decide
from certify.network import Network
from certify.service.client import CertifyClient, ServiceError
from certify.service.limits import Limits
from certify.service.measure import GateSettings, measure
from certify.service.queue import Tick
from certify.service.serve import RunningService, start
from certify.service.wire import SERVICE
from certify.smoothing.sampled import count_votes
from certify.smoothing.votes import Votes
from certify.zonotope import ZonotopeResult, check

ROOT = Path(__file__).parents[2]
SETTINGS = GateSettings(eps=(0.01, 0.05), attack_eps=0.1, attack_steps=5)
LONG: dict[str, Any] = {"sigma": 0.1, "num_draws": 1_000_000, "seed": 3}  # far longer than any test waits


def linear(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network.from_module(nn.Sequential(nn.Flatten(), nn.Linear(36, 10)), (1, 6, 6))


def convolutional(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [nn.Conv2d(1, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10)]
        return Network.from_module(nn.Sequential(*layers), (1, 6, 6))


def points(number: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.rand(number, 1, 6, 6, generator=source), torch.randint(0, 10, (number,), generator=source)


def same_votes(first: Votes, second: Votes) -> bool:
    same = first.plan == second.plan and first.num_draws == second.num_draws
    return same and first.counts.dtype == second.counts.dtype and np.array_equal(first.counts, second.counts)


def same_bounds(first: ZonotopeResult, second: ZonotopeResult) -> bool:
    pairs = [(getattr(first, field.name), getattr(second, field.name)) for field in fields(ZonotopeResult)]
    return all(
        a.dtype == b.dtype and torch.equal(a, b) if isinstance(a, Tensor) else type(a) is type(b) and a == b
        for a, b in pairs
    )


@pytest.fixture
def service(tmp_path: Path) -> Iterator[RunningService]:
    with start(store=tmp_path / "store", device="cpu", limits=Limits(save_seconds=0.05)) as running:
        yield running


@pytest.fixture
def client(service: RunningService) -> Iterator[CertifyClient]:
    with CertifyClient(f"127.0.0.1:{service.port}", attempts=1, timeout=60.0) as connected:
        yield connected


# ---- round trips


@pytest.mark.parametrize("network", [linear(), convolutional()], ids=["linear", "convolutional"])
def test_votes_are_those_of_the_local_library(client: CertifyClient, network: Network) -> None:
    asked: dict[str, Any] = {"sigma": 0.2, "num_draws": 300, "seed": 7}
    assert same_votes(client.count_votes(network, points()[0], **asked), count_votes(network, points()[0], **asked))
    other = client.count_votes(network, points()[0], **asked, stream="other")
    assert same_votes(other, count_votes(network, points()[0], **asked, stream="other"))


@pytest.mark.parametrize("method", ["zonotope", "crown", "interval", "best"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_are_those_of_the_local_library(client: CertifyClient, method: Any, dtype: str) -> None:
    network, (inputs, labels) = convolutional(), points()
    local = check(network, inputs, labels, eps=0.03, method=method, dtype=getattr(torch, dtype))
    assert same_bounds(client.check(network, inputs, labels, eps=0.03, method=method, dtype=dtype), local)


def test_empty_method_and_type_are_the_librarys_own(client: CertifyClient) -> None:
    network, (inputs, labels) = convolutional(), points()
    wide = {"eps": 0.1, "input_range": (-1.0, 2.0)}
    assert same_bounds(client.check(network, inputs, labels, **wide), check(network, inputs, labels, **wide))


def test_a_float64_model_stays_one(client: CertifyClient) -> None:
    network, (inputs, labels) = convolutional().to(dtype=torch.float64), points()
    asked: dict[str, Any] = {"sigma": 0.2, "num_draws": 50, "seed": 7}
    assert same_votes(
        client.count_votes(network, inputs.double(), **asked), count_votes(network, inputs.double(), **asked)
    )
    assert same_bounds(client.check(network, inputs, labels, eps=0.1), check(network, inputs, labels, eps=0.1))


def record(rate: float = 1e-3) -> TrainingRecord:
    work = RoundWork(participants=(0, 1), weights=(0.5, 0.5), learning_rates=(rate,) * 2, clip_norm=3.0, noise=0.1)
    local = tuple(
        ClientWork(
            client=c, weight=0.5, learning_rate=rate, batch_sizes=(10,) * 3, poisoned=(1 - c,) * 3, scale=2.0 - c
        )
        for c in (0, 1)
    )  # fmt: skip
    return TrainingRecord(
        model="logistic_regression()", bias=True, num_classes=10, num_params=370, num_clients=2, rounds=(work,) * 3,
        smoothing_sigma=0.1, attack_round=2, attackers=(0,), work=local, label_flips=False, data_norm_bound=6.0,
        data_norm_found=5.0, start_norm=2.0,
    )  # fmt: skip


def test_certificates_are_those_of_the_local_library(client: CertifyClient) -> None:
    network, (inputs, _) = linear(), points()
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 400, "seed": 1}
    votes, found = client.certify(network, inputs, record(), **asked, alpha=0.01, selection_draws=50, num_points=20)
    chosen = count_votes(network, inputs, **(asked | {"num_draws": 50}), stream="votes/selection")
    local = count_votes(network, inputs, **asked)
    bounds = two_stage(chosen.counts, local.counts, 400, 0.01, num_points=20)
    assert same_votes(votes, local)
    assert found == certify_crfl(record(), Evidence.from_votes(local, bounds))
    assert any(certificate.radius > 0 for certificate in found)


@pytest.mark.filterwarnings("ignore::certify.crfl.certificates.BrokenAssumption")
def test_the_papers_certificate_travels_with_what_is_broken(client: CertifyClient) -> None:
    network, (inputs, _) = linear(), points()
    kinds: dict[str, Any] = {"certificate": "paper", "level": "client", "change_norm": 0.1}
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 400, "seed": 1}
    votes, found = client.certify(network, inputs, record(), **asked, **kinds, alpha=0.01, bounds="crfl_top_two")
    local = Evidence.from_votes(votes, crfl_top_two(votes.counts, 400, 0.01), network=network)
    with pytest.warns(BrokenAssumption):
        assert found == certify_crfl(record(), local, **kinds)
    assert all(certificate.violated for certificate in found)


def test_a_sound_certificate_of_unsound_training_is_refused(client: CertifyClient) -> None:
    with pytest.raises(ServiceError, match="step_size") as refused:
        client.certify(linear(), points()[0], record(rate=10.0), sigma=0.1, num_draws=50, seed=1, alpha=0.01)
    assert refused.value.code == "FAILED_PRECONDITION"


def test_a_record_of_another_model_is_refused(client: CertifyClient) -> None:
    with pytest.raises(ServiceError, match="the record is of a model") as refused:
        client.certify(convolutional(), points()[0], record(), sigma=0.1, num_draws=50, seed=1, alpha=0.01)
    assert refused.value.code == "INVALID_ARGUMENT"


def test_a_defect_is_logged_under_a_number_and_not_told(
    service: RunningService, client: CertifyClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ValueError("a detail of the inside")

    monkeypatch.setattr(service.servicer.engine, "zonotope", broken)
    with pytest.raises(ServiceError, match="incident") as told:
        client.check(linear(), *points(), eps=0.1)
    assert told.value.code == "INTERNAL"
    assert "detail" not in str(told.value)
    assert "a detail of the inside" in caplog.text


def test_the_gate_decides_as_it_does_locally_round_after_round(client: CertifyClient) -> None:
    validation, certification = points(40, 1), points(10, 2)
    state = local = GateState()
    for seed in range(3):
        decision = client.gate(convolutional(seed), validation, certification, SETTINGS, state=state)
        measured = measure(convolutional(seed), validation, certification, SETTINGS)
        assert decision == decide(measured, local, HARDENED)
        state, local = decision.state, decision.state


def test_the_probes_and_the_policy_are_as_asked(client: CertifyClient) -> None:
    plain = GateSettings(eps=(0.05,), attack_eps=0.1, attack_steps=2, probes=False)
    data = points(10, 1), points(10, 2)
    first = client.gate(linear(), *data, plain, state=GateState(), policy="paper", options={"loss_share": 0.5})
    assert first.metrics.margin_pgd_accuracy is first.metrics.bounds[0].relative_margin is None
    with pytest.raises(ServiceError, match="loss_share") as refused:
        client.gate(linear(), *data, plain, state=GateState(), options={"loss_share": -1})
    assert refused.value.code == "INVALID_ARGUMENT"
    with pytest.raises(ServiceError, match="empty state") as refused:
        client.gate(linear(), *data, SETTINGS, state=first.state)
    assert refused.value.code == "INVALID_ARGUMENT"


def test_progress_ends_where_the_work_does(client: CertifyClient) -> None:
    seen: list[Tick] = []
    client.count_votes(linear(), points()[0], sigma=0.1, num_draws=20_000, seed=1, on_progress=seen.append)
    assert seen
    assert all(a.done < b.done for a, b in itertools.pairwise(seen))
    assert {tick.total for tick in seen} == {20_000}


# ---- many at a time


def test_eight_clients_on_one_model_get_what_one_gets(service: RunningService) -> None:
    network, (inputs, labels) = convolutional(), points()
    local = {seed: count_votes(network, inputs, sigma=0.1, num_draws=300, seed=seed) for seed in range(4)}
    bounds = check(network, inputs, labels, eps=0.05)

    def ask(number: int) -> bool:
        with CertifyClient(f"127.0.0.1:{service.port}", timeout=60.0) as client:
            votes = client.count_votes(network, inputs, sigma=0.1, num_draws=300, seed=number % 4)
            return same_votes(votes, local[number % 4]) and same_bounds(
                client.check(network, inputs, labels, eps=0.05), bounds
            )

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_the_same_question_at_a_time_is_worked_out_once(service: RunningService, client: CertifyClient) -> None:
    network, seen = linear(), list[list[Tick]]([[], []])  # made once: drawn in two threads it would be two models

    def ask(ticks: list[Tick]) -> Votes:
        return client.count_votes(network, points()[0], sigma=0.1, num_draws=50_000, seed=1, on_progress=ticks.append)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(ask, seen)
    assert same_votes(first, second)
    assert service.metrics_value("hawthorn_certify_work_seconds_count", kind="smoothing") == 1


# ---- what is kept


def test_a_finished_result_outlives_the_service(tmp_path: Path) -> None:
    network, (inputs, labels) = convolutional(), points()
    for cached in (False, True):
        with start(store=tmp_path, device="cpu") as service, CertifyClient(f"127.0.0.1:{service.port}") as client:
            votes = client.count_votes(network, inputs, sigma=0.1, num_draws=100, seed=1)
            bounds = client.check(network, inputs, labels, eps=0.05)
            assert service.metrics_value("hawthorn_certify_cached_total") == 2 * cached
        assert same_votes(votes, count_votes(network, inputs, sigma=0.1, num_draws=100, seed=1))
        assert same_bounds(bounds, check(network, inputs, labels, eps=0.05))


def test_a_result_that_rotted_is_worked_out_anew(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 100, "seed": 1}
    with start(store=tmp_path, device="cpu") as service, CertifyClient(f"127.0.0.1:{service.port}") as client:
        client.count_votes(linear(), points()[0], **asked)
        (kept,) = (tmp_path / "results").iterdir()
        content = bytearray(kept.read_bytes())
        content[-3] ^= 1
        kept.write_bytes(content)
        assert same_votes(
            client.count_votes(linear(), points()[0], **asked), count_votes(linear(), points()[0], **asked)
        )
        assert service.metrics_value("hawthorn_certify_cached_total") == 0


def test_interrupted_smoothing_goes_on_where_it_was(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 20_000, "seed": 1}

    class Enough(Exception):
        pass

    def some(tick: Tick) -> None:
        if tick.done >= 3_000:
            raise Enough

    limits = Limits(save_seconds=0.01)
    with start(store=tmp_path, device="cpu", limits=limits) as service:
        with CertifyClient(f"127.0.0.1:{service.port}") as client, pytest.raises(Enough):
            client.count_votes(linear(), points()[0], **asked, on_progress=some)
        wait_until(lambda: service.queue.num_running == 0)
    seen: list[Tick] = []
    with (
        start(store=tmp_path, device="cpu", limits=limits) as service,
        CertifyClient(f"127.0.0.1:{service.port}") as client,
    ):
        votes = client.count_votes(linear(), points()[0], **asked, on_progress=seen.append)
        assert service.metrics_value("hawthorn_certify_resumed_total") == 1
    assert seen[0].done > 3_000
    assert same_votes(votes, count_votes(linear(), points()[0], **asked))
    assert not list((tmp_path / "progress").iterdir())


def wait_until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- as a process


def serving(store: Path, **settings: Any) -> "tuple[subprocess.Popen[str], int, str]":
    """Start a service as a process of its own; returns it, its port and its ready line."""
    given = settings | {"port": 0, "store": str(store), "device": "cpu"}
    code = f"import sys; from certify.service.serve import serve; sys.exit(not serve(**{given!r}))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"ready on grpc://127\.0\.0\.1:(\d+)", line)
    if found is None:
        process.kill()
        raise AssertionError(f"no ready line but {line!r}: {process.communicate()[1]}")
    return process, int(found[1]), line


@pytest.mark.slow
def test_a_killed_service_goes_on_after_its_restart_and_ends_when_told(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 30_000, "seed": 5}
    process, port, _ = serving(tmp_path, save_seconds=0.05)

    def kill(tick: Tick) -> None:
        if tick.done > 5_000:
            process.kill()

    with CertifyClient(f"127.0.0.1:{port}", attempts=1, timeout=60.0) as client, pytest.raises(ServiceError) as lost:
        client.count_votes(linear(), points()[0], **asked, on_progress=kill)
    assert lost.value.code == "UNAVAILABLE"
    process.communicate()
    process, port, line = serving(tmp_path, metrics_port=0)
    try:
        seen: list[Tick] = []
        with CertifyClient(f"127.0.0.1:{port}", timeout=60.0) as client:
            votes = client.count_votes(linear(), points()[0], **asked, on_progress=seen.append)
            with urllib.request.urlopen(line.split("metrics=")[1].strip(), timeout=5) as answer:
                text = answer.read().decode()
        assert "hawthorn_certify_resumed_total 1.0" in text
        assert 'hawthorn_certify_requests_total{code="OK",method="CertifySmoothing"} 1.0' in text
        assert not seen or seen[0].done > 128
        assert same_votes(votes, count_votes(linear(), points()[0], **asked))
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=60)
        assert process.returncode == 0
        events = [json.loads(entry) for entry in log.splitlines()]
        assert {"resumed", "request", "draining", "stopped"} <= {entry["event"] for entry in events}
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()


# ---- draining


def test_draining_finishes_what_runs_and_refuses_the_rest(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sigma": 0.1, "num_draws": 30_000, "seed": 1}
    with (
        start(store=tmp_path, device="cpu") as service,
        CertifyClient(f"127.0.0.1:{service.port}", attempts=1) as client,
    ):
        started = threading.Event()
        with ThreadPoolExecutor(3) as pool, grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            assert client.healthy()
            named = health_pb2.HealthCheckRequest(service=SERVICE)
            assert health.Check(named).status == health_pb2.HealthCheckResponse.SERVING
            running = pool.submit(
                client.count_votes, linear(), points()[0], **asked, on_progress=lambda _: started.set()
            )
            assert started.wait(60)
            waiting = pool.submit(client.count_votes, linear(), points()[0], **LONG)
            wait_until(lambda: service.queue.num_waiting == 1)
            closing = pool.submit(service.close, 60.0)
            with pytest.raises(ServiceError, match="shutting down") as refused:
                waiting.result(60)
            assert refused.value.code == "UNAVAILABLE"
            assert health.Check(named).status == health_pb2.HealthCheckResponse.NOT_SERVING
            assert not client.healthy()
            for ask in (
                lambda: client.count_votes(linear(), points()[0], **(LONG | {"seed": 9})),
                lambda: client.upload_model(convolutional()),
                client.info,
            ):
                with pytest.raises(ServiceError, match="shutting down") as refused:
                    ask()
                assert refused.value.code == "UNAVAILABLE"
            assert same_votes(running.result(60), count_votes(linear(), points()[0], **asked))
            assert closing.result(60) is True


def test_what_the_grace_period_does_not_suffice_for_is_saved(tmp_path: Path) -> None:
    with (
        start(store=tmp_path, device="cpu") as service,
        CertifyClient(f"127.0.0.1:{service.port}", attempts=1) as client,
    ):
        started = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(
                client.count_votes, linear(), points()[0], **LONG, on_progress=lambda _: started.set()
            )
            assert started.wait(60)
            assert service.close(grace=0.1) is False
            with pytest.raises(ServiceError, match="shutting down"):
                running.result(60)
    assert len(list((tmp_path / "progress").iterdir())) == 1


# ---- the standard services beside it


def test_the_generated_code_is_that_of_the_proto(tmp_path: Path) -> None:
    protoc = pytest.importorskip("grpc_tools.protoc", reason="grpcio-tools writes the code anew")
    out = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    assert protoc.main(["protoc", f"-I{ROOT}", *out, "certify/service/certify.proto"]) == 0
    for name in ("certify_pb2.py", "certify_pb2.pyi", "certify_pb2_grpc.py"):
        written = (tmp_path / "certify" / "service" / name).read_text("utf-8")
        assert written == (ROOT / "certify" / "service" / name).read_text("utf-8"), "run scripts/protos"


def test_reflection_lists_the_service(service: RunningService) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]))
    assert SERVICE in {entry.name for entry in answer.list_services_response.service}
    assert SERVICE == "hawthorn.certify.v1.CertifyService"


def test_the_service_says_what_it_allows(client: CertifyClient) -> None:
    info = client.info()
    assert (info.device, info.queue_size, info.workers) == ("cpu", 32, 1)
