"""The service when something is wrong: an upload, a request, a token, a client that goes, the disk, the load."""

import hashlib
import itertools
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import grpc
import pytest
import safetensors.numpy
import torch
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from torch import Tensor, nn

from certify.gate import GateState
from certify.network import Network
from certify.service import certify_pb2 as pb
from certify.service import certify_pb2_grpc as rpc
from certify.service import wire
from certify.service.auth import check_exposure, is_loopback
from certify.service.client import CertifyClient, ServiceError
from certify.service.limits import Limits
from certify.service.measure import GateSettings
from certify.service.queue import Tick
from certify.service.serve import RunningService, choose_device, start
from certify.service.status import status_of
from certify.service.store import Store, StoreFullError
from certify.smoothing.sampled import count_votes
from tasks.errors import ConfigError

LONG: dict[str, Any] = {"sigma": 0.1, "num_draws": 10_000_000}  # minutes: far longer than any test waits
TOKEN = "a-token-of-many-letters"
LIMITS = Limits(
    queue_size=2, max_model_bytes=10_000_000, max_set_bytes=10_000_000, max_points=1000, idle_seconds=0.5,
    save_seconds=0.05, max_draws=10_000_000,
)  # fmt: skip


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network.from_module(nn.Sequential(nn.Flatten(), nn.Linear(36, 10)), (1, 6, 6))


def points(number: int = 10) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    return torch.rand(number, 1, 6, 6, generator=source), torch.randint(0, 10, (number,), generator=source)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with start(store=tmp_path_factory.mktemp("store"), device="cpu", limits=LIMITS) as running:
        yield running


@pytest.fixture
def stub(service: RunningService) -> Iterator[rpc.CertifyServiceStub]:
    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        yield rpc.CertifyServiceStub(channel)


@pytest.fixture
def client(service: RunningService) -> Iterator[CertifyClient]:
    with CertifyClient(f"127.0.0.1:{service.port}", attempts=1, timeout=60.0) as connected:
        yield connected


def code_of(call: Any) -> str:
    """Return the status code with which a call ends, and that its message says something."""
    with pytest.raises(grpc.RpcError) as refused:
        list(call) if isinstance(call, Iterable) else call()
    assert refused.value.details()  # type: ignore[attr-defined]
    return refused.value.code().name  # type: ignore[attr-defined]


def wait_until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


# ---- uploads


def header(content: bytes, **changed: Any) -> pb.UploadRequest:
    told = {"sha256": hashlib.sha256(content).hexdigest(), "num_bytes": len(content)} | changed
    return pb.UploadRequest(header=pb.UploadHeader(**told))


def chunk(content: bytes) -> pb.UploadRequest:
    return pb.UploadRequest(chunk=content)


MODEL = wire.model_file(network())
UPLOADS: dict[str, tuple[str, list[pb.UploadRequest]]] = {
    "nothing": ("INVALID_ARGUMENT", []),
    "no header": ("INVALID_ARGUMENT", [chunk(MODEL)]),
    "an empty message": ("INVALID_ARGUMENT", [pb.UploadRequest()]),
    "no hash": ("INVALID_ARGUMENT", [header(MODEL, sha256=""), chunk(MODEL)]),
    "a hash that is a path": ("INVALID_ARGUMENT", [header(MODEL, sha256="../" * 21 + "x"), chunk(MODEL)]),
    "an upper-case hash": ("INVALID_ARGUMENT", [header(MODEL, sha256="A" * 64), chunk(MODEL)]),
    "no size": ("INVALID_ARGUMENT", [header(MODEL, num_bytes=0), chunk(MODEL)]),
    "too large": ("OUT_OF_RANGE", [header(MODEL, num_bytes=10_000_001), chunk(MODEL)]),
    "absurdly large": ("OUT_OF_RANGE", [header(MODEL, num_bytes=2**64 - 1), chunk(MODEL)]),
    "more than announced": ("OUT_OF_RANGE", [header(MODEL, num_bytes=10), chunk(MODEL)]),
    "truncated": ("DATA_LOSS", [header(MODEL), chunk(MODEL[:-1])]),
    "another hash": ("DATA_LOSS", [header(MODEL, sha256="0" * 64), chunk(MODEL)]),
    "two headers": ("INVALID_ARGUMENT", [header(MODEL + b"1"), header(MODEL + b"1"), chunk(MODEL)]),
    "an empty chunk": ("INVALID_ARGUMENT", [header(MODEL + b"2"), chunk(b""), chunk(MODEL)]),
}


@pytest.mark.parametrize("name", UPLOADS)
def test_an_upload_that_is_not_as_announced_is_refused_and_nothing_kept(
    name: str, stub: rpc.CertifyServiceStub, service: RunningService
) -> None:
    code, messages = UPLOADS[name]
    assert code_of(lambda: stub.UploadModel(iter(messages))) == code
    assert not list((service.store / "incoming").iterdir())
    assert not (service.store / "models" / ("0" * 64)).exists()


