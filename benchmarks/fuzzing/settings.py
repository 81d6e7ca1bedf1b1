"""Odd settings: values of every type under every name, components with odd arguments, pairs of the command line.

What is read must be of use: its folders, ids and radii can be asked for, it comes back the same from Flower's TOML, a
component's text comes back the same from its own print, and a rule, mixing, optimiser or transform that takes odd
arguments refuses them when it is used, or makes a finite model.
"""

import dataclasses
import math
import random
import string
import tomllib
import typing
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import Tensor

from benchmarks.fuzzing import experiments
from benchmarks.fuzzing.case import NUMBERS, TEXTS, Broken, Outcome, refused
from benchmarks.fuzzing.replies import LAYOUT
from client.attack import read_attack
from hawthorn.engines._superlink import app_pyproject
from hawthorn.overrides import read_overrides
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from tasks import spec
from tasks.config import RunConfig
from tasks.errors import HawthornError
from tasks.wire import to_record

FIELDS = {field.name.replace("_", "-"): field for field in dataclasses.fields(RunConfig)}
WHOLE = (0, 1, -1, 2, 3, 7, 2**31, 2**63 - 1, 2**63, -(2**63) - 1, 10**400, 16**4000)
ODD_TEXTS = (
    *TEXTS,
    " ",
    "\n",
    "\t\t",
    "\ud800",
    "/",
    "..",
    ".",
    "~",
    "~nobody/x",
    "a/../b",
    "-",
    "7-3",
    "0-999999999999",
    "9" * 5000,
    "20%",
    "101%",
    "1e9%",
    "٣",
    "1/255,4/255",
    "1e999",
    "1/0",
    "0.1,0.1",
    "nan",
    "host:1:2",
    "\\",
    '"',
    "'",
    "{f}",
    "{}",
    "%s",
)
LITERALS = (
    "0",
    "1",
    "-1",
    "2",
    "8",
    "2.5",
    "-0.0",
    "1e-320",
    "1e308",
    "1e999",
    "-1e999",
    "nan",
    "None",
    "True",
    "'x'",
    "''",
    "()",
    "(1,)",
    "(1, 2)",
    "[]",
    "[1e999]",
    "{}",
    "{1: 2}",
    "{[]: 1}",
    "b'x'",
    "1+1j",
    "2**9",
    "0x" + "f" * 4000,
    "9" * 400,
    "-" * 300 + "1",
    "(" * 300 + "1" + ")" * 300,
    "x",
    "sgd()",
    "lambda: 1",
    "__import__('os')",
    "f'{1}'",
    "'\\x00'",
    "'\\ud800'",
    "...",
    "",
)
# For rules that are called: what takes neither long nor much memory.
CALLABLE = (
    "0",
    "1",
    "-1",
    "2",
    "3",
    "7",
    "8",
    "100",
    "0.0",
    "0.1",
    "0.49",
    "1.0",
    "-1.0",
    "1e-320",
    "1e-30",
    "1e30",
    "1e308",
    "None",
)
USED = ("mixing", "rule", "optimizer", "transform")


def fuzz_setting(draw: random.Random) -> Outcome:
    """Read odd settings in one of the ways in which they come."""
    way = draw.choice((values, values, component, component, used, used, pairs, experiments.file, experiments.file))
    try:
        return way(draw)
    except HawthornError as error:
        return refused(error)


def values(draw: random.Random) -> Outcome:
    """Read a few settings of odd values, then ask for all that follows from them."""
    chosen = {name: odd_value(draw, name) for name in draw.sample(list(FIELDS), draw.choice((1, 1, 2, 5)))}
    if draw.random() < 0.05:
        chosen[draw.choice(("nmae", "", "num_clients", "\x00", "rule "))] = 1
    config = RunConfig.read(chosen)
    config.resolve_components()
    _ = (
        config.run_folder,
        config.malicious_ids,
        config.num_sampled,
        config.defence,
        config.offence,
        config.replace(seed=7),
    )
    if config.gate and not all(radius >= 0 for radius in config.gate_radii):
        raise Broken(f"radii {config.gate_radii}")
    if tomllib.loads(app_pyproject(config.settings()))["tool"]["flwr"]["app"]["config"] != config.settings():
        raise Broken("Flower would hand on other settings than were read")
    return "read"


def odd_value(draw: random.Random, name: str) -> Any:
    """Return a value for a setting: near its range, of its kind, or of another."""
    field = FIELDS[name]
    low, high, kind = (field.metadata[key] for key in ("low", "high", "kind"))
    way = draw.random()
    if way < 0.25:
        return field.default
    if way < 0.35:
        return draw.choice((None, [], {}, (), b"x", True, *WHOLE, *NUMBERS, *ODD_TEXTS))
    if kind:
        return " | ".join(odd_component(draw, kind) for _ in range(draw.choice((1, 1, 1, 2))))
    if field.metadata["choices"]:
        return draw.choice((*field.metadata["choices"], "Text", ""))
    if isinstance(field.default, bool):
        return draw.random() < 0.5
    if isinstance(field.default, str):
        return draw.choice(ODD_TEXTS) if way < 0.8 else odd_text(draw)
    edges = [edge for edge in (low, high) if edge is not None]
    near = [edge + step for edge in edges for step in (-1, 0, 1)]
    if isinstance(field.default, int):
        return int(draw.choice((*near, *WHOLE)))
    return draw.choice((*map(float, near), *(math.nextafter(edge, -math.inf) for edge in edges), *NUMBERS, *WHOLE))


def odd_text(draw: random.Random) -> str:
    """Return a few characters of any kind."""
    letters = string.printable + "é√😀\x00\x1b\u202e\ud800"
    return "".join(draw.choice(letters) for _ in range(draw.randrange(30)))


