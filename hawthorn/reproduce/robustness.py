"""Studies of robustness: what every arm's model came to, how the acceptance policies judge it, what an attack finds.

An experiment file says so in its table `[robustness]`:

[robustness]
kind = "rows"                   # a row per arm; or "points": accuracies against the number of certification points
at = [0.05, 0.25]               # radii at which the final model is attacked once more (none unless given)
points = 1000                   # held-out samples of that attack
[robustness.paper.mnist]        # the paper's figures of a variant, in percent and units of the loss
honest = [98.78, 92.03, [91.4, 0.15]]   # normal and adversarial accuracy, then [certified accuracy, loss] per radius
[robustness.variants.cifar]     # what a variant has otherwise
at = [0.00392, 0.03137]

The metrics are those the gate of a run measured on its last candidate; its start, an honest model, is the baseline of
the policies. The attack is PGD on logits divided by the gate's temperature, what exposes masked gradients.
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from certify.gate import HARDENED, PAPER, BoundMetrics, GateDecision, GateMetrics, GateState, decide
from certify.network import Network
from certify.pgd import pgd
from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.experiment import Arm
from hawthorn.reproduce.study import Study
from server.crfl import network_of
from server.record import RunRecord, read_model, read_run
from tasks.config import RunConfig
from tasks.errors import ConfigError
from tasks.rng import generator
from tasks.task import load

Kind = Literal["rows", "points"]
WANTED: dict[str, type] = {"kind": str, "at": list, "points": int, "paper": dict}
STEPS = 20
FILE = "attacked.json"  # beside a run: what the attack on its final model found


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's table: accuracies in percent, then (certified accuracy in percent, mean loss) per radius."""

    normal: float
    adversarial: float
    bounds: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Robustness:
    """What a study of robustness shows."""

    kind: Kind = "rows"
    at: tuple[float, ...] = ()
    points: int = 1000
    paper: Mapping[str, PaperRow] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """What one arm came to; without metrics `note` says why."""

    label: str
    shown: str
    seed: int
    note: str = ""
    paper: PaperRow | None = None
    certification: int = 0  # points
    start: GateMetrics | None = None
    found: GateMetrics | None = None
    decisions: Mapping[str, GateDecision] = field(default_factory=dict)  # policy -> what it says of `found`
    acc: float | None = None  # on the test split
    asr: float | None = None
    attacked: Mapping[float, float] = field(default_factory=dict)  # radius -> accuracy under the temperature attack
    seconds_train: float = 0.0  # of the last round: the attackers' cost
    seconds_gate: float = 0.0  # the server's


