"""Replay: what another rule would have made of the updates that a run stored.

Counterfactual, round by round: each round's updates come from clients that trained on the model the run really had.
The other rule's model is not carried on to the next round: replay tells what a rule selects, not where training ends.
Before anything is compared, the run's own aggregate is recomputed from the stored updates and checked.
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from hawthorn.compare import DASH, attacker_share, percent
from server.record import RoundRecord, RunRecord, read_beside, read_run, read_updates
from strategies.checks import update_norm
from strategies.context import RoundContext, needs
from strategies.pipeline import Pipeline
from tasks import spec
from tasks.errors import AggregationError, RecordError
from tasks.task import load

TOLERANCE = 1e-4  # relative; another number of threads or another machine changes the last bits of a float32 sum
NOTE = (
    "Counterfactual per round: every round starts from the model that the run really had; "
    "the replayed rule's model is not carried on to the next round."
)
CLAIMED = " The run weighted clients by claimed sample counts; the replayed rule does without."


@dataclass(frozen=True)
class ReplayRound:
    """One round under another rule; norms and distances are l2, lists follow `clients` (the usable replies)."""

    round: int
    clients: list[int]
    attacking: list[int]
    impossible: str | None  # why the rule gives no aggregate; everything below that concerns it is then None
    weights: list[float] | None  # None also for rules that weigh coordinates
    selected: list[int] | None  # clients with weight, or None
    share: float | None  # attackers' part of the weight
    norm: float | None  # of the aggregate
    cosine: float | None  # between the aggregate and the one the run used
    distance: float | None  # between the same two
    benign_distance: float | None  # from the aggregate to the mean of the benign updates, an oracle
    run_skipped: str | None
    run_share: float | None
    run_norm: float  # 0 in a skipped round: the model stayed
    run_benign_distance: float | None


@dataclass(frozen=True)
class ReplayResult:
    """A replayed run: its own rule, the other rule, and every round."""

    run: str
    run_rule: str
    rule: str
    note: str
    rounds: tuple[ReplayRound, ...]

    def to_json(self) -> str:
        """Return the result as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, allow_nan=False)


def replay(folder: Path, rule_text: str) -> ReplayResult:
    """Apply the rule that `rule_text` names to the stored updates of every round of the run in `folder`.

    Raises `RecordError` if updates are missing or do not reproduce the record, `SpecError` for an unknown rule.
    """
    run = read_run(folder)
    rule = Replayed(Pipeline(spec.resolve("rule", rule_text)), run)
    claimed = run.config.client_weights == "claimed"
    own = Replayed(Pipeline(run.config.component("rule"), run.config.chain("mixing")), run, claimed)
    if not run.rounds:
        raise RecordError(f"{run.folder} has no finished round to replay; its status is {run.status!r}")
    note = NOTE + (CLAIMED if run.config.client_weights == "claimed" else "")
    rounds = tuple(_replay_round(run, own, rule, record) for record in run.rounds)
    return ReplayResult(run.name, str(own), str(rule), note, rounds)


@dataclass
class Replayed:
    """Mixings and a rule on the rounds of a run, one after the other; what they remember is kept between rounds."""

    pipeline: Pipeline
    run: RunRecord
    claimed: bool = False
    memory: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    trusted: dict[str, Tensor] = dataclasses.field(default_factory=dict)  # what the last accepted round left

    @property
    def exposed(self) -> dict[int, int]:
        """Per round, how many replies were dropped for what they held."""
        return {record.round: record.exposed for record in self.run.rounds}

    def __str__(self) -> str:
        return " | ".join(map(str, (*self.pipeline.mixing, self.pipeline.rule)))

    def __call__(self, round: int, clients: list[int], stack: Tensor) -> tuple[list[float] | None, Tensor]:
        """Return (weights per client or None, aggregate [params] in float64), as the strategy computes them."""
        layout = load(self.run.config).layout if "history" in needs(self.pipeline.rule.function) else None
        beside = read_beside(self.run.folder, round)
        root, claims = beside.get("root_update"), beside.get("claims")
        if root is None and "root_update" in needs(self.pipeline.rule.function):
            raise RecordError(f"{self.pipeline.rule.name} wants the server's own update, and this run stored none")
        context = RoundContext(
            clients, round, self.run.config.seed, layout, None if root is None else lambda: root, dict(self.memory)
        )
        if claims is None and self.claimed:
            raise RecordError(f"{self.run.folder} stored no claims of samples, by which it weighted clients")
        scale = claims.tolist() if claims is not None and self.claimed else None
        result = self.pipeline.aggregate(stack, context, scale, self.exposed.get(round, 0))
        self.memory = context.memory
        return None if result.weights is None else result.weights.tolist(), result.vector.double()

    def settle(self, record: RoundRecord) -> None:
        """Forget with the run the rounds whose models its gate had taken on trial and gave up in this one."""
        gate = record.gate or {}
        if gate.get("back_to") is not None:
            self.memory = dict(self.trusted)
        elif gate.get("accepted"):
            self.trusted = dict(self.memory)