def file_of(tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> bytes:
    return safetensors.numpy.save({name: tensor.numpy() for name, tensor in tensors.items()}, metadata)


def described(**changed: Any) -> dict[str, str]:
    known = {"architecture": network().architecture(), "input_shape": [1, 6, 6]} | changed
    return {wire.NETWORK: json.dumps(known)}


TENSORS = {name: tensor.clone() for name, tensor in network().tensors().items()}
NAMES = list(TENSORS)
BAD_MODELS = {
    "noise": bytes(range(256)) * 4,
    "one byte": b"\0",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins\x94.",
    "a header beyond the end": (2**20).to_bytes(8, "little") + b"{}",
    "a header of absurd length": (2**63).to_bytes(8, "little") + b"{}",
    "a header that is not JSON": (4).to_bytes(8, "little") + b"{{{{",
    "a header nested deeply": (200_000).to_bytes(8, "little") + b"[" * 200_000,
    "bytes after the end": MODEL + b"x",
    "no layers": file_of(TENSORS),
    "layers that are no JSON": file_of(TENSORS, {wire.NETWORK: "["}),
    "layers nested deeply": file_of(TENSORS, {wire.NETWORK: "[" * 100_000}),
    "layers that are no object": file_of(TENSORS, {wire.NETWORK: "3"}),
    "another shape": file_of(TENSORS, described(input_shape=[1, 6, 7])),
    "an absurd shape": file_of(TENSORS, described(input_shape=[2**40])),
    "an unknown layer": file_of(TENSORS, described(architecture=[{"kind": "__import__('os')"}])),
    "a missing tensor": file_of({NAMES[0]: TENSORS[NAMES[0]]}, described()),
    "a tensor too many": file_of({**TENSORS, "extra": torch.zeros(1)}, described()),
    "NaN": file_of({**TENSORS, NAMES[0]: TENSORS[NAMES[0]] * torch.nan}, described()),
    "whole numbers": file_of({name: tensor.long() for name, tensor in TENSORS.items()}, described()),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_file_that_is_no_model_is_refused(name: str, stub: rpc.CertifyServiceStub, service: RunningService) -> None:
    content = BAD_MODELS[name]
    assert code_of(lambda: stub.UploadModel(iter([header(content), chunk(content)]))) == "INVALID_ARGUMENT"
    assert not (service.store / "models" / hashlib.sha256(content).hexdigest()).exists()


INPUTS, LABELS = points()
BAD_SETS = {
    "a model": MODEL,
    "no labels": file_of({"inputs": INPUTS}),
    "flat inputs": file_of({"inputs": INPUTS.reshape(-1), "labels": LABELS}),
    "whole inputs": file_of({"inputs": INPUTS.long(), "labels": LABELS}),
    "labels of another length": file_of({"inputs": INPUTS, "labels": LABELS[1:]}),
    "labels of another type": file_of({"inputs": INPUTS, "labels": LABELS.float()}),
    "negative labels": file_of({"inputs": INPUTS, "labels": LABELS - 10}),
    "no points": file_of({"inputs": INPUTS[:0], "labels": LABELS[:0]}),
    "too many points": file_of({"inputs": torch.zeros(1001, 2), "labels": torch.zeros(1001).long()}),
    "infinity": file_of({"inputs": INPUTS + torch.inf, "labels": LABELS}),
}


@pytest.mark.parametrize("name", BAD_SETS)
def test_a_file_that_is_no_certification_set_is_refused(name: str, stub: rpc.CertifyServiceStub) -> None:
    content = BAD_SETS[name]
    call = stub.UploadCertificationSet
    assert code_of(lambda: call(iter([header(content), chunk(content)]))) == "INVALID_ARGUMENT"


def test_what_is_there_already_is_not_sent_again(stub: rpc.CertifyServiceStub, client: CertifyClient) -> None:
    model = client.upload_model(network())
    first = stub.GetModel(pb.GetModelRequest(model=model))
    assert stub.UploadModel(iter([header(MODEL)])) == first  # the header alone
    assert (first.id, first.network_sha256) == (hashlib.sha256(MODEL).hexdigest(), network().sha256())
    assert list(first.input_shape) == [1, 6, 6]
    assert client.upload_model(network()) == model


def test_an_upload_that_falls_silent_is_given_up(stub: rpc.CertifyServiceStub, service: RunningService) -> None:
    def messages() -> Iterator[pb.UploadRequest]:
        yield header(MODEL + b"3")
        yield chunk(MODEL)
        time.sleep(3)

    assert code_of(lambda: stub.UploadModel(messages())) == "DEADLINE_EXCEEDED"  # not DATA_LOSS, as at its end
    wait_until(lambda: not list((service.store / "incoming").iterdir()))


def test_a_client_that_goes_away_in_an_upload_leaves_nothing(service: RunningService) -> None:
    sent = threading.Event()

    def messages() -> Iterator[pb.UploadRequest]:
        yield header(MODEL + b"4")
        yield chunk(MODEL)
        sent.set()
        time.sleep(0.3)

    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        call = rpc.CertifyServiceStub(channel).UploadModel.future(messages())
        assert sent.wait(60)
        call.cancel()
    wait_until(lambda: not list((service.store / "incoming").iterdir()))


@pytest.mark.slow
def test_two_hundred_megabytes_arrive_whole(tmp_path: Path) -> None:
    shape = {"architecture": [{"kind": "linear", "weight": "w"}], "input_shape": [1_000_000]}
    content = file_of({"w": torch.ones(50, 1_000_000)}, {wire.NETWORK: json.dumps(shape)})
    chunks = (chunk(content[place : place + wire.CHUNK]) for place in range(0, len(content), wire.CHUNK))
    with (
        start(store=tmp_path, device="cpu", limits=Limits(max_model_bytes=2**28)) as service,
        grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        info = rpc.CertifyServiceStub(channel).UploadModel(itertools.chain([header(content)], chunks))
        assert (tmp_path / "models" / info.id).read_bytes() == content
    assert info.num_params == 50_000_000


def test_the_least_used_upload_makes_room_and_comes_again_when_asked_for(tmp_path: Path) -> None:
    limits = Limits(max_store_bytes=4 * len(MODEL))  # the set takes the fourth place
    with (
        start(store=tmp_path, device="cpu", limits=limits) as service,
        CertifyClient(f"127.0.0.1:{service.port}", timeout=60.0) as client,
    ):
        for seed in range(4):
            votes = client.count_votes(network(seed), points()[0], sigma=0.1, num_draws=10, seed=1)
        assert len(list((tmp_path / "models").iterdir())) < 4
        again = client.count_votes(network(0), points()[0], sigma=0.1, num_draws=20, seed=1)
    assert (votes.counts == count_votes(network(3), points()[0], sigma=0.1, num_draws=10, seed=1).counts).all()
    assert (again.counts == count_votes(network(0), points()[0], sigma=0.1, num_draws=20, seed=1).counts).all()


def test_a_store_without_room_says_so(tmp_path: Path) -> None:
    with (
        start(store=tmp_path, device="cpu", limits=Limits(max_store_bytes=100)) as service,
        CertifyClient(f"127.0.0.1:{service.port}", attempts=1) as client,
        pytest.raises(ServiceError, match="no room") as refused,
    ):
        client.upload_model(network())
    assert refused.value.code == "RESOURCE_EXHAUSTED"


# ---- requests


@pytest.fixture
def known(client: CertifyClient) -> dict[str, str]:
    return {"model": client.upload_model(network()), "set": client.upload_set(*points())}


SMOOTHING = {"sigma": 0.1, "num_draws": 10, "seed": 1}
BAD_SMOOTHING: dict[str, tuple[str, dict[str, Any]]] = {
    "no id": ("INVALID_ARGUMENT", {"model": ""}),
    "an id that is a path": ("INVALID_ARGUMENT", {"set": "../models/x"}),
    "an unknown model": ("NOT_FOUND", {"model": "0" * 64}),
    "an unknown set": ("NOT_FOUND", {"set": "0" * 64}),
    "no noise": ("INVALID_ARGUMENT", {"sigma": 0.0}),
    "NaN": ("INVALID_ARGUMENT", {"sigma": float("nan")}),
    "infinity": ("INVALID_ARGUMENT", {"sigma": float("inf")}),
    "no draws": ("INVALID_ARGUMENT", {"num_draws": 0}),
    "too many draws": ("OUT_OF_RANGE", {"num_draws": 10_000_001}),
    "a seed beyond": ("INVALID_ARGUMENT", {"seed": 2**64 - 1}),
    "an empty claim": ("INVALID_ARGUMENT", {"claim": pb.Claim()}),
    "a long stream": ("INVALID_ARGUMENT", {"stream": "x" * 1000}),
}


@pytest.mark.parametrize("name", BAD_SMOOTHING)
def test_a_wrong_smoothing_request_is_told_why(name: str, stub: rpc.CertifyServiceStub, known: dict[str, str]) -> None:
    code, changed = BAD_SMOOTHING[name]
    assert code_of(stub.CertifySmoothing(pb.CertifySmoothingRequest(**(known | SMOOTHING | changed)))) == code


CLAIM = {"certificate": "sound", "level": "feature", "bounds": "simultaneous", "alpha": 0.1, "training_record": "{}"}
BAD_CLAIMS: dict[str, dict[str, Any]] = {
    "no record": {"training_record": ""},
    "another record": {},
    "a record nested deeply": {"training_record": "[" * 100_000},
    "a record of wrong types": {"training_record": '{"schema": 1, "rounds": {"a": 1}}'},
    "an unknown certificate": {"certificate": "best"},
    "an unknown level": {"level": "input"},
    "a form without votes": {"form": "margin"},
    "no alpha": {"alpha": 0.0},
    "no bounds": {"bounds": ""},
    "a selection of nothing": {"bounds": "two_stage"},
    "a selection for nothing": {"selection_draws": 10},
    "a negative change": {"change_norm": -1.0},
}


@pytest.mark.parametrize("name", BAD_CLAIMS)
def test_a_wrong_claim_is_told_why(name: str, stub: rpc.CertifyServiceStub, known: dict[str, str]) -> None:
    claim = pb.Claim(**(CLAIM | BAD_CLAIMS[name]))
    request = pb.CertifySmoothingRequest(**known, **SMOOTHING, claim=claim)
    assert code_of(stub.CertifySmoothing(request)) == "INVALID_ARGUMENT"


BAD_ZONOTOPE: dict[str, dict[str, Any]] = {
    "a negative radius": {"eps": -0.1},
    "NaN": {"eps": float("nan")},
    "an unknown method": {"method": "magic"},
    "an unknown type": {"dtype": "int8"},
    "a range upside down": {"input_range": pb.InputRange(low=1.0, high=0.0)},
    "a range of NaN": {"input_range": pb.InputRange(low=float("nan"), high=1.0)},
    "inputs beyond their range": {"input_range": pb.InputRange(low=0.4, high=0.5)},
}


@pytest.mark.parametrize("name", BAD_ZONOTOPE)
def test_a_wrong_zonotope_request_is_told_why(name: str, stub: rpc.CertifyServiceStub, known: dict[str, str]) -> None:
    request = pb.CheckZonotopeRequest(**(known | {"eps": 0.1} | BAD_ZONOTOPE[name]))
    assert code_of(stub.CheckZonotope(request)) == "INVALID_ARGUMENT"


BAD_GATES: dict[str, tuple[str, dict[str, Any]]] = {
    "radii that fall": ("INVALID_ARGUMENT", {"eps": [0.2, 0.1]}),
    "a radius of NaN": ("INVALID_ARGUMENT", {"eps": [float("nan")]}),
    "too many radii": ("OUT_OF_RANGE", {"eps": [i / 100 for i in range(17)]}),
    "no steps": ("INVALID_ARGUMENT", {"attack_steps": 0}),
    "too many steps": ("OUT_OF_RANGE", {"attack_steps": 1001}),
    "a negative temperature": ("INVALID_ARGUMENT", {"temperature": -1.0}),
    "no policy": ("INVALID_ARGUMENT", {"policy": pb.GatePolicy()}),
    "options that are no JSON": ("INVALID_ARGUMENT", {"policy": pb.GatePolicy(name="paper", options="{")}),
    "options that are a list": ("INVALID_ARGUMENT", {"policy": pb.GatePolicy(name="paper", options="[]")}),
    "the option name": ("INVALID_ARGUMENT", {"policy": pb.GatePolicy(name="paper", options='{"name": "x"}')}),
    "a state that contradicts itself": ("INVALID_ARGUMENT", {"state": pb.GateState(num_accepted=2)}),
}


@pytest.mark.parametrize("name", BAD_GATES)
def test_a_wrong_gate_request_is_told_why(name: str, stub: rpc.CertifyServiceStub, known: dict[str, str]) -> None:
    code, changed = BAD_GATES[name]
    asked = {"model": known["model"], "validation_set": known["set"], "certification_set": known["set"], "eps": [0.1]}
    asked |= {"attack_eps": 0.1, "attack_steps": 2, "policy": pb.GatePolicy(name="paper")}
    assert code_of(stub.Gate(pb.GateRequest(**(asked | changed)))) == code


def test_model_and_set_must_fit(stub: rpc.CertifyServiceStub, client: CertifyClient, known: dict[str, str]) -> None:
    for inputs, labels in ((torch.zeros(2, 1, 6, 7), torch.zeros(2)), (torch.zeros(2, 1, 6, 6), torch.tensor([0, 10]))):
        other = known | {"set": client.upload_set(inputs, labels)}
        assert code_of(stub.CheckZonotope(pb.CheckZonotopeRequest(**other, eps=0.1))) == "INVALID_ARGUMENT"


# ---- time and load


def test_work_ends_with_its_deadline(service: RunningService, client: CertifyClient) -> None:
    client.upload_model(network())
    with pytest.raises(ServiceError) as late:
        client.count_votes(network(), points()[0], **LONG, seed=11, timeout=0.5)
    assert late.value.code == "DEADLINE_EXCEEDED"
    wait_until(lambda: service.queue.num_running == 0)


def test_a_deadline_that_is_over_costs_no_work(stub: rpc.CertifyServiceStub, known: dict[str, str]) -> None:
    request = pb.CertifySmoothingRequest(**known, **LONG, seed=12)
    assert code_of(stub.CertifySmoothing(request, timeout=0.0)) == "DEADLINE_EXCEEDED"


@pytest.mark.parametrize("way", ["cancelled", "killed"])
def test_work_ends_when_its_client_is_gone(way: str, service: RunningService, known: dict[str, str]) -> None:
    channel = grpc.insecure_channel(f"127.0.0.1:{service.port}")
    request = pb.CertifySmoothingRequest(**known, **LONG, seed=13)
    call = rpc.CertifyServiceStub(channel).CertifySmoothing(request)
    for response in call:
        if response.WhichOneof("event") == "progress":
            break
    assert service.queue.num_running == 1
    call.cancel() if way == "cancelled" else channel.close()
    wait_until(lambda: service.queue.num_running == 0)
    channel.close()


def test_a_zonotope_check_and_a_gate_end_when_their_client_is_gone(service: RunningService) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = Network.from_module(
            nn.Sequential(nn.Linear(36, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 10)), (36,)
        )
    many = torch.rand(1000, 36, generator=torch.Generator().manual_seed(1)), torch.zeros(1000).long()
    address = f"127.0.0.1:{service.port}"
    with CertifyClient(address, timeout=60.0) as client:
        ids = client.upload_model(wide), client.upload_set(*many)
    requests = {
        "CheckZonotope": pb.CheckZonotopeRequest(model=ids[0], set=ids[1], eps=0.1),
        "Gate": pb.GateRequest(
            model=ids[0], validation_set=ids[1], certification_set=ids[1], attack_eps=0.1, attack_steps=1000,
            probes=True, policy=pb.GatePolicy(name="paper"),
        ),
    }  # fmt: skip
    for method, request in requests.items():
        with grpc.insecure_channel(address) as channel:
            call = getattr(rpc.CertifyServiceStub(channel), method)(request)
            wait_until(lambda: service.queue.num_running == 1)
            call.cancel()
        wait_until(lambda: service.queue.num_running == 0)


def test_a_full_queue_says_so_and_a_place_that_is_left_is_free_again(
    service: RunningService, stub: rpc.CertifyServiceStub, known: dict[str, str]
) -> None:
    def ask(seed: int) -> Any:
        call = stub.CertifySmoothing(pb.CertifySmoothingRequest(**known, **LONG, seed=seed))
        assert next(call).WhichOneof("event") == "accepted"
        return call

    calls = [ask(20)]
    wait_until(lambda: service.queue.num_running == 1)
    calls += [ask(21), ask(22)]
    request = pb.CertifySmoothingRequest(**known, **LONG, seed=23)
    assert code_of(stub.CertifySmoothing(request)) == "RESOURCE_EXHAUSTED"
    joined = ask(22)  # the same question needs no place of its own
    calls[1].cancel()
    wait_until(lambda: service.queue.num_waiting == 1)
    calls.append(ask(23))
    for call in (*calls, joined):
        call.cancel()
    wait_until(lambda: service.queue.num_running + service.queue.num_waiting == 0)


def test_a_client_waits_until_there_is_room(service: RunningService, known: dict[str, str]) -> None:
    address = f"127.0.0.1:{service.port}"
    with grpc.insecure_channel(address) as channel, CertifyClient(address, first_pause=0.05, attempts=30) as client:
        stub = rpc.CertifyServiceStub(channel)
        calls = [
            stub.CertifySmoothing(pb.CertifySmoothingRequest(**known, **LONG, seed=seed)) for seed in (30, 31, 32)
        ]  # fmt: skip
        wait_until(lambda: service.queue.num_running + service.queue.num_waiting == 3)
        timer = threading.Timer(0.5, lambda: [call.cancel() for call in calls])
        timer.start()
        votes = client.count_votes(network(), points()[0], sigma=0.1, num_draws=50, seed=33, timeout=30.0)
        timer.join()
    assert (votes.counts == count_votes(network(), points()[0], sigma=0.1, num_draws=50, seed=33).counts).all()


def test_a_service_that_is_away_is_asked_again_and_then_given_up(tmp_path: Path) -> None:
    with start(store=tmp_path / "first", device="cpu") as service:
        port = service.port
    with CertifyClient(f"127.0.0.1:{port}", attempts=2, first_pause=0.05) as client:
        with pytest.raises(ServiceError) as away:
            client.info()
        assert away.value.code == "UNAVAILABLE"
    with CertifyClient(f"127.0.0.1:{port}", attempts=20, first_pause=0.2) as client, ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.info, timeout=30.0)
        time.sleep(0.2)
        with start(store=tmp_path / "second", device="cpu", port=port):
            assert asked.result(30).device == "cpu"


def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    many = torch.rand(200_000, 3), torch.zeros(200_000)
    flat = Network.from_module(nn.Linear(3, 10), (3,))
    with (
        start(store=tmp_path, device="cpu", limits=Limits(idle_seconds=0.4, max_points=200_000)) as service,
        CertifyClient(f"127.0.0.1:{service.port}", timeout=60.0) as client,
        grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        request = pb.CertifySmoothingRequest(
            model=client.upload_model(flat), set=client.upload_set(*many), sigma=0.1, num_draws=1
        )
        call = rpc.CertifyServiceStub(channel).CertifySmoothing(request)
        assert next(call).WhichOneof("event") == "accepted"  # and then nothing more of 16 MB, which no buffer holds
        cut = {"method": "CertifySmoothing", "code": "CANCELLED"}
        wait_until(lambda: service.metrics_value("hawthorn_certify_requests_total", **cut) == 1)
        assert code_of(call) == "CANCELLED"
        assert client.count_votes(flat, many[0], sigma=0.1, num_draws=1, seed=0).num_draws == 1  # one that takes it


def test_what_a_callback_raises_ends_the_work(service: RunningService, client: CertifyClient) -> None:
    def stop(_: Tick) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        client.count_votes(network(), points()[0], **LONG, seed=40, on_progress=stop)
    wait_until(lambda: service.queue.num_running == 0)


def test_open_reflection_streams_leave_room_for_health_checks(service: RunningService) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        stub, done = reflection_pb2_grpc.ServerReflectionStub(channel), threading.Event()

        def silent() -> Iterator[Any]:
            yield request
            done.wait(20)

        streams = [stub.ServerReflectionInfo(silent()) for _ in range(4)]
        assert all(next(stream).HasField("list_services_response") for stream in streams)
        assert code_of(stub.ServerReflectionInfo(iter([request]))) == "RESOURCE_EXHAUSTED"
        assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5).status == 1
        done.set()
        for stream in streams:
            stream.cancel()


# ---- who may ask


def test_without_the_token_there_is_only_health(tmp_path: Path) -> None:
    with start(store=tmp_path, device="cpu", token=TOKEN) as service:
        address = f"127.0.0.1:{service.port}"
        for token in (None, TOKEN[:-1] + "x", TOKEN + "x"):
            with CertifyClient(address, token=token, attempts=1) as client:
                for ask in (client.info, lambda c=client: c.upload_model(network())):
                    with pytest.raises(ServiceError, match="authorization") as refused:
                        ask()
                    assert refused.value.code == "UNAUTHENTICATED"
        with grpc.insecure_channel(address) as channel:
            assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
            stub = rpc.CertifyServiceStub(channel)
            request = pb.CertifySmoothingRequest()
            for metadata in ((("authorization", TOKEN),), (("authorization", f"Bearer {TOKEN}"),) * 2):
                assert code_of(stub.CertifySmoothing(request, metadata=metadata)) == "UNAUTHENTICATED"
        with CertifyClient(address, token=TOKEN, attempts=1) as client:
            assert client.info().device == "cpu"


def test_a_token_never_travels_in_the_clear_beyond_this_machine(tmp_path: Path) -> None:
    for address in ("10.0.0.1:50051", "example.org:50051", "dns:///example.org:1", "127.0.0.1.example.org:1"):
        with pytest.raises(ConfigError, match="in the clear"):
            CertifyClient(address, token=TOKEN)
    with pytest.raises(ConfigError, match="in the clear"):
        start(store=tmp_path, host="0.0.0.0", token=TOKEN, insecure=True)
    with pytest.raises(ConfigError, match="reachable from outside"):
        start(store=tmp_path, host="0.0.0.0")
    for token in ("", "short", "with a space in the middle", "umlaut-ä-in-the-middle", "line\nbreak-in-the-middle"):
        with pytest.raises(ConfigError, match="16 to 4096"):
            start(store=tmp_path, token=token)


def test_loopback_is_told_from_what_only_looks_like_it() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.9.1", "localhost", "::1", "[::1]", "LOCALHOST")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "localhost.example.org", "127.0.0.1.example.org", "10.0.0.1", ""))
    )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, certificates of a server and a client from it, and one of a stranger."""
    folder = tmp_path_factory.mktemp("tls")
    authority = _certificate(folder, "ca", None)
    for name in ("server", "client"):
        _certificate(folder, name, authority)
    _certificate(folder, "stranger", None)
    return folder


def _certificate(folder: Path, name: str, issuer: Any) -> Any:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1"))])
    builder = (
        x509.CertificateBuilder().subject_name(subject).issuer_name(subject if issuer is None else issuer[0])
        .public_key(key.public_key()).serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=5)).not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(names, critical=False)
    )  # fmt: skip
    signed = builder.sign(key if issuer is None else issuer[1], hashes.SHA256())
    (folder / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{name}.key").write_bytes(private)
    return subject, key


def test_tls_and_token_together(tmp_path: Path, certificates: Path) -> None:
    tls = {"tls_cert": certificates / "server.pem", "tls_key": certificates / "server.key"}
    with start(store=tmp_path, device="cpu", host="0.0.0.0", token=TOKEN, **tls) as service:
        address = f"127.0.0.1:{service.port}"
        with CertifyClient(address, token=TOKEN, tls_ca=certificates / "ca.pem") as client:
            votes = client.count_votes(network(), points()[0], sigma=0.1, num_draws=20, seed=1, timeout=20.0)
            assert (votes.counts == count_votes(network(), points()[0], sigma=0.1, num_draws=20, seed=1).counts).all()
        for wrong in ({"tls_ca": certificates / "stranger.pem"}, {"tls": True}, {}):
            with (
                CertifyClient(address, token=TOKEN, attempts=1, **wrong) as client,
                pytest.raises(ServiceError) as refused,
            ):
                client.info(timeout=10.0)
            assert refused.value.code == "UNAVAILABLE"


def test_mutual_tls_wants_a_certificate_of_the_same_authority(tmp_path: Path, certificates: Path) -> None:
    given = {"tls_cert": certificates / "server.pem", "tls_key": certificates / "server.key"}
    with start(store=tmp_path, device="cpu", **given, tls_client_ca=certificates / "ca.pem") as service:
        address, ca = f"127.0.0.1:{service.port}", certificates / "ca.pem"
        own = {"tls_cert": certificates / "client.pem", "tls_key": certificates / "client.key"}
        with CertifyClient(address, tls_ca=ca, **own) as client:
            assert client.info(timeout=10.0).device == "cpu"
        strange = {"tls_cert": certificates / "stranger.pem", "tls_key": certificates / "stranger.key"}
        for wrong in ({}, strange):
            with CertifyClient(address, tls_ca=ca, attempts=1, **wrong) as client, pytest.raises(ServiceError):
                client.info(timeout=10.0)


def test_wrong_settings_are_told_before_anything_listens(tmp_path: Path, certificates: Path) -> None:
    cert, key = certificates / "server.pem", certificates / "server.key"
    for wrong in (
        {"tls_cert": cert},
        {"tls_key": key},
        {"tls_client_ca": cert},
        {"tls_cert": key, "tls_key": cert},
        {"tls_cert": tmp_path / "none.pem", "tls_key": key},
        {"device": "cuda:99"},
        {"device": "toaster"},
        {"device": "meta"},
        {"port": 70_000},
    ):
        with pytest.raises(ConfigError):
            start(store=tmp_path / "store", **wrong)
    for limit in ({"workers": 0}, {"queue_size": -1}, {"max_points": 1.5}, {"idle_seconds": 0}, {"queue_size": True}):
        with pytest.raises(ConfigError):
            Limits(**limit)
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# ---- the store


def test_one_service_to_a_store_and_one_to_a_port(tmp_path: Path, service: RunningService) -> None:
    with start(store=tmp_path, device="cpu"), pytest.raises(ConfigError, match="another service"):
        start(store=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match="taken"):
        start(store=tmp_path, device="cpu", port=service.port)


def test_a_start_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="metrics"):
            start(store=tmp_path, device="cpu", metrics_port=taken.getsockname()[1])
    with start(store=tmp_path, device="cpu", metrics_port=0) as service:  # the store is free again
        assert service.metrics_port


def test_half_written_files_are_swept_away(tmp_path: Path) -> None:
    Store(tmp_path, max_bytes=100).close()
    (tmp_path / "incoming" / "half").write_bytes(b"x")
    store = Store(tmp_path, max_bytes=100)
    assert not list((tmp_path / "incoming").iterdir())
    store.close()


def test_a_disk_that_is_full_is_a_store_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path, max_bytes=1000)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreFullError, match="No space left"):
        store.write("results", "0" * 64, b"x")
    assert not list((tmp_path / "incoming").iterdir())
    assert store.read("results", "0" * 64) is None
    store.close()


def put(store: Store, content: bytes) -> str:
    with store.receive(len(content)) as incoming:
        incoming.write(content)
        return store.commit("models", incoming)


def test_an_upload_that_is_only_announced_takes_no_room(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=1000)
    first = put(store, b"a" * 400)
    with store.receive(900), store.receive(900), store.receive(900) as incoming:
        incoming.write(b"b" * 800)
        assert store.has("models", first)  # nor do bytes before all of them are there
    assert store.has("models", first)
    second = put(store, b"c" * 900)
    assert (store.has("models", first), store.has("models", second)) == (False, True)
    with pytest.raises(StoreFullError, match="no room"), store.receive(1001):
        pass
    with store.receive(600) as one, store.receive(600) as other:
        one.write(b"d" * 600)
        with pytest.raises(StoreFullError, match="no room"):
            other.write(b"e" * 600)
    put(store, b"f" * 1000)  # what was broken off gave its room back
    store.close()


def test_what_is_in_use_stays_where_another_wants_its_room(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=1000)
    first = put(store, b"a" * 600)
    with store.use("models", first), pytest.raises(StoreFullError, match="in use"):
        put(store, b"b" * 600)
    assert store.has("models", first)
    assert not list((tmp_path / "incoming").iterdir())
    store.close()


def test_results_have_a_quota_of_their_own_and_never_block_an_upload(tmp_path: Path) -> None:
    store = Store(tmp_path, max_bytes=1000, max_result_bytes=1000)
    for number in range(3):
        store.write("results", f"{number}" * 64, b"x" * 400)
        os.utime(tmp_path / "results" / (f"{number}" * 64), (number, number))
    kept = [store.read("results", f"{number}" * 64) is not None for number in range(3)]
    assert kept == [False, True, True]  # the oldest made room
    with pytest.raises(StoreFullError, match="more than all results"):
        store.write("results", "3" * 64, b"x" * 5000)
    store.write("progress", "4" * 64, b"x" * 100)
    store.write("results", "5" * 64, b"x" * 100)
    assert store.read("progress", "4" * 64) is None  # before any result
    put(store, b"a" * 1000)
    assert sum(file.stat().st_size for file in (tmp_path / "results").iterdir()) <= 1000
    store.close()


def test_a_caller_has_few_uploads_at_a_time(tmp_path: Path) -> None:
    content = header(MODEL)
    leave = threading.Event()

    def silent() -> Iterator[pb.UploadRequest]:
        yield content
        leave.wait(20)

    with (
        start(store=tmp_path, device="cpu", limits=Limits(max_uploads=2)) as service,
        grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel,
    ):
        stub = rpc.CertifyServiceStub(channel)
        open_calls = [stub.UploadModel.future(silent()) for _ in range(2)]
        wait_until(lambda: len(list((tmp_path / "incoming").iterdir())) == 2)
        assert code_of(lambda: stub.UploadModel(iter([content]))) == "RESOURCE_EXHAUSTED"
        leave.set()
        for call in open_calls:
            assert call.exception().code().name == "DATA_LOSS"
        assert stub.UploadModel(iter([content, chunk(MODEL)])).id


# ---- work and memory beyond what one request may take


@pytest.mark.parametrize(
    ("limit", "text"), [({"max_operations": 1000}, "multiplications"), ({"max_batch_bytes": 100}, "bytes")]
)
def test_work_that_is_too_much_is_refused_before_it_starts(limit: dict[str, int], text: str, tmp_path: Path) -> None:
    with (
        start(store=tmp_path, device="cpu", limits=Limits(**limit)) as service,
        CertifyClient(f"127.0.0.1:{service.port}", attempts=1) as client,
    ):
        settings = GateSettings(eps=(0.1,), attack_eps=0.1, attack_steps=2)
        for ask in (
            lambda: client.count_votes(network(), points()[0], sigma=0.1, num_draws=50, seed=1),
            lambda: client.check(network(), *points(), eps=0.1),
            lambda: client.gate(network(), points(), points(), settings, state=GateState()),
        ):
            with pytest.raises(ServiceError, match=text) as refused:
                ask()
            assert refused.value.code == "OUT_OF_RANGE"


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes",
        "DefaultCPUAllocator: not enough memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
    ],
)
def test_an_allocation_that_fails_is_a_lack_of_memory(text: str) -> None:
    assert status_of(RuntimeError(text))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert status_of(RuntimeError("shapes differ"))[0] == grpc.StatusCode.INTERNAL


def test_tls_alone_does_not_open_a_service_to_everyone() -> None:
    known: dict[str, Any] = {"tls": True, "token": None, "insecure": False}
    with pytest.raises(ConfigError, match="--tls-client-ca"):
        check_exposure("0.0.0.0", **known)
    check_exposure("127.0.0.1", **known)
    check_exposure("0.0.0.0", **known, client_ca=True)
    check_exposure("0.0.0.0", **known | {"token": "x" * 32})
    check_exposure("0.0.0.0", **known | {"insecure": True})
