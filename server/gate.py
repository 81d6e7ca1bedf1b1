"""The gate around every strategy: a round's model is measured, and taken only if the policy accepts it.

Source: the certified federated adversarial training paper ("CFAT", NFFL 2021), section 4; the policies are those of
`certify.gates`. The candidate is what mixing, rule, optimiser and transforms made; it is measured on training samples
that no client has and no reported accuracy comes from. A refused round is one that never happened: the model, what
rules and optimisers remember and what clients get next stay as they were.

It fails closed: whatever keeps a decision from being made (an error, a timeout, a service that is away or answers
another question) refuses the candidate, and the round's record says why. Deviation from the paper: with `gate-every`
above 1 candidates in between are taken on trial, and go with the next one that is rejected.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from logging import INFO, WARNING
from typing import Any

import torch
from flwr.common import log
from torch import Tensor

from certify.gate import BoundMetrics, GateDecision, GateMetrics, GateState, Policy, decide
from certify.gate_limits import limits
from certify.network import Network
from certify.service.measure import GateSettings, Labelled, measure
from server.crfl import network_of
from server.gate_service import RemoteMeasure, UnreachableError
from tasks.config import RunConfig
from tasks.errors import CertificationError, ConfigError, HawthornError, RecordError
from tasks.task import Task

PREFIX = "gate."  # in the checkpoint, of what the gate keeps
Measure = Callable[[Network, GateState], GateMetrics]  # raises where there are no metrics


@dataclass(frozen=True)
class GateRound:
    """What the gate did in a round; `accepted` is None where the candidate was taken on trial, unmeasured."""

    accepted: bool | None
    seconds: float
    where: str
    reasons: tuple[str, ...] = ()
    decision: GateDecision | None = None  # None where none was made
    limits: Mapping[str, tuple[float | None, float | None]] | None = None
    back_to: int | None = None  # the round whose model came back

    def to_record(self) -> dict[str, Any]:
        """Return it as strict JSON: a number that is not finite is text."""
        decision = self.decision
        return {
            "accepted": self.accepted,
            "reasons": list(self.reasons),
            "notes": [] if decision is None else list(decision.notes),
            "metrics": None if decision is None else _plain(asdict(decision.metrics)),
            "limits": _plain(dict(self.limits or {})),
            "num_accepted": None if decision is None else decision.state.num_accepted,
            "seconds": round(self.seconds, 4),
            "where": self.where,
            "back_to": self.back_to,
        }


class Gate:
    """Decides on the models of a run, in their order; `state` is what those that were accepted left behind."""

    def __init__(self, config: RunConfig, task: Task, measure: Measure, policy: Policy) -> None:
        self.config, self.task, self.measure, self.policy = config, task, measure, policy
        self.state = GateState()
        self.this_round: GateRound | None = None
        self.checked = self.trusted_round = 0  # the last rounds with a decision, and with a model that was accepted
        self.trusted: tuple[Tensor, dict[str, Tensor]] | None = None  # where models in between are taken on trial

    @staticmethod
    def of(config: RunConfig, task: Task) -> "Gate | None":
        """Return the gate of a run, None where its settings name none; raises `ConfigError`."""
        if not config.gate:
            return None
        policy, settings = config.component("gate")(), gate_settings(config)
        if policy.probes and not settings.probes:
            raise ConfigError(f"gate {config.gate} judges the probes: set gate-probes to true")
        points = held_out(task)
        if config.gate_service:
            return Gate(config, task, RemoteMeasure(config, settings, *points, policy), policy)
        return Gate(config, task, LocalMeasure(config, settings, *points), policy)

    def begin(self, vector: Tensor) -> dict[str, Any] | None:
        """Take the model ([params]) that the run starts from; one that was given is the first accepted one.

        A given model ends the warm-up, if it is good enough; raises `ConfigError` if the policy would refuse it.
        """
        self.trusted = (vector.clone(), {}) if self.config.gate_every > 1 else None
        if not self.config.from_model:
            return None  # nothing that was not trained can be what models are held against
        found = self._judge(vector, self.state, replace(self.policy, warmup_rounds=0))
        if found.decision is None or not found.accepted:
            raise ConfigError(f"the gate refuses the model that the run starts from: {'; '.join(found.reasons)}")
        self.state = replace(found.decision.state, num_accepted=max(1, self.policy.warmup_rounds))
        return found.to_record()

    def __call__(self, round: int, model: Tensor) -> str | None:
        """Return why the candidate ([params]) of a round is refused, or None where it is taken."""
        if not self._due(round):
            self.this_round = GateRound(None, 0.0, "", ("taken on trial: no measurement is due",))
            return None
        found = self.this_round = self._judge(model, self.state, self.policy)
        if found.decision is not None:
            self.state, self.checked = found.decision.state, round
        if found.accepted:
            log(INFO, "round %d: the gate accepts, %.1f s", round, found.seconds)
            return None
        return f"gate: {_short(found.reasons)}"

    def open(self) -> None:
        """Forget the round before."""
        self.this_round = None

    def settle(
        self, round: int, vector: Tensor, memory: dict[str, Tensor], skipped: str | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return model and memory after a round: those given, or the last accepted ones where a trial failed."""
        if self.trusted is None:
            return vector, memory
        found = self.this_round
        if skipped is None and found is not None and found.accepted:
            self.trusted, self.trusted_round = (vector.clone(), dict(memory)), round
            return vector, memory
        failed = found is not None and found.accepted is False and found.decision is not None
        if not failed and round < self.config.num_rounds:
            return vector, memory
        found = found or GateRound(None, 0.0, "", ("no run ends on a model taken on trial",))
        self.this_round = replace(found, back_to=self.trusted_round)
        log(WARNING, "round %d: back to the model of round %d, the last accepted", round, self.trusted_round)
        return self.trusted[0].clone(), dict(self.trusted[1])

    def tensors(self) -> dict[str, Tensor]:
        """Return what the checkpoint must hold for the gate to go on as if it had never stopped."""
        state = {"state": asdict(self.state), "checked": self.checked, "trusted_round": self.trusted_round}
        text = json.dumps(state, allow_nan=False).encode()
        kept = {f"{PREFIX}state": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
        if self.trusted is not None:
            kept[f"{PREFIX}model"] = self.trusted[0]
            kept |= {f"{PREFIX}memory.{name}": tensor for name, tensor in self.trusted[1].items()}
        return kept

    def restore(self, memory: dict[str, Tensor]) -> dict[str, Tensor]:
        """Take from a checkpoint's tensors what `tensors` put there; returns the others."""
        own = {name.removeprefix(PREFIX): tensor for name, tensor in memory.items() if name.startswith(PREFIX)}
        if "state" not in own:
            raise RecordError("the checkpoint holds nothing of the gate: the run was made without it; start it anew")
        values = json.loads(own.pop("state").numpy().tobytes())
        self.state = GateState(
            last_accepted=_metrics(values["state"]["last_accepted"]),
            best=_metrics(values["state"]["best"]),
            num_accepted=values["state"]["num_accepted"],
        )
        self.checked, self.trusted_round = values["checked"], values["trusted_round"]
        if "model" in own:
            model = own.pop("model")
            self.trusted = (model, {name.removeprefix("memory."): tensor for name, tensor in own.items()})
        return {name: tensor for name, tensor in memory.items() if not name.startswith(PREFIX)}

    def _due(self, round: int) -> bool:
        return round - self.checked >= self.config.gate_every or round == self.config.num_rounds

    def _judge(self, model: Tensor, state: GateState, policy: Policy) -> GateRound:
        """Measure a model and decide; whatever goes wrong on the way is a reason to refuse it."""
        begin, where = time.monotonic(), self.config.gate_service or "in process"
        decision: GateDecision | None = None
        reasons: tuple[str, ...] = ()
        try:
            metrics = self.measure(network_of(self.task, model), state)
            decision = decide(metrics, state, policy)
            reasons = decision.reasons
            allowed = limits(metrics, state, policy)
        except UnreachableError as error:
            reasons, allowed = (f"unreachable: {error}",), None
        except Exception as error:  # also what a hostile model brings about inside the certifier
            decision, allowed = None, None
            reasons = (f"not measured: {error if isinstance(error, HawthornError) else repr(error)}",)
            log(WARNING, "the gate could not measure a candidate", exc_info=not isinstance(error, HawthornError))
        seconds = time.monotonic() - begin
        return GateRound(decision is not None and decision.accepted, seconds, where, reasons, decision, allowed)


@dataclass(frozen=True)
class LocalMeasure:
    """Measures in this process, on threads of its own."""

    config: RunConfig
    settings: GateSettings
    validation: Labelled
    certification: Labelled

    def __call__(self, network: Network, state: GateState) -> GateMetrics:
        """Return the metrics; `CertificationError` where they take longer than gate-timeout."""
        end, timeout = time.monotonic() + self.config.gate_timeout, self.config.gate_timeout
        try:
            return measure(
                network, self.validation, self.certification, self.settings,
                workers=self.config.gate_workers or os.cpu_count() or 1, should_stop=lambda: time.monotonic() > end,
            )  # fmt: skip
        except CertificationError:
            if time.monotonic() > end:
                raise CertificationError(f"no metrics within gate-timeout, {timeout:g} s") from None
            raise


def gate_settings(config: RunConfig) -> GateSettings:
    """Return how a run measures its candidates."""
    return GateSettings(
        eps=config.gate_radii,
        attack_eps=config.gate_attack_eps,
        attack_steps=config.gate_attack_steps,
        attack_step_size=config.gate_attack_step_size or None,
        temperature=config.gate_temperature,
        probes=config.gate_probes,
        seed=config.seed,
    )


def held_out(task: Task) -> tuple[Labelled, Labelled]:
    """Return validation and certification points: training samples that no client has, inside [0, 1]."""
    found = []
    for name, index in (("gate-validation", task.validation), ("gate-certification", task.certification)):
        inputs, labels = task.dataset.batch("train", index)
        if not len(labels):
            raise ConfigError(f"{name} keeps no training sample from the clients; set gate and {name} together")
        if float(inputs.min()) < 0 or float(inputs.max()) > 1:
            raise ConfigError(f"the gate wants inputs from 0 to 1, as its radii are; {task.dataset.name} has others")
        found.append((inputs, labels))
    return found[0], found[1]


def _short(reasons: Sequence[str]) -> str:
    """Return the first reason, and how many others there are."""
    more = f" (and {len(reasons) - 1} more reasons)" if len(reasons) > 1 else ""
    return "".join(reasons[:1]) + more


def _metrics(values: dict[str, Any] | None) -> GateMetrics | None:
    if values is None:
        return None
    return GateMetrics(**{**values, "bounds": tuple(BoundMetrics(**bound) for bound in values["bounds"])})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