def odd_component(draw: random.Random, kind: str, literals: tuple[str, ...] = LITERALS) -> str:
    """Return the text of a component of a kind whose arguments are right by name, mostly, and odd by value."""
    name = draw.choice(spec.names(kind))
    if draw.random() < 0.05:
        return draw.choice(
            (name, name[:-1] + "()", name + "(", name.upper() + "()", f"{name}(1)", f"{name}(**{{}})", "|", "()")
        )
    function = spec.find(kind, name)
    hints, written = typing.get_type_hints(function), []
    for key, parameter in spec.hyper_parameters(function).items():
        if parameter.default is not parameter.empty and draw.random() < 0.5:
            continue
        choices = typing.get_args(hints[key]) if typing.get_origin(hints[key]) is typing.Literal else ()
        value = repr(draw.choice(choices)) if choices and draw.random() < 0.7 else draw.choice(literals)
        written.append(f"{key}={value}")
    if draw.random() < 0.03:
        written.append(draw.choice(("x=1", "1", "*a", "**b", written[0] if written else "")))
    return f"{name}({', '.join(written)})"


def component(draw: random.Random) -> Outcome:
    """Read a chain of components; those that are read say themselves in the same words."""
    kind = draw.choice(list(spec.PACKAGES))
    text = " | ".join(odd_component(draw, kind) for _ in range(draw.choice((1, 1, 2, 4))))
    chain = spec.resolve_chain(kind, text)
    again = spec.resolve_chain(kind, " | ".join(map(str, chain)))
    if again != chain:
        raise Broken(f"{text!r} was read as {list(map(str, chain))}, which is read as {list(map(str, again))}")
    if kind == "attack":
        read_attack(text)
    elif kind == "schedule":
        chain[0]().attacks(0, [0, 3], draw.choice((1, 2, 1000)))
    elif kind == "gate":
        chain[0]()
    return "read"


def used(draw: random.Random) -> Outcome:
    """Play two rounds of eight honest clients with odd arguments in the defence."""
    texts = dict.fromkeys(("mixing", "transform"), "") | {"rule": "mean()", "optimizer": "step()"}
    for kind in draw.sample(USED, draw.choice((1, 1, 2))):
        texts[kind] = odd_component(draw, kind, CALLABLE)
    scale = draw.choice((0.0, 1e-30, 1e-3, 1.0, 1e4))
    strategy = RobustStrategy(
        pipeline=Pipeline(spec.resolve("rule", texts["rule"]), spec.resolve_chain("mixing", texts["mixing"])),
        step=ServerStep(
            spec.resolve("optimizer", texts["optimizer"]), spec.resolve_chain("transform", texts["transform"]),
            draw.choice((0.0, 1.0, 1e6)),
        ),
        layout=LAYOUT,
        population=Population(8),
        sample=lambda here, number: here,
        root=lambda model, number: torch.ones(LAYOUT.num_params),
    )  # fmt: skip
    grid, model, skipped = HonestGrid(draw, scale), torch.zeros(LAYOUT.num_params), 0
    for number in (1, 2):
        sent = list(strategy.configure_train(number, to_record(model, LAYOUT), ConfigRecord(), grid))  # type: ignore[arg-type]
        strategy.aggregate_train(number, grid.answer(sent))
        if strategy.outcome.skipped is not None:
            skipped += 1
            continue
        model = strategy.model
        if not bool(model.isfinite().all()):
            raise Broken(f"{texts} made a model that is not finite")
    return "skipped" if skipped else "used"


class HonestGrid:
    """Eight clients that answer as they should."""

    def __init__(self, draw: random.Random, scale: float) -> None:
        self.draw, self.scale, self.answers = draw, scale, dict[str, Message]()

    def get_node_ids(self) -> list[int]:
        return list(range(1, 9))

    def push_messages(self, sent: list[Message]) -> list[str]:
        for number, message in enumerate(sent):
            message.metadata.__dict__["_message_id"] = f"who-{number}"
            who = ConfigRecord({"client": message.metadata.dst_node_id - 1, "role": "benign"})
            self.answers[f"who-{number}"] = Message(RecordDict({"whoami": who}), reply_to=message)
        return list(self.answers)

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self.answers.pop(i) for i in ids if i in self.answers]

    def answer(self, sent: list[Message]) -> list[Message]:
        """Return the updates that a round asks for."""
        replies = []
        for number, message in enumerate(sent):
            message.metadata.__dict__["_message_id"] = f"train-{number}"
            content = {"arrays": to_record(self.update(), LAYOUT), "metrics": MetricRecord({"num-examples": 10})}
            replies.append(Message(RecordDict(content), reply_to=message))
        return replies

    def update(self) -> Tensor:
        return torch.tensor([self.scale * self.draw.gauss(1, 1) for _ in range(LAYOUT.num_params)])


def pairs(draw: random.Random) -> Outcome:
    """Read pairs of the command line, then the settings."""
    name = draw.choice((*FIELDS, *FIELDS, "nmae", ""))
    kind = FIELDS[name].metadata["kind"] if name in FIELDS else ""
    value = draw.choice(
        (
            str(draw.choice(NUMBERS)),
            draw.choice(ODD_TEXTS),
            odd_text(draw),
            "1",
            "'x'",
            "0x10",
            "1_0",
            "[1]",
            "1979-05-27",
        )
    )
    text = odd_component(draw, kind) if kind and draw.random() < 0.7 else value
    found = read_overrides([f"{name}{draw.choice(('=', '=', '=', '==', ' = ', ''))}{text}"])
    RunConfig.read(found).resolve_components()
    return "read"
