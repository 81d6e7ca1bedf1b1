"""Odd replies of three clients of eight, in one round under a median or a weighted mean."""

import math
import random
from collections.abc import Iterable
from typing import Any, cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from benchmarks.fuzzing.case import NUMBERS, TEXTS, Broken, Outcome
from benchmarks.grid import AnsweringGrid
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from tasks import spec
from tasks.params import Layout
from tasks.wire import to_record

LAYOUT = Layout(("conv.weight", "fc.weight", "fc.bias"), ((3, 4), (2, 5), (2,)), 24)
HONEST, HOSTILE = 5, 3
NUM_CLIENTS = HONEST + HOSTILE


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


class HostileGrid(AnsweringGrid):
    """A grid of eight clients of which three send odd replies, sometimes twice, sometimes to nobody's question."""

    def __init__(self, draw: random.Random, updates: Tensor) -> None:
        super().__init__(NUM_CLIENTS)
        self.draw, self.updates = draw, updates

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        replies = super().send_and_receive(messages, timeout=timeout)
        if self.draw.random() < 0.1 and replies:
            replies.append(self.draw.choice(replies))
        self.draw.shuffle(replies)
        return replies

    def train(self, message: Message, client: int) -> Message:
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
