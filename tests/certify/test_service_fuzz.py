"""The service under random bytes and spoiled requests: it stays up, blames the request, serves others unchanged."""

import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from google.protobuf.message import DecodeError, Message
from torch import nn

from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.network import Network
from certify.service import certify_pb2 as pb
from certify.service import wire
from certify.service.client import CertifyClient
from certify.service.limits import Limits
from certify.service.serve import RunningService, start
from certify.service.wire import SERVICE
from certify.smoothing.sampled import count_votes

pytestmark = pytest.mark.filterwarnings("ignore::certify.crfl.certificates.BrokenAssumption")
# What a request can be blamed for. INTERNAL and UNKNOWN, which are defects, are not among them.
BLAMED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE", "DATA_LOSS", "FAILED_PRECONDITION"}
LIMITS = Limits(max_draws=20, max_attack_steps=2, max_radii=2, max_points=5, save_seconds=60.0)
NUM_REQUESTS = 10_000
NUM_FILES = 500
NUM_RECORDS = 800
NUM_ON_THE_WIRE = 600


class AbortedError(Exception):
    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(code, message)
        self.code = code.name


class Context:
    """What a servicer's method sees of gRPC, without gRPC."""

    def abort(self, code: grpc.StatusCode, message: str) -> None:
        assert message
        raise AbortedError(code, message)

    def add_callback(self, _: Callable[[], None]) -> bool:
        return True

    def peer(self) -> str:
        return "fuzz"


def network(seed: int = 0) -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Network.from_module(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), (6,))


def record() -> TrainingRecord:
    """Return a record short enough that spoiling hits every part of it."""
    work = RoundWork(participants=(0, 1), weights=(0.5, 0.5), learning_rates=(0.1, 0.1), clip_norm=3.0, noise=0.1)
    local = tuple(
        ClientWork(client=c, weight=0.5, learning_rate=0.1, batch_sizes=(5, 3), poisoned=(1 - c, 0)) for c in (0, 1)
    )
    return TrainingRecord(
        model="logistic_regression()", bias=True, num_classes=3, num_params=43, num_clients=2, rounds=(work, work),
        smoothing_sigma=0.1, attack_round=1, attackers=(0,), work=local, label_flips=False, data_norm_bound=1.0,
        data_norm_found=1.0, start_norm=2.0,
    )  # fmt: skip


INPUTS = torch.rand(5, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1])
FILES = {"UploadModel": wire.model_file(network()), "UploadCertificationSet": wire.set_file(INPUTS, LABELS)}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    with start(store=tmp_path_factory.mktemp("store"), device="cpu", limits=LIMITS) as running:
        yield running


@pytest.fixture(scope="module")
def valid(service: RunningService) -> dict[str, Message]:
    """One valid request of every method that takes a single message."""
    with CertifyClient(f"127.0.0.1:{service.port}") as client:
        model, points = client.upload_model(network()), client.upload_set(INPUTS, LABELS)
    claim = pb.Claim(
        training_record=record().to_json(), certificate="paper", level="sample", change_norm=0.1,
        bounds="simultaneous", alpha=0.1, num_points=5,
    )  # fmt: skip
    metrics = pb.GateMetrics(protocol="p", normal_accuracy=0.5, bounds=[pb.GateBound(eps=0.1, relative_margin=0.1)])
    return {
        "GetServiceInfo": pb.GetServiceInfoRequest(),
        "GetModel": pb.GetModelRequest(model=model),
        "GetCertificationSet": pb.GetCertificationSetRequest(set=points),
        "CertifySmoothing": pb.CertifySmoothingRequest(model=model, set=points, sigma=0.1, num_draws=5, claim=claim),
        "CheckZonotope": pb.CheckZonotopeRequest(
            model=model, set=points, eps=0.1, method="best", dtype="float64", input_range=pb.InputRange(low=-1, high=2)
        ),
        "Gate": pb.GateRequest(
            model=model, validation_set=points, certification_set=points, eps=[0.1], attack_eps=0.1, attack_steps=1,
            temperature=10, probes=True, policy=pb.GatePolicy(name="hardened", options='{"loss_share": 0.2}'),
            state=pb.GateState(last_accepted=metrics, best=metrics, num_accepted=3),
        ),
    }  # fmt: skip


# ---- how messages are spoiled