def _replay_round(run: RunRecord, own: Replayed, rule: Replayed, record: RoundRecord) -> ReplayRound:
    clients, stack = read_updates(run.folder, record.round)
    _check_stored(run, record, clients, stack)
    used, benign = _used_aggregate(run, own, record, stack), _benign_mean(record, stack)
    weights = aggregate = impossible = None
    if len(stack) < run.config.min_replies:
        impossible = f"{len(stack)} usable replies, min-replies is {run.config.min_replies}"
    else:
        try:
            weights, aggregate = rule(record.round, clients, stack)
        except AggregationError as error:
            impossible = str(error)
    if aggregate is not None and not torch.isfinite(aggregate).all():
        weights, aggregate, impossible = None, None, "the aggregate is not finite"
    own.settle(record)
    rule.settle(record)
    attacking = set(record.attacking)
    return ReplayRound(
        round=record.round,
        clients=clients,
        attacking=[c for c in clients if c in attacking],
        impossible=impossible,
        weights=weights,
        selected=None if weights is None else [c for c, w in zip(clients, weights, strict=True) if w != 0],
        share=attacker_share(clients, weights, attacking),
        norm=None if aggregate is None else update_norm(aggregate),
        cosine=_cosine(aggregate, used),
        distance=_distance(aggregate, used),
        benign_distance=_distance(aggregate, benign),
        run_skipped=record.skipped,
        run_share=None if record.skipped else attacker_share(clients, record.weights, attacking),
        run_norm=update_norm(used),
        run_benign_distance=_distance(used, benign),
    )


def _used_aggregate(run: RunRecord, own: Replayed, record: RoundRecord, stack: Tensor) -> Tensor:
    """Recompute the aggregate that the run applied ([params], float64), and check it against the record."""
    if record.skipped:
        return torch.zeros(stack.shape[1], dtype=torch.float64)
    where = f"{run.folder}, round {record.round}"
    try:
        used = own(record.round, record.clients, stack)[1]
    except AggregationError as error:
        raise RecordError(f"{where}: {own} refuses the stored updates, though not in the run: {error}") from None
    if not math.isclose(norm := update_norm(used), record.aggregate_norm, rel_tol=TOLERANCE, abs_tol=1e-9):
        raise RecordError(
            f"{where}: the stored updates and {own} give an aggregate of norm {norm:.8g}, "
            f"the record says {record.aggregate_norm:.8g}; updates and record do not belong together"
        )
    return used


def _check_stored(run: RunRecord, record: RoundRecord, clients: list[int], stack: Tensor) -> None:
    where = f"{run.folder}, round {record.round}"
    if clients != record.clients:
        raise RecordError(f"{where}: updates are stored for clients {clients}, the record names {record.clients}")
    for client, row, wanted in zip(clients, stack, record.norms, strict=True):
        if not math.isclose(norm := update_norm(row), wanted, rel_tol=TOLERANCE, abs_tol=1e-9):
            raise RecordError(
                f"{where}: the stored update of client {client} has norm {norm:.8g}, the record says {wanted:.8g}"
            )


def _benign_mean(record: RoundRecord, stack: Tensor) -> Tensor | None:
    rows = [row for row, client in enumerate(record.clients) if client not in set(record.attacking)]
    return stack[rows].mean(dim=0, dtype=torch.float64) if rows else None


def _distance(a: Tensor | None, b: Tensor | None) -> float | None:
    return None if a is None or b is None else update_norm(a - b)


def _cosine(a: Tensor | None, b: Tensor) -> float | None:
    """Return the cosine in [-1, 1], or None where a vector is 0."""
    if a is None or not (scale := update_norm(a) * update_norm(b)):
        return None
    return max(-1.0, min(1.0, float(a @ b) / scale))


def replay_table(result: ReplayResult) -> Table:
    """Return one row per round; `a → b` reads "in the run → with the replayed rule"."""
    table = Table(
        title=Text(f"{result.run}: {result.run_rule} → {result.rule}"),
        caption=Text(f"{result.note}\na → b: in the run → replayed. Attackers' share of the weight in %."),
    )
    for name in ("round", "weighted", "attackers", "share", "norm", "cosine", "distance", "to benign mean"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    for record in result.rounds:
        table.add_row(*(Text(cell) for cell in _cells(record)))
    return table


def _cells(record: ReplayRound) -> list[str]:
    chosen = record.selected
    notes = [f"not possible: {record.impossible}"] if record.impossible else []
    notes += [f"skipped in the run: {record.run_skipped}"] if record.run_skipped else []
    caught = None if chosen is None else len(set(chosen) & set(record.attacking))
    return [
        str(record.round),
        DASH if chosen is None else f"{len(chosen)} of {len(record.clients)}",
        DASH if caught is None else f"{caught} of {len(record.attacking)}",
        f"{percent(record.run_share)} → {percent(record.share)}",
        f"{record.run_norm:.4g} → {_number(record.norm)}",
        DASH if record.cosine is None else f"{record.cosine:.3f}",
        _number(record.distance),
        f"{_number(record.run_benign_distance)} → {_number(record.benign_distance)}",
        "; ".join(notes),
    ]


def _number(value: float | None) -> str:
    return DASH if value is None else f"{value:.4g}"
