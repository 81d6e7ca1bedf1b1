"""Settings of a run: one frozen, checked dataclass.

Settings flow one way: defaults (`[tool.flwr.app.config]`, equal to the defaults here) -> run config ->
`RunConfig.read`, which checks every key, type and range. Flower checks keys only, and only scalars
travel, so components are written as text (see `tasks.spec`).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeAlias

import torch

from tasks import spec
from tasks.errors import ConfigError
from tasks.rng import generator

Scalar: TypeAlias = bool | int | float | str

CHAINS = ("attack", "mixing", "transform")  # kinds whose settings name any number of components
OPTIONAL = ("collusion", "gate")  # kinds whose settings may be empty
PATHS = ("runs_dir", "data_dir", "from_model", "gate_tls_ca", "gate_tls_cert", "gate_tls_key", "gate_token_file")


def setting(
    default: Scalar,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    kind: str = "",
    choices: tuple[str, ...] = (),
) -> Any:
    """Declare a setting: default, help line, inclusive range, component kind or choices of its text."""
    return dataclasses.field(
        default=default, metadata={"help": help, "low": low, "high": high, "kind": kind, "choices": choices}
    )


@dataclass(frozen=True)
class RunConfig:
    """Every setting of a run; the key in files and on the command line is the name with dashes."""

    # the run
    name: str = setting("run", "name of the run's folder")
    runs_dir: str = setting("runs", "folder that holds run folders")
    data_dir: str = setting("", "folder with data sets; empty: HAWTHORN_DATA, then the cache")
    seed: int = setting(1, "every random draw derives from it", low=0, high=2**63 - 1)
    num_rounds: int = setting(10, "rounds of training", low=0)
    resume: bool = setting(False, "continue the run folder's last finished round")
    from_model: str = setting("", "start from this model.safetensors")
    # the task
    dataset: str = setting("digits()", "data set", kind="dataset")
    model: str = setting("logistic_regression()", "model", kind="model")
    partition: str = setting("iid()", "how training samples are dealt to clients", kind="partition")
    num_clients: int = setting(10, "clients in the federation", low=1, high=1_000_000)
    clients_per_round: int = setting(0, "clients sampled each round; 0: all", low=0)
    training: str = setting("sgd()", "local training of honest clients", kind="training")
    # the defence
    mixing: str = setting("", "what happens to updates before the rule; parts joined with |", kind="mixing")
    rule: str = setting("mean()", "aggregation rule", kind="rule")
    optimizer: str = setting("step()", "server optimiser, after the rule", kind="optimizer")
    server_lr: float = setting(1.0, "server step size eta on the aggregate", low=0.0, high=1e6)
    transform: str = setting("", "what happens to the new model; parts joined with |", kind="transform")
    root_samples: int = setting(0, "training samples the server keeps for itself, taken from the clients", low=0)
    client_weights: str = setting(
        "uniform", "uniform, or claimed: weight by the sample counts clients claim", choices=("uniform", "claimed")
    )
    min_replies: int = setting(1, "usable replies below which a round is skipped", low=1)
    max_update_norm: float = setting(1e6, "an update with a larger l2 norm is dropped", low=0.0)
    # the gate on every round's model
    gate: str = setting("", "policy that a round's model must pass to be taken; empty: all pass", kind="gate")
    gate_every: int = setting(1, "rounds between measurements; a rejected model takes all rounds since with it", low=1)
    gate_eps: str = setting("0.1", "radii of the certified accuracies, as '0.1,0.15,0.25'")
    gate_attack_eps: float = setting(0.1, "radius of the gate's PGD", low=0.0, high=1e6)
    gate_attack_steps: int = setting(20, "steps of the gate's PGD", low=1, high=1000)
    gate_attack_step_size: float = setting(0.0, "its step size; 0: 2.5 radius / steps", low=0.0, high=1e6)
    gate_temperature: float = setting(100.0, "divides the logits under the temperature probe", low=1e-6, high=1e6)
    gate_probes: bool = setting(True, "also attack on the margin loss and at the temperature, and measure margins")
    gate_validation: int = setting(500, "training samples kept from the clients that the gate attacks", low=1)
    gate_certification: int = setting(100, "training samples kept from the clients that bounds are for", low=1)
    gate_workers: int = setting(0, "threads that measure in this process; 0: one per core", low=0, high=1024)
    gate_service: str = setting("", "measure on the certification service at HOST:PORT; empty: in this process")
    gate_timeout: float = setting(600.0, "seconds in which a service must have decided, pauses included", low=0.1)
    gate_attempts: int = setting(6, "how often a service that is away is asked in a round", low=1, high=100)
    gate_tls: bool = setting(False, "reach the service over TLS")
    gate_tls_ca: str = setting("", "PEM file of the authority that signed the service's certificate")
    gate_tls_cert: str = setting("", "PEM file of the certificate to show the service")
    gate_tls_key: str = setting("", "PEM file of its key")
    gate_token_file: str = setting("", "file with the service's token; the token itself is no setting")
    # the attack
    malicious_clients: str = setting("", "ids as '0,3,7-9', or a share as '20%'")
    attack: str = setting("", "what malicious clients do; parts joined with |", kind="attack")
    collusion: str = setting("", "what malicious clients send together, instead of their updates", kind="collusion")
    knowledge: str = setting(
        "all",
        "updates that colluding clients see: all benign ones, or those of their own clients",
        choices=("all", "own"),
    )
    attack_schedule: str = setting("continuous()", "when they do it", kind="schedule")
    # evaluation
    tau: float = setting(0.0, "predictions with a smaller confidence are rejected", low=0.0, high=1.0)
    eval_every: int = setting(1, "rounds between evaluations", low=1)
    # what is kept
    keep_updates: bool = setting(False, "store every usable update of every round, for replay")
    keep_models: int = setting(0, "store the global model every so many rounds; 0: only the last", low=0)
    # the machine
    round_timeout: float = setting(600.0, "seconds a round waits for replies", low=0.1)
    startup_timeout: float = setting(180.0, "seconds to wait for clients to come up", low=0.1)
    workers: int = setting(0, "processes that train in the in_process engine; 0: one per core, 1: no fork", low=0)
    # watching it
    metrics_port: int = setting(0, "port of the server's Prometheus metrics; 0: none", low=0, high=65535)
    log_format: str = setting("text", "the server's log: lines of text, or of JSON", choices=("text", "json"))
    tensorboard: bool = setting(False, "write TensorBoard's event files to the run's folder")

    @staticmethod
    def read(values: Mapping[str, Any]) -> "RunConfig":
        """Build settings from keys with dashes; unknown keys, types and ranges raise `ConfigError`."""
        fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(RunConfig)}
        arguments: dict[str, Scalar] = {}
        for key, value in values.items():
            if key not in fields:
                near = difflib.get_close_matches(key, fields, n=1)
                hint = f"did you mean {near[0]!r}? " if near else ""
                raise ConfigError(f"unknown setting {key!r}; {hint}there are: {', '.join(fields)}")
            arguments[fields[key].name] = _checked(key, value, fields[key])
        config = RunConfig(**arguments)  # type: ignore[arg-type]
        config._check_together()
        return config

    def settings(self) -> dict[str, Scalar]:
        """Return all settings as a flat mapping with dashed keys: what Flower's run config holds."""
        return {f.name.replace("_", "-"): getattr(self, f.name) for f in dataclasses.fields(self)}

    def replace(self, **changes: Scalar) -> "RunConfig":
        """Return a checked copy with some settings changed (names with underscores)."""
        return RunConfig.read({**self.settings(), **{k.replace("_", "-"): v for k, v in changes.items()}})

    @property
    def run_folder(self) -> Path:
        """The absolute folder of this run's record."""
        return (Path(self.runs_dir).expanduser() / self.name).resolve()

    @property
    def defence(self) -> str:
        """Everything between the updates and the new model but the plain step, joined with ``|``."""
        steps = (self.mixing, self.rule, "" if self.optimizer in ("step", "step()") else self.optimizer, self.transform)
        return " | ".join(step for step in steps if step.strip())

    @property
    def offence(self) -> str:
        """What malicious clients do, each alone and all together, joined with ``|``."""
        return " | ".join(part for part in (self.attack, self.collusion) if part.strip())

    @property
    def num_sampled(self) -> int:
        """Clients asked each round."""
        return self.clients_per_round or self.num_clients

    @property
    def malicious_ids(self) -> tuple[int, ...]:
        """Ids of the malicious clients: as listed, or a seeded draw of the given share."""
        return parse_clients(self.malicious_clients, self.num_clients, self.seed)

    @property
    def gate_radii(self) -> tuple[float, ...]:
        """Radii of the gate's certified accuracies, ascending, in input units."""
        return parse_radii(self.gate_eps)

    def component(self, key: str) -> spec.Component:
        """Return the component that a setting names, for example ``component("rule")``."""
        return spec.resolve(self._kind(key), getattr(self, key))

    def chain(self, key: str) -> tuple[spec.Component, ...]:
        """Return the chain of components that a setting names, for example ``chain("attack")``."""
        return spec.resolve_chain(self._kind(key), getattr(self, key))

    def resolve_components(self) -> None:
        """Resolve every component now, so that a typing error shows before anything starts."""
        for field in dataclasses.fields(self):
            if field.metadata["kind"] in CHAINS:
                self.chain(field.name)
            elif field.metadata["kind"] and (getattr(self, field.name) or field.metadata["kind"] not in OPTIONAL):
                self.component(field.name)

    def _kind(self, key: str) -> str:
        return next(f.metadata["kind"] for f in dataclasses.fields(self) if f.name == key)

    def _check_together(self) -> None:
        if self.clients_per_round > self.num_clients:
            raise ConfigError(f"clients-per-round is {self.clients_per_round}, but num-clients is {self.num_clients}")
        parts = self.name.split("/")
        if not re.fullmatch(r"[\w.+=@-]+(/[\w.+=@-]+)*", self.name) or any(part.startswith(".") for part in parts):
            raise ConfigError(
                f"name must be of letters, digits and . _ - + = @ /, no part starting with '.', got {self.name!r}"
            )
        for key in PATHS:
            _check_home(key.replace("_", "-"), getattr(self, key))
        if self.gate:
            parse_radii(self.gate_eps)
            if (self.gate_tls_cert == "") != (self.gate_tls_key == ""):
                raise ConfigError("gate-tls-cert and gate-tls-key go together, one of them is empty")
        if self.malicious_ids and not (self.attack or self.collusion):
            raise ConfigError(
                "malicious-clients are named, but attack and collusion are empty; set attack, for example 'sign_flip()'"
            )


