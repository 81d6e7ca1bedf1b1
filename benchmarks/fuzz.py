"""Bad input in bulk: replies of clients, settings, and what the certification service is sent.

    python benchmarks/fuzz.py [--cases 20000] [--seed 1] [--only replies,settings,models,messages] [--json OUT]

What must hold for every case:

    replies    no exception; every reply is used or dropped with a reason; the new model is finite; and the honest
               clients outvote: the model stays within their own spread of it, coordinate by coordinate (rule median)
    settings   `RunConfig.read`, experiment files and components answer, or refuse with `HawthornError`
    models     bytes that spoil a safetensors file: read, or refused with `HawthornError`; what is read is finite
    messages   protobuf messages spoiled bit by bit or made of odd numbers: read, or refused as the request's fault

Exits with 1 on the first kind that has a case which breaks its promise, and prints that case.
"""

import argparse
import json
import logging
import math
import random
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from google.protobuf.message import DecodeError
from torch import Tensor

from certify.network import Network
from certify.service import certify_pb2 as pb
from certify.service import messages, wire
from hawthorn.experiment import read_experiment
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from tasks import spec
from tasks.config import RunConfig
from tasks.errors import HawthornError
from tasks.params import Layout
from tasks.wire import to_record

Outcome = str  # what became of a case, for the count
LAYOUT = Layout(("conv.weight", "fc.weight", "fc.bias"), ((3, 4), (2, 5), (2,)), 24)
HONEST, HOSTILE = 5, 3
NUM_CLIENTS = HONEST + HOSTILE
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-45, 1e-30, 3.4e38, -3.4e38, 1e300, 1e30, -1.0, 1.0)
TEXTS = ("", "a", "conv.weight", "fc.weight", "x" * 300, "\x00", "\x1b[31m", "../../etc/passwd", "‮", "e" * 9, "True")


class Broken(Exception):
    """A case that broke its promise."""


# -- replies ----------------------------------------------------------------------------------------------------------