def read_robustness(study: Study) -> Robustness | None:
    """Read the table `[robustness]` of a study's file for its variant, None without one; raises `ConfigError`."""
    if study.path is None or (table := tomllib.loads(study.path.read_text()).get("robustness")) is None:
        return None
    own = table.pop("variants", {}).get(study.first.variant, {})
    table = {**table, **own}
    for key, value in table.items():
        if key not in WANTED or not isinstance(value, WANTED[key]):
            known = ", ".join(f"{name} ({kind.__name__})" for name, kind in WANTED.items())
            raise ConfigError(f"{study.path}: [robustness] has {known}; got {key} = {value!r:.60}")
    kind, at, points = table.get("kind", "rows"), table.get("at", []), table.get("points", 1000)
    if kind not in get_args(Kind):
        raise ConfigError(f"{study.path}: [robustness] kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    if points < 1 or not all(_number(eps) and eps >= 0 for eps in at):
        raise ConfigError(f"{study.path}: [robustness] wants radii from 0 and 1 point or more, got {at} and {points}")
    rows = table.get("paper", {}).get(study.first.variant, {})
    paper = {label: _paper_row(study.path, label, values) for label, values in rows.items()}
    return Robustness(kind, tuple(sorted(map(float, at))), points, paper)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _paper_row(path: Path, label: str, values: object) -> PaperRow:
    """Return one row of the paper's figures."""
    if isinstance(values, list) and len(values) >= 2 and all(map(_number, values[:2])):
        pairs = values[2:]
        if all(isinstance(pair, list) and len(pair) == 2 and all(map(_number, pair)) for pair in pairs):
            return PaperRow(float(values[0]), float(values[1]), tuple((float(a), float(b)) for a, b in pairs))
    raise ConfigError(
        f"{path}: [robustness.paper] {label} must be [normal, adversarial, [certified, loss], ...], got {values!r}"
    )


def measure_robustness(
    study: Study, shown: Robustness, outcomes: Mapping[str, Outcome] | None = None
) -> list[Measured]:
    """Return what every arm that is asked for or finished came to, arm by arm and seed by seed."""
    found = []
    for label in [arm.label for arm in study.first.arms]:
        for seed, arm in zip(study.seeds, study.arms(label), strict=True):
            if label in study.rows or _finished(arm):
                found.append(_measured(arm, seed, shown, outcomes or {}))
    return found


def _finished(arm: Arm) -> bool:
    return arm.config is not None and earlier_run(arm.config)[0] == "finished"


def _measured(arm: Arm, seed: int, shown: Robustness, outcomes: Mapping[str, Outcome]) -> Measured:
    row = Measured(arm.label, arm.shown, seed, paper=shown.paper.get(arm.paper))
    if arm.config is None:
        return replace(row, note=arm.problem)
    row = replace(row, certification=arm.config.gate_certification)
    outcome = outcomes.get(arm.config.name)
    if outcome is not None and not outcome.has_record:
        return replace(row, note=f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status)
    if not _finished(arm):
        return replace(row, note="not run")
    run = read_run(arm.config.run_folder)
    last = next((r for r in reversed(run.rounds) if r.gate and r.gate["metrics"]), None)
    if last is None or last.gate is None:
        return replace(row, note="no round was measured by a gate")
    start, now = metrics_of(((run.initial or {}).get("gate") or {}).get("metrics")), metrics_of(last.gate["metrics"])
    assert now is not None
    final = run.final
    return replace(
        row,
        start=start,
        found=now,
        decisions={} if start is None else judged(start, now),
        acc=final.acc if final else None,
        asr=final.asr if final else None,
        attacked=attacked(run, shown),
        seconds_train=last.seconds_train,
        seconds_gate=last.seconds_gate,
        note="; ".join([last.skipped] if last.skipped else []),
    )


def metrics_of(values: Mapping[str, Any] | None) -> GateMetrics | None:
    """Return the metrics that a record holds; a number that is not finite stands there as text."""
    if values is None:
        return None
    plain = {key: value for key, value in values.items() if key not in ("bounds", "protocol")}
    bounds = tuple(BoundMetrics(**{key: _float(value) for key, value in bound.items()}) for bound in values["bounds"])
    return GateMetrics(protocol=values["protocol"], bounds=bounds, **{key: _float(v) for key, v in plain.items()})


def _float(value: Any) -> Any:
    return None if value is None else float(value)


def judged(start: GateMetrics, found: GateMetrics) -> dict[str, GateDecision]:
    """Return what either policy says of `found` right after the honest model `start`, which ends a warm-up."""
    decisions = {}
    for policy in (PAPER, HARDENED):
        before = decide(start, GateState(), replace(policy, warmup_rounds=0)).state
        if before.num_accepted:
            state = replace(before, num_accepted=max(before.num_accepted, policy.warmup_rounds))
            decisions[policy.name] = decide(found, state, policy)
    return decisions


def attacked(run: RunRecord, shown: Robustness) -> dict[float, float]:
    """Return the final model's accuracy under the temperature attack at every radius; kept beside the run."""
    if not shown.at:
        return {}
    path, digest = run.folder / FILE, run.facts.get("sha256", "")
    asked = {"sha256": digest, "points": shown.points, "steps": STEPS, "temperature": run.config.gate_temperature}
    known: dict[str, Any] = {}
    if path.is_file():
        held = json.loads(path.read_text())
        known = held["accuracy"] if held["asked"] == asked else {}
    network, inputs, labels = _final_model(run.config, run.folder, shown.points)
    for eps in shown.at:
        if repr(eps) in known:
            continue
        known[repr(eps)] = pgd(
            network, inputs, labels, eps=eps, steps=STEPS, temperature=run.config.gate_temperature,
            generator=generator(run.config.seed, "reproduce", "attacked", repr(eps)),
        ).accuracy  # fmt: skip
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"asked": asked, "accuracy": known}, indent=1))
        os.replace(partial, path)
    return {eps: known[repr(eps)] for eps in shown.at}


def _final_model(config: RunConfig, folder: Path, points: int) -> tuple[Network, torch.Tensor, torch.Tensor]:
    """Return the run's model and the first `points` samples that its gate validates on."""
    task = load(config)
    vector = read_model(folder / "model.safetensors", task.layout)
    inputs, labels = task.dataset.batch("train", task.validation[:points])
    return network_of(task, vector), inputs.contiguous(), labels