def parse_clients(text: str, num_clients: int, seed: int) -> tuple[int, ...]:
    """Read client ids from '0,3,7-9', or draw a share such as '20%' (rounded, at least one) with the seed."""
    text = text.strip()
    if not text:
        return ()
    if share := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*%", text):
        fraction = float(share[1]) / 100
        if fraction > 1:
            raise ConfigError(f"malicious-clients is {text!r}: a share is at most 100%")
        count = max(1, round(fraction * num_clients)) if fraction > 0 else 0
        return tuple(sorted(torch.randperm(num_clients, generator=generator(seed, "malicious"))[:count].tolist()))
    ids: set[int] = set()
    for part in text.split(","):
        if not (match := re.fullmatch(r"\s*([0-9]{1,18})(?:\s*-\s*([0-9]{1,18}))?\s*", part)):
            raise ConfigError(f"cannot read malicious-clients {text!r}: write ids as '0,3,7-9' or a share as '20%'")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"malicious-clients names the range {part.strip()!r}; write the smaller id first")
        if max(first, last) >= num_clients:
            raise ConfigError(
                f"malicious-clients names client {max(first, last)}, but ids go from 0 to {num_clients - 1}"
            )
        ids.update(range(first, last + 1))
    return tuple(sorted(ids))


def parse_radii(text: str) -> tuple[float, ...]:
    """Read ascending radii from '0.1,0.15' or '1/255, 4/255'; raises `ConfigError`."""
    try:
        radii = tuple(_radius(part.strip()) for part in text.split(","))
    except (ValueError, ZeroDivisionError, OverflowError):
        raise ConfigError(f"gate-eps must be radii as '0.1,0.15,0.25' or '1/255,4/255', got {text!r}") from None
    if not all(0 <= radius <= 1e6 for radius in radii) or sorted(set(radii)) != list(radii):
        raise ConfigError(f"gate-eps must be ascending radii from 0, each once, got {text!r}")
    return radii