def odd_array(draw: random.Random, shape: tuple[int, ...]) -> Array:
    """Return an array that is wrong in one of many ways, or only strange in its numbers."""
    kind = draw.randrange(9)
    values = np.array([draw.choice(NUMBERS) for _ in range(math.prod(shape))], np.float64).reshape(shape)
    with np.errstate(over="ignore"):
        plain = values.astype(np.float32)
    if kind <= 2:
        mixed = np.array([draw.gauss(0, 1) for _ in range(math.prod(shape))], np.float32).reshape(shape)
        if kind:
            mixed.flat[draw.randrange(mixed.size)] = plain.flat[0]
        with np.errstate(over="ignore"):
            return Array(mixed * np.float32(draw.choice((1, 1, 1e4, -50, 1e20, 1e-38))))
    if kind == 3:
        return Array(plain)
    if kind == 4:
        dtype = draw.choice(("float64", "float16", "int32", "int64", "bool", "complex64", ">f4", "U3", "S2"))
        return Array(np.zeros(shape).astype(dtype))
    if kind == 5:
        other = tuple(draw.choice((0, 1, 2, 3, 5, 7)) for _ in range(draw.randrange(5)))
        return Array(np.zeros(other, np.float32))
    good = Array(np.zeros(shape, np.float32))
    if kind == 6:  # the bytes say something else than the fields
        data = bytearray(good.data)
        for _ in range(draw.randrange(1, 12)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        cut = draw.choice((0, 0, 1, 7, len(data) // 2, len(data)))
        return Array(dtype="float32", shape=shape, stype="numpy.ndarray", data=bytes(data[: len(data) - cut]))
    if kind == 7:
        stype = draw.choice(("numpy.ndarray", "pickle", "", "torch"))
        return Array(
            dtype=draw.choice(("float32", "object", "")),
            shape=shape,
            stype=stype,
            data=draw.randbytes(draw.randrange(200)),
        )
    claimed = tuple(draw.choice((-1, 0, 2**31, 2**62, 3)) for _ in shape)
    return Array(
        dtype="float32",
        shape=draw.choice((shape, claimed)),
        stype="numpy.ndarray",
        data=good.data + b"\0" * draw.choice((0, 1, 5000)),
    )


def odd_reply(draw: random.Random, message: Message) -> Message:
    """Return a hostile reply to a message."""
    kind = draw.randrange(10)
    if kind == 0:
        return Message(Error(draw.randrange(-5, 300), draw.choice(TEXTS)), reply_to=message)
    arrays = {name: odd_array(draw, shape) for name, shape in zip(LAYOUT.names, LAYOUT.shapes)}
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        arrays.pop(draw.choice(list(arrays) or [""]), None)
    for _ in range(draw.choice((0, 0, 0, 1, 3))):
        arrays[draw.choice(TEXTS) or "none"] = odd_array(draw, (2,))
    if kind >= 7:  # well-formed and finite: what a careful attacker sends
        scale = draw.choice((0.0, 1e-38, 1e-3, 1.0, -8.0, 100.0, 1e4))
        arrays = {
            n: Array(np.array([scale * draw.gauss(0, 1) for _ in range(math.prod(s))], np.float32).reshape(s))
            for n, s in zip(LAYOUT.names, LAYOUT.shapes)
        }
    elif kind >= 5:  # only the numbers are odd
        with np.errstate(over="ignore"):
            arrays = {
                n: Array(np.full(s, draw.choice(NUMBERS)).astype(np.float32))
                for n, s in zip(LAYOUT.names, LAYOUT.shapes)
            }
    metrics: dict[str, Any] = {}
    if draw.random() < 0.9:
        metrics["num-examples"] = draw.choice((0, -5, 1, 10**9, 10**12, 2**62, [1, 2], *NUMBERS))
    for _ in range(draw.choice((0, 0, 1, 30))):
        metrics[draw.choice(TEXTS) + str(draw.randrange(99))] = draw.choice(
            ([0.5] * draw.choice((0, 3, 5000)), *NUMBERS)
        )
    content: dict[str, Any] = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord(metrics)}
    for key in ("arrays", "metrics"):
        if draw.random() < 0.05:
            content[key] = draw.choice((ConfigRecord({"a": b"x" * 100}), MetricRecord({"b": 1}), ArrayRecord({})))
        elif draw.random() < 0.05:
            del content[key]
    return Message(RecordDict(content), reply_to=message)


class HostileGrid:
    """A grid of eight clients of which three send odd replies, sometimes twice, sometimes to nobody's question."""

    def __init__(self, draw: random.Random, updates: Tensor) -> None:
        self.draw, self.updates, self.answers = draw, updates, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return list(range(1, NUM_CLIENTS + 1))

    def send_and_receive(self, sent: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = [self._reply(message, number) for number, message in enumerate(sent)]
        if self.draw.random() < 0.1 and replies:
            replies.append(self.draw.choice(replies))
        self.draw.shuffle(replies)
        return replies

    def push_messages(self, sent: Iterable[Message]) -> list[str]:
        for number, message in enumerate(sent):
            reply = self._reply(message, number)
            self.answers[reply.metadata.reply_to_message_id] = reply
        return list(self.answers)

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self.answers.pop(i) for i in list(ids) if i in self.answers]

    def _reply(self, message: Message, number: int) -> Message:
        message.metadata.__dict__["_message_id"] = f"{message.metadata.message_type}-{number}"
        client = message.metadata.dst_node_id - 1
        if message.metadata.message_type != "train":
            answer = ConfigRecord({"client": client, "role": "benign"})
            return Message(RecordDict({"whoami": answer}), reply_to=message)
        if client >= HONEST:
            return odd_reply(self.draw, message)
        content = {"arrays": to_record(self.updates[client], LAYOUT), "metrics": MetricRecord({"num-examples": 10})}
        return Message(RecordDict(content), reply_to=message)


def fuzz_reply(draw: random.Random) -> Outcome:
    """Play one round of eight clients, three of them hostile, under a median."""
    honest = torch.tensor([[draw.gauss(0, 1) for _ in range(LAYOUT.num_params)] for _ in range(HONEST)])
    claimed = draw.random() < 0.3
    rule = "mean()" if claimed else "median()"
    strategy = RobustStrategy(
        pipeline=Pipeline(spec.resolve("rule", rule)),
        step=ServerStep(spec.resolve("optimizer", "step()")),
        layout=LAYOUT,
        population=Population(NUM_CLIENTS),
        sample=lambda here, number: sorted(here),
        client_weights="claimed" if claimed else "uniform",
    )
    grid = cast(Grid, HostileGrid(draw, honest))
    start = to_record(torch.zeros(LAYOUT.num_params), LAYOUT)
    sent = list(strategy.configure_train(1, start, ConfigRecord(), grid))
    strategy.aggregate_train(1, grid.send_and_receive(sent, timeout=5))
    outcome, model = strategy.outcome, strategy.model
    seen = sorted([*outcome.clients, *outcome.dropped])
    if seen != list(range(NUM_CLIENTS)) or not set(range(HONEST)) <= set(outcome.clients):
        raise Broken(f"used {outcome.clients}, dropped {outcome.dropped}")
    if not all(reason and reason.isprintable() and len(reason) <= 160 for reason in outcome.dropped.values()):
        raise Broken(f"a reason is empty or can reach a terminal: {outcome.dropped}")
    if not bool(model.isfinite().all()):
        raise Broken("the model is not finite")
    low, high = honest.min(0).values, honest.max(0).values
    if not claimed and not bool(((model >= low) & (model <= high)).all()):
        raise Broken(f"three of eight moved the median out of the honest clients' range: {model.tolist()}")
    return f"{len(outcome.dropped)} of 3 dropped"


# -- settings ---------------------------------------------------------------------------------------------------------

KNOWN = ("num_clients", "clients_per_round", "rule", "attack", "malicious_clients", "tau", "gate_eps", "seed")
VALUES = (
    0,
    -1,
    1,
    2**70,
    True,
    False,
    0.5,
    math.nan,
    math.inf,
    -1e308,
    "",
    "mean()",
    "krum(num_byzantine=2)",
    "7-3",
    "200%",
    [],
    {},
    None,
)
PIECES = (
    "krum", "(", ")", "num_byzantine=", "2", "|", ",", "'", '"', "__import__('os')", "lambda: 1", "\n", "\x00",
    "mean()", "[1", "{", "1e999", "-", "(" * 60, "median", "=", "*", "**{}", "scale_update(factor=2.0)", "sgd(lr=",
    "é", " ",
)  # fmt: skip


def odd_text(draw: random.Random) -> str:
    """Return text that looks a little like a component."""
    return "".join(draw.choice(PIECES) for _ in range(draw.randrange(1, 9)))


def toml_scalar(draw: random.Random) -> str:
    value = draw.choice((*VALUES, odd_text(draw)))
    try:
        return json.dumps(value)
    except ValueError:
        return "nan"


def fuzz_setting(draw: random.Random) -> Outcome:
    """Read odd settings, as values, as text of a component, or as an experiment file."""
    keys = list(RunConfig().settings())
    kind = draw.randrange(3)
    try:
        if kind == 0:
            names = [draw.choice((*keys, "rule", "nmae", "")) for _ in range(draw.randrange(1, 4))]
            valid = {key: value for key, value in RunConfig().settings().items() if draw.random() < 0.2}
            config = RunConfig.read({**valid, **{name: draw.choice((*VALUES, odd_text(draw))) for name in names[:1]}})
            few = {name: draw.choice((1, 2, 0.5, "", "median()", "1-3")) for name in KNOWN if draw.random() < 0.2}
            config = config.replace(**few)
            config.resolve_components()
        elif kind == 1:
            spec.resolve_chain(draw.choice(list(spec.PACKAGES)), odd_text(draw))
        else:
            lines = [f"title = {toml_scalar(draw)}"] if draw.random() < 0.5 else []
            tables = (
                "settings",
                "arms.a",
                "arms.b",
                "grid",
                "map",
                "variants.v",
                "pretrain",
                "paper.p",
                "figure",
                "nothing",
            )
            for table in draw.sample(tables, draw.randrange(1, 4)):
                lines.append(f"[{table}]")
                lines += [
                    f"{draw.choice((*keys, 'label', 'extra', 'rows', 'x'))} = {toml_scalar(draw)}"
                    for _ in range(draw.randrange(3))
                ]
            if draw.random() < 0.2:
                lines.insert(draw.randrange(len(lines) + 1), odd_text(draw))
            path = FOLDER / "experiment.toml"
            path.write_text("\n".join(lines), encoding="utf-8")
            experiment = read_experiment(str(path), {})
            return "read" if experiment.arms else "no arm"
    except HawthornError as error:
        if not str(error).strip():
            raise Broken("refused without a word") from error
        return "refused"
    return "read"


# -- what the certification service is sent ---------------------------------------------------------------------------


def spoil(draw: random.Random, content: bytes) -> bytes:
    """Return bytes with a few of them changed, cut, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(5)
        if kind == 0 and data:
            data[place % len(data)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del data[place : place + draw.choice((1, 4, 64))]
        elif kind == 2:
            data[place:place] = draw.randbytes(draw.choice((1, 4, 64)))
        elif kind == 3:
            data[place : place + 4] = struct.pack(
                "<f", draw.choice([n for n in NUMBERS if abs(n) < 3.5e38 or math.isinf(n) or n != n])
            )
        else:
            data[place:place] = data[: draw.randrange(64)]
    return bytes(data)


def fuzz_model(draw: random.Random) -> Outcome:
    """Read a spoiled model or a spoiled certification set as the service does."""
    if not BLOBS:
        network = Network.from_module(
            torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)), (6,)
        )
        BLOBS.append(wire.model_file(network))
        BLOBS.append(wire.set_file(torch.rand(4, 6), torch.tensor([0, 1, 2, 0])))
    which = draw.randrange(2)
    path = FOLDER / "blob"
    path.write_bytes(spoil(draw, BLOBS[which]))
    try:
        read: Any = wire.read_model(path) if which == 0 else wire.read_set(path, max_points=1000)
    except HawthornError as error:
        if not str(error).strip():
            raise Broken("refused without a word") from error
        return "refused"
    tensors = [t for t in (vars(read).values() if hasattr(read, "__dict__") else read) if isinstance(t, Tensor)]
    if not all(bool(t.isfinite().all()) for t in tensors if t.is_floating_point()):
        raise Broken("numbers that are not finite were taken")
    return "read"


REQUESTS = ("CertifySmoothingRequest", "CheckZonotopeRequest", "GateRequest", "UploadRequest", "GetModelRequest")


def fuzz_message(draw: random.Random) -> Outcome:
    """Decode spoiled bytes of a request, or check a request of odd numbers and texts."""
    kind = getattr(pb, draw.choice(REQUESTS))
    message = kind()
    fill(draw, message, 0)
    content = message.SerializeToString()
    if draw.random() < 0.6:
        try:
            message = kind.FromString(spoil(draw, content))
        except DecodeError:
            return "no message"
    check = CHECKS.get(type(message).__name__)
    if check is None:
        return "read"
    try:
        check(message)
    except HawthornError as error:
        if not str(error).strip():
            raise Broken("refused without a word") from error
        return "refused"
    return "read"


def fill(draw: random.Random, message: Any, depth: int) -> None:
    """Fill a message with odd values."""
    for field in message.DESCRIPTOR.fields:
        if draw.random() < 0.3 or depth > 3:
            continue
        many = draw.choice((0, 1, 3, 40)) if field.is_repeated else 1
        for _ in range(many):
            if field.message_type is not None:
                inner = getattr(message, field.name)
                fill(draw, inner.add() if field.is_repeated else inner, depth + 1)
                if not field.is_repeated:
                    inner.SetInParent()
                continue
            value = odd_value(draw, field)
            if field.is_repeated:
                getattr(message, field.name).append(value)
            else:
                setattr(message, field.name, value)


def odd_value(draw: random.Random, field: Any) -> Any:
    kind = field.cpp_type
    if kind in (field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT):
        return draw.choice(NUMBERS)
    if kind == field.CPPTYPE_BOOL:
        return draw.random() < 0.5
    if kind == field.CPPTYPE_STRING:
        if field.type == field.TYPE_BYTES:
            return draw.randbytes(draw.choice((0, 8, 300)))
        return draw.choice((*TEXTS, "0" * 64, "{}", '{"a": NaN}', "[1", "paper", "hardened", "float64"))
    return draw.choice((0, 1, 7, 2**16, 2**31 - 1, 2**32 - 1 if kind == field.CPPTYPE_UINT32 else 2**64 - 1))


CHECKS: dict[str, Callable[[Any], Any]] = {
    "CertifySmoothingRequest": messages.smoothing,
    "CheckZonotopeRequest": messages.zonotope,
    "GateRequest": lambda request: (
        messages.settings(request),
        messages.policy(request.policy),
        messages.state(request.state),
    ),
}
BLOBS: list[bytes] = []
FOLDER = Path(tempfile.gettempdir())  # `main` and the tests name one of their own
# What is fuzzed: function and share of the cases.
KINDS: dict[str, tuple[Callable[[random.Random], Outcome], float]] = {
    "replies": (fuzz_reply, 0.3),
    "settings": (fuzz_setting, 0.3),
    "models": (fuzz_model, 0.2),
    "messages": (fuzz_message, 0.2),
}


def fuzz(kind: str, cases: int, seed: int, folder: Path) -> tuple[Counter[Outcome], str]:
    """Try cases of a kind; return what became of them and, if one broke its promise, which and how."""
    global FOLDER
    FOLDER = folder
    function, counts = KINDS[kind][0], Counter[Outcome]()
    for number in range(cases):
        try:
            counts[function(random.Random(f"{seed}/{kind}/{number}"))] += 1
        except Exception as error:
            return counts, f"{kind} case {number} of seed {seed}: {type(error).__name__}: {error}"[:600]
    return counts, ""


def main() -> None:
    """Print a line for each kind; exit with 1 where a case broke its promise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    results: dict[str, dict[str, Any]] = {}
    whole = sum(KINDS[kind][1] for kind in given.only.split(","))
    with tempfile.TemporaryDirectory(prefix="hawthorn-fuzz-") as folder:
        for kind in given.only.split(","):
            begin, cases = time.perf_counter(), math.ceil(given.cases * KINDS[kind][1] / whole)
            counts, wrong = fuzz(kind, cases, given.seed, Path(folder))
            seconds = time.perf_counter() - begin
            results[kind] = {
                "cases": sum(counts.values()),
                "seconds": round(seconds, 1),
                "counts": counts,
                "broken": wrong,
            }
            said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
            said += f" BROKEN: {wrong}" if wrong else ""
            print(f"{kind}: {sum(counts.values())} cases in {seconds:.0f} s: {said}", flush=True)
    print(f"{sum(result['cases'] for result in results.values())} cases")
    if given.json:
        given.json.write_text(json.dumps(results, indent=2))
    sys.exit(any(result["broken"] for result in results.values()))


if __name__ == "__main__":
    main()