ODD: dict[str, list[Any]] = {
    "double": [0.0, -0.0, 1e-320, 1e308, -1.0, 0.5, 1.0, float("nan"), float("inf"), float("-inf")],
    "integer": [0, 1, 2, 19, 2**31, 2**32 - 1],
    "string": [
        "",
        "0" * 64,
        "../../x",
        "\0",
        "ä" * 70,
        "A" * 64,
        "{}",
        "[",
        "NaN",
        "[" * 5000,
        "paper",
        "sound",
        "x" * 9999,
    ],
}


def spoil_fields(message: Message, random_: random.Random) -> None:
    """Set, clear or repeat some fields, also of messages inside."""
    for field in message.DESCRIPTOR.fields:
        if random_.random() > 0.25:
            continue
        value = getattr(message, field.name)
        if field.message_type is not None and field.is_repeated:
            value.extend([value.add()] if random_.random() < 0.5 else [])
        elif field.message_type is not None:
            message.ClearField(field.name) if random_.random() < 0.2 else spoil_fields(value, random_)
        else:
            kind = {field.CPPTYPE_DOUBLE: "double", field.CPPTYPE_STRING: "string"}.get(field.cpp_type, "integer")
            odd = random_.choice(ODD[kind])
            if field.cpp_type == field.CPPTYPE_BOOL:
                odd = bool(odd)
            value.append(odd) if field.is_repeated else setattr(message, field.name, odd)


def spoil_bytes(content: bytes, random_: random.Random) -> bytes:
    """Flip, cut, insert or double some bytes."""
    spoiled = bytearray(content)
    for _ in range(random_.choice((1, 1, 2, 8))):
        place = random_.randrange(len(spoiled) + 1)
        way = random_.randrange(5)
        if way == 0 and spoiled:
            spoiled[place % len(spoiled)] ^= 1 << random_.randrange(8)
        elif way == 1:
            del spoiled[place : place + random_.randrange(1, 30)]
        elif way == 2:
            spoiled[place:place] = random_.randbytes(random_.randrange(1, 30))
        elif way == 3 and spoiled:
            spoiled[place % len(spoiled)] = random_.choice(b'0129{}[]",:-e\0\xff')
        else:
            spoiled[place:place] = spoiled[max(0, place - 20) : place]
    return bytes(spoiled)


def spoiled(message: Message, random_: random.Random) -> Message | None:
    """Return a spoiled copy: random bytes, spoiled bytes or spoiled fields; None where the bytes are no message."""
    way = random_.random()
    try:
        if way < 0.2:
            return type(message).FromString(random_.randbytes(random_.randrange(60)))
        if way < 0.5:
            return type(message).FromString(spoil_bytes(message.SerializeToString(), random_))
    except DecodeError:
        return None
    copy = type(message)()
    copy.CopyFrom(message)
    spoil_fields(copy, random_)
    return copy


def spoil_record(request: Message, random_: random.Random) -> Message:
    """Return the request with its training record's text spoiled, as spoiling all bytes seldom leaves it JSON."""
    copy = pb.CertifySmoothingRequest()
    copy.CopyFrom(request)
    entries = json.loads(copy.claim.training_record)
    for _ in range(random_.choice((1, 1, 3))):
        place: Any = entries
        while True:
            key = random_.choice(list(place)) if isinstance(place, dict) else random_.randrange(len(place))
            if not isinstance(place[key], dict | list) or not place[key] or random_.random() < 0.2:
                break
            place = place[key]
        place[key] = random_.choice([0, 1, -1, 0.5, 1e308, 5e-324, 2**70, "x", "", None, True, [], {}, [[]], [0, 1]])
    copy.claim.training_record = json.dumps(entries)
    copy.claim.certificate = random_.choice(("paper", "sound"))
    copy.claim.level = random_.choice(("feature", "sample", "client"))
    if copy.claim.level == "feature":
        copy.claim.ClearField("change_norm")
    return copy


def outcome(call: Callable[[], Any]) -> str:
    try:
        answer = call()
        if not isinstance(answer, Message):
            for _ in answer:
                pass
    except AbortedError as error:
        return error.code
    return "OK"


# ---- the fuzzing


def test_spoiled_requests_are_blamed_on_the_request(service: RunningService, valid: dict[str, Message]) -> None:
    random_, codes, asked = random.Random(1), Counter[str](), 0
    while asked < NUM_REQUESTS:
        name = random_.choice(list(valid))
        if (message := spoiled(valid[name], random_)) is None:
            continue
        asked += 1
        code = outcome(lambda n=name, m=message: getattr(service.servicer, n)(m, Context()))
        assert code in BLAMED, f"{name} answered {code} to {message}"
        codes[code] += 1
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "OUT_OF_RANGE"} <= codes.keys()
    assert service.queue.num_running == service.queue.num_waiting == 0