def _radius(text: str) -> float:
    """Read a number or a quotient of two, correctly rounded; `ValueError` for one that would take long to work out."""
    if not re.fullmatch(r"[0-9.+/-]{1,40}(?:[eE][+-]?[0-9]{1,3})?", text):
        raise ValueError(text)
    return float(Fraction(text))


def _check_home(key: str, path: str) -> None:
    try:
        Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(f"{key} is {path!r}, but this machine knows no such user's home folder") from None


def _checked(key: str, value: Any, field: dataclasses.Field[Any]) -> Scalar:
    wanted = type(field.default)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{key} must be {_type_name(wanted)}, got a whole number of more than 64 bits")
    if isinstance(value, str) and ("\0" in value or not _is_unicode(value)):
        raise ConfigError(f"{key} must be text without NUL and halves of characters, got {value[:100]!r}")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise ConfigError(f"{key} must be {_type_name(wanted)}, got {_shown(value)}")
    low, high, choices = field.metadata["low"], field.metadata["high"], field.metadata["choices"]
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} must be finite, got {_shown(value)}")
    if low is not None and value < low:
        raise ConfigError(f"{key} must be at least {low}, got {_shown(value)}")
    if high is not None and value > high:
        raise ConfigError(f"{key} must be at most {high}, got {_shown(value)}")
    if choices and value not in choices:
        raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    """Return a value as a message shows it; Python prints no whole number of more than 4300 digits."""
    try:
        return repr(value)[:200]
    except ValueError:
        return "a number too long to be shown"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _type_name(wanted: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[wanted]
