"""One Flower Strategy for every rule: messages in, one `[clients, params]` stack, rule, server step, messages out.

A round: seeded sample -> Flower messages -> replies checked one by one into the rows of one stack -> mixing and rule on
the updates -> global model plus eta times the optimiser's direction -> transforms. Too few usable replies, or a rule
whose precondition is broken, skip the round: the model and what the server remembers stay, and the reason is recorded.

A transform may leave clients another model than the released one, as CRFL does (`strategies.context.BROADCAST`).
Flower's own loop (`start`) hands the released model back; its clients get that other one all the same.

`gate` looks at the new model last of all: a candidate that it refuses makes a skipped round as well.

`collude` stands for attackers that see each other's updates, or everyone's, before they answer: it overwrites their
rows after all replies are in. Rows that a server would drop are dropped then, as if they had come that way.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from logging import INFO, WARNING

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from strategies.checks import claimed_examples, read_update, shorten, update_norm
from strategies.context import BROADCAST, RoundContext
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from tasks.errors import AggregationError
from tasks.params import Layout
from tasks.wire import from_record, to_record


@dataclass
class RoundOutcome:
    """What happened in a round, for the record: every list follows the order of `clients`, the usable replies."""

    round: int
    sampled: list[int] = field(default_factory=list)
    clients: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)  # client -> reason
    norms: list[float] = field(default_factory=list)  # l2 norms of the usable updates
    weights: list[float] | None = None  # weight per client in the aggregate; None: the rule weighs coordinates
    aggregate_norm: float = 0.0
    skipped: str | None = None  # why the round left the model as it was
    colluded: list[int] = field(default_factory=list)  # clients whose rows colluding attackers wrote
    collusion_failed: str | None = None  # why they could not
    exposed: int = 0  # replies dropped for what they held, which no honest client sends
    claims: list[float] | None = None  # samples per client, where they count
    root_update: Tensor | None = None  # [params]: the server's own, where the rule wants one
    updates: Tensor | None = None  # [clients, params]; a view that the next round overwrites


Collude = Callable[[int, list[int], Tensor], list[int]]  # (round, clients, stack to change) -> clients it changed


class RobustStrategy(FedAvg):
    """Robust aggregation by any rule of `strategies.rules`; usable wherever a Flower strategy is."""

    def __init__(
        self,
        *,
        pipeline: Pipeline,
        step: ServerStep,
        layout: Layout,
        population: Population,
        sample: Callable[[list[int], int], list[int]],
        seed: int = 0,
        root: Callable[[Tensor, int], Tensor] | None = None,
        collude: Collude | None = None,
        gate: Callable[[int, Tensor], str | None] | None = None,
        client_weights: str = "uniform",
        min_replies: int = 1,
        max_update_norm: float = 1e6,
        round_timeout: float = 600.0,
    ) -> None:
        super().__init__(min_available_nodes=1, min_train_nodes=1, min_evaluate_nodes=1)
        pipeline.check(claimed=client_weights == "claimed")
        self.pipeline, self.step, self.layout, self.population, self.sample = pipeline, step, layout, population, sample
        self.seed, self.root, self.collude, self.client_weights = seed, root, collude, client_weights
        self.gate = gate  # (round, candidate [params]) -> why it is refused, or None
        self.min_replies, self.max_update_norm, self.round_timeout = min_replies, max_update_norm, round_timeout
        self.outcome = RoundOutcome(0)
        self.model = torch.zeros(layout.num_params)  # what clients got; after a round that succeeds, its result
        self._released: Tensor | None = None  # the last round's result
        self.memory: dict[str, Tensor] = {}  # what rules and optimisers keep from round to round
        self._sent: dict[str, int] = {}  # message id -> node id, of this round
        self._messages: list[Message] = []
        self._stack = torch.empty(0)

    def summary(self) -> None:
        """Log the strategy's settings."""
        mixing = " | ".join(map(str, self.pipeline.mixing)) or "none"
        log(INFO, "\tmixing %s, rule %s, client weights %s", mixing, self.pipeline.rule, self.client_weights)
        log(INFO, "\toptimizer %s, server step %g", self.step.optimizer, self.step.server_lr)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Sample clients and make their messages, which all share one content.

        The messages outlive the round's deadline on purpose: a late reply tells that its sender is free again.
        """
        # a tensor of its own: the last round's result is the caller's, who keeps it where this round is skipped
        self.model = torch.empty(self.layout.num_params)
        from_record(arrays, self.layout, self.model)
        instead = self.memory.get(BROADCAST)
        if instead is not None and self._released is not None and torch.equal(self.model, self._released):
            self.model = instead.clone()
            arrays = to_record(self.model, self.layout)
        available = self.population.refresh(grid)
        sampled = self.sample(available, server_round)
        self.outcome = RoundOutcome(server_round, sampled=sampled)
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "server-round": server_round})})
        self._messages = [
            Message(content, self.population.node_of[c], "train", group_id=str(server_round)) for c in sampled
        ]
        return self._messages

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server evaluates on its own data, clients' numbers prove nothing."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return None; see `configure_evaluate`."""
        return None

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check replies, aggregate, step; returns the new model, or None when the round is skipped."""
        outcome, claims = self.outcome, self._collect(replies)
        stack, claims = self._with_collusion(self._stack[: len(outcome.clients)], claims)
        outcome.updates = stack
        metrics = MetricRecord({"usable-replies": len(stack), "dropped-replies": len(outcome.dropped)})
        model = self._try_round(stack, claims)
        if model is None:
            outcome.weights, outcome.aggregate_norm = None, 0.0
            log(WARNING, "round %d skipped, the model stays: %s", server_round, outcome.skipped)
            return None, metrics
        self.model = self._released = model
        return to_record(self.model, self.layout), metrics

    def _try_round(self, stack: Tensor, claims: list[float]) -> Tensor | None:
        """Return the new model ([params]), or None with the reason in the outcome; remembers only what succeeds."""
        outcome = self.outcome
        if len(stack) < self.min_replies:
            outcome.skipped = f"{len(stack)} usable replies, min-replies is {self.min_replies}"
            return None
        context = RoundContext(
            clients=outcome.clients,
            round=outcome.round,
            seed=self.seed,
            layout=self.layout,
            root=None if self.root is None else self._train_root,
            memory=dict(self.memory),
        )
        if self.client_weights == "claimed":
            outcome.claims = claims
        try:
            aggregate = self.pipeline.aggregate(stack, context, outcome.claims, outcome.exposed)
        except AggregationError as error:
            outcome.skipped = str(error)
            return None
        outcome.weights = None if aggregate.weights is None else aggregate.weights.tolist()
        outcome.aggregate_norm = update_norm(aggregate.vector)
        model = self.step(self.model, aggregate.vector, context)
        for variance in self.variances(model):
            variance.clamp_(min=0.0)  # a scaled update may overshoot below zero, where batch norm is not a number
        if not math.isfinite(update_norm(model)):
            outcome.skipped = "the new model is not finite"
            return None
        if self.gate is not None and (refused := self.gate(outcome.round, model)) is not None:
            outcome.skipped = refused
            return None
        self.memory = context.memory
        return model

    def _train_root(self) -> Tensor:
        assert self.root is not None
        self.outcome.root_update = self.root(self.model, self.outcome.round)
        return self.outcome.root_update

    def _with_collusion(self, stack: Tensor, claims: list[float]) -> tuple[Tensor, list[float]]:
        """Let colluding attackers write their rows; returns the rows, and claims, that are still usable."""
        outcome = self.outcome
        if self.collude is None or not len(stack):
            return stack, claims
        try:
            outcome.colluded = self.collude(outcome.round, outcome.clients, stack)
        except AggregationError as error:
            outcome.collusion_failed = str(error)
            log(WARNING, "round %d: the attackers cannot collude: %s", outcome.round, error)
        kept: list[int] = []
        for row, client in enumerate(outcome.clients):
            if client in outcome.colluded:
                outcome.norms[row] = norm = update_norm(stack[row])
                if not norm <= self.max_update_norm:
                    self._drop(client, f"update norm {norm:.3g}, max-update-norm is {self.max_update_norm:g}")
                    outcome.exposed += 1
                    continue
            kept.append(row)
        if len(kept) == len(stack):
            return stack, claims
        outcome.clients, outcome.norms = [outcome.clients[i] for i in kept], [outcome.norms[i] for i in kept]
        return stack[kept], [claims[i] for i in kept]

    def variances(self, model: Tensor) -> list[Tensor]:
        """Return views of the running variances of batch norm in a model's vector."""
        return [view for name, view in self.layout.split(model).items() if name.endswith("running_var")]

    def _collect(self, replies: Iterable[Message]) -> list[float]:
        """Write usable updates into the stack in order of client id; note every drop with its reason."""
        sent = {m.metadata.message_id: m.metadata.dst_node_id for m in self._messages}
        by_client: dict[int, Message] = {}
        for reply in replies:
            node = sent.pop(reply.metadata.reply_to_message_id, None)
            if node is not None:
                by_client[self.population.client_of[node]] = reply
        self.population.end_round({node: message_id for message_id, node in sent.items()})
        for node in sent.values():
            self._drop(self.population.client_of[node], f"no reply within {self.round_timeout:g} s")
        if self._stack.dim() != 2 or len(self._stack) < len(by_client):
            self._stack = torch.empty(len(by_client), self.layout.num_params)
        claims: list[float] = []
        for client in sorted(by_client):
            self._take(client, by_client.pop(client), claims)
        return claims

    def _take(self, client: int, reply: Message, claims: list[float]) -> None:
        row = self._stack[len(self.outcome.clients)]
        norm = read_update(reply, self.layout, self.model, self.max_update_norm, row)
        claim = claimed_examples(reply) if self.client_weights == "claimed" and not isinstance(norm, str) else 1.0
        for verdict in (norm, claim):
            if isinstance(verdict, str):
                self._drop(client, verdict)
                self.outcome.exposed += not reply.has_error()  # an honest client may fail, but sends no such thing
                return
        claims.append(float(claim))
        self.outcome.clients.append(client)
        self.outcome.norms.append(float(norm))

    def _drop(self, client: int, reason: str) -> None:
        self.outcome.dropped[client] = reason = shorten(reason)
        log(WARNING, "round %d: client %d dropped: %s", self.outcome.round, client, reason)