def test_spoiled_training_records_are_blamed_on_the_request(service: RunningService, valid: dict[str, Message]) -> None:
    random_, codes = random.Random(4), Counter[str]()
    for _ in range(NUM_RECORDS):
        message = spoil_record(valid["CertifySmoothing"], random_)
        code = outcome(lambda m=message: service.servicer.CertifySmoothing(m, Context()))
        assert code in BLAMED, f"answered {code} to {message}"
        codes[code] += 1
    assert {"OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION"} <= codes.keys()


def test_spoiled_uploads_are_blamed_on_the_upload(service: RunningService) -> None:
    random_, codes = random.Random(2), Counter[str]()
    for _ in range(NUM_FILES):
        name = random_.choice(list(FILES))
        content = spoil_bytes(FILES[name], random_)
        header = pb.UploadHeader(sha256=hashlib.sha256(content).hexdigest(), num_bytes=len(content))
        cuts = sorted(random_.randrange(len(content) + 1) for _ in range(random_.randrange(3)))
        pieces = [content[a:b] for a, b in zip([0, *cuts], [*cuts, len(content)], strict=True)]
        messages = [pb.UploadRequest(header=header), *(pb.UploadRequest(chunk=piece) for piece in pieces)]
        if random_.random() < 0.2:
            messages.pop(random_.randrange(len(messages)))
        if random_.random() < 0.1:
            random_.shuffle(messages)
        code = outcome(lambda n=name, m=messages: getattr(service.servicer, n)(iter(m), Context()))
        assert code in BLAMED, f"{name} answered {code} to {content!r}"
        codes[code] += 1
    assert {"OK", "INVALID_ARGUMENT", "DATA_LOSS"} <= codes.keys()
    assert not list((service.store / "incoming").iterdir())


def test_raw_bytes_on_the_wire_change_nothing_for_others(service: RunningService, valid: dict[str, Message]) -> None:
    address, done, wrong = f"127.0.0.1:{service.port}", threading.Event(), []

    def ask_meanwhile() -> None:
        with CertifyClient(address) as client:
            for seed in range(1000):
                asked: dict[str, Any] = {"sigma": 0.3, "num_draws": 20, "seed": seed}
                votes = client.count_votes(network(), INPUTS, **asked)
                if not (votes.counts == count_votes(network(), INPUTS, **asked).counts).all():
                    wrong.append(seed)
                if done.is_set():
                    return

    other = threading.Thread(target=ask_meanwhile)
    other.start()
    random_, codes = random.Random(3), Counter[str]()
    methods = [*valid, *FILES]
    try:
        with grpc.insecure_channel(address) as channel:
            for _ in range(NUM_ON_THE_WIRE):
                name = random_.choice(methods)
                content = valid[name].SerializeToString() if name in valid else b"\n\x05hello"
                content = spoil_bytes(content, random_) if random_.random() < 0.5 else random_.randbytes(40)
                codes[sent(channel, name, content)] += 1
    finally:
        done.set()
        other.join(30)
    assert not other.is_alive()
    assert not wrong
    assert codes.keys() <= BLAMED
    assert codes["INVALID_ARGUMENT"] > NUM_ON_THE_WIRE / 10
    with CertifyClient(address, attempts=1) as client:
        assert client.info(timeout=5.0).device == "cpu"


def sent(channel: grpc.Channel, name: str, content: bytes) -> str:
    """Send bytes as a request of a method and return the status code of the answer."""
    path, timeout = f"/{SERVICE}/{name}", 20.0
    try:
        if name in FILES:
            channel.stream_unary(path)(iter([content]), timeout=timeout)
        else:
            for _ in channel.unary_stream(path)(content, timeout=timeout):
                pass
    except grpc.RpcError as error:
        return error.code().name  # type: ignore[attr-defined]
    return "OK"


def test_a_message_beyond_the_limit_is_refused_by_the_transport(service: RunningService, tmp_path: Path) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{service.port}") as channel:
        assert sent(channel, "CertifySmoothing", b"\0" * (5 * 2**20)) == "RESOURCE_EXHAUSTED"
