"""What would go wrong only after training has begun, found before anything starts."""

import dataclasses
from pathlib import Path

import torch

from certify.service.measure import measure
from client.app import workspace
from client.attack import read_attack
from client.trainer import LocalJob, honest
from server.crfl import network_of
from server.gate import Gate, gate_settings, held_out
from server.gate_service import connect
from server.record import read_model
from strategies.context import RoundContext
from strategies.pipeline import Pipeline, ServerStep
from tasks.config import RunConfig
from tasks.errors import AggregationError, CertificationError, ConfigError
from tasks.rng import generator
from tasks.spec import hyper_parameters
from tasks.task import load

WIDTH = 64  # parameters of the updates that the rule is tried on


def preflight(config: RunConfig, elsewhere: bool = False) -> list[str]:
    """Raise `HawthornError` for settings that cannot work together; return warnings about those that look odd.

    `elsewhere`: the server is in another place, which may reach a service that this one does not.
    """
    config.resolve_components()
    task = load(config)
    if config.from_model:
        read_model(Path(config.from_model), task.layout)
    _try_collusion(config)
    _try_rule(config)
    _try_trigger(config)
    _try_training(config)
    _try_gate(config)
    return [*_odd_attack(config), *_odd_rule(config), *_odd_sizes(config), *_odd_gate(config, elsewhere)]


def _try_collusion(config: RunConfig) -> None:
    """Let the attackers collude, as many as their schedule brings into a round; what cannot work is refused."""
    if not (config.collusion and config.malicious_ids):
        return
    for attackers in sorted(_attackers_of_a_round(config)):
        known = attackers if config.knowledge == "own" else config.num_sampled - attackers
        draw = generator(config.seed, "preflight", "collusion")
        try:
            config.component("collusion")(
                torch.randn(known, WIDTH, generator=draw), attackers, config.num_sampled, draw
            )
        except AggregationError as error:
            raise ConfigError(
                f"collusion {config.collusion} is not possible with {attackers} attackers among {config.num_sampled} "
                f"replies a round: {error}"
            ) from None


def _attackers_of_a_round(config: RunConfig) -> set[int]:
    """Return how many attackers a round may have: those that the schedule forces into it, else their share."""
    schedule, malicious = config.component("attack_schedule")(), len(config.malicious_ids)
    rounds = range(1, min(config.num_rounds, 1000) + 1)
    present = {len(schedule.attackers(number, malicious)) for number in rounds} - {0}
    if not schedule.forced:
        present = {round(config.num_sampled * count / config.num_clients) for count in present} - {0}
    return {min(count, config.num_sampled) for count in present}


def _try_rule(config: RunConfig) -> None:
    """Aggregate as many random updates as a full round has, and take a step with the result."""
    draw = generator(config.seed, "preflight")
    updates, root = torch.randn(config.num_sampled, WIDTH, generator=draw), torch.randn(WIDTH, generator=draw)
    context = RoundContext(
        clients=range(config.num_sampled), seed=config.seed, root=(lambda: root) if config.root_samples else None
    )
    rule = Pipeline(config.component("rule"), config.chain("mixing"))
    step = ServerStep(config.component("optimizer"), config.chain("transform"), config.server_lr)
    try:
        step(torch.zeros(WIDTH), rule.aggregate(updates, context).vector, context)
    except AggregationError as error:
        before = f" after mixing {config.mixing}" if config.mixing else ""
        raise ConfigError(
            f"rule {config.rule}{before} cannot aggregate {config.num_sampled} replies a round: {error}"
        ) from None


def _try_trigger(config: RunConfig) -> None:
    """Trigger two test inputs as the evaluation will, and run the model on them."""
    task = load(config)
    inputs, labels = task.dataset.batch("test", slice(0, 2))
    attack = read_attack(config.attack)
    if attack.target_set is not None:
        attack.target_set(task.dataset, config.data_dir)
    elif attack.triggered is not None:
        inputs = attack.triggered(inputs, labels, task.dataset.num_classes)[0]
    task.build_model().eval()(inputs)


def _try_training(config: RunConfig) -> None:
    """Take one step of training as an honest client and as the first malicious one, on a few samples."""
    run, training = workspace(config), config.component("training")
    run.start.copy_(run.task.initial_vector())
    client = (*config.malicious_ids, 0)[0]
    job = LocalJob(
        dataset=run.task.dataset,
        indices=run.task.partition[client][:4],
        model=run.model,
        layout=run.task.layout,
        start=run.start,
        vector=run.vector,
        client=client,
        round=1,
        seed=config.seed,
        num_attackers=len(config.malicious_ids),
        settings=config,
        certification=run.task.certification,
        trial=True,
    )
    step = {"steps": 1} if "steps" in hyper_parameters(training.function) else {}
    for attack in ("", config.attack) if config.malicious_ids else ("",):
        run.vector.copy_(run.start)
        trainer = honest(dataclasses.replace(training, arguments={**training.arguments, **step}))
        read_attack(attack)(trainer)(job)


def _try_gate(config: RunConfig) -> None:
    """Measure the first model on two points of either kind; a model that no certifier can follow is refused."""
    task = load(config)
    if Gate.of(config, task) is None:
        return
    settings = dataclasses.replace(gate_settings(config), attack_steps=1)
    points = [(inputs[:2], labels[:2]) for inputs, labels in held_out(task)]
    try:
        measure(network_of(task, task.initial_vector()), points[0], points[1], settings)
    except CertificationError as error:
        raise ConfigError(f"the gate cannot measure model {config.model}: {error}") from None


def _odd_gate(config: RunConfig, elsewhere: bool = False) -> list[str]:
    """Say where a gate would let everything pass, stop training, or has nobody to ask."""
    if not config.gate:
        return []
    policy, warnings = config.component("gate")(), []
    if policy.warmup_rounds >= config.num_rounds and not config.from_model:
        warnings.append(f"gate {config.gate} compares no model of this run: its warm-up is as long as the run")
    if policy.two_sided and policy.warmup_rounds == 0 and not config.from_model:
        warnings.append(
            f"gate {config.gate} holds the second model against the first, and a loss that falls fast counts as a "
            "change: give warmup_rounds, or start from a trained model with from-model"
        )
    if config.gate_every > 1:
        warnings.append(f"gate-every is {config.gate_every}: clients train on models that were not measured yet")
    if config.gate_service and not elsewhere:
        with connect(config) as client:
            if not client.healthy():
                where = config.gate_service
                warnings.append(f"no certification service answers at {where} from here; without it rounds are skipped")
    return warnings


def _odd_attack(config: RunConfig) -> list[str]:
    if not config.malicious_ids:
        return ["collusion is set, but malicious-clients names nobody: there is no attack"] if config.collusion else []
    schedule, malicious = config.component("attack_schedule")(), config.malicious_ids
    rounds = range(1, config.num_rounds + 1)
    if not any(schedule.attackers(number, len(malicious)) for number in rounds):
        return [f"no attack falls into rounds 1 to {config.num_rounds}: attack-schedule is {config.attack_schedule}"]
    return []


def _odd_rule(config: RunConfig) -> list[str]:
    """Say where the attackers that a rule is meant for could end every round by not answering, or hide in buckets."""
    rule, mixing = config.component("rule"), config.chain("mixing")
    assumed = rule.arguments.get("num_byzantine")
    warnings = []
    if isinstance(assumed, float) and any(part.name == "bucketing" for part in mixing):
        warnings.append(
            f"{rule}: a share is of the buckets, and each attacker may spoil a bucket of its own; give a count"
        )
    if isinstance(assumed, int) and 0 < assumed < config.num_sampled and not mixing:
        left = torch.randn(config.num_sampled - assumed, WIDTH, generator=generator(config.seed, "preflight"))
        root = left.mean(0)
        try:
            Pipeline(rule).aggregate(left, RoundContext(range(len(left)), seed=config.seed, root=lambda: root))
        except AggregationError:
            warnings.append(
                f"{rule} skips a round in which {assumed} of {config.num_sampled} clients do not answer, "
                "as that many attackers may choose; sample more clients or lower num_byzantine"
            )
    return warnings


def _odd_sizes(config: RunConfig) -> list[str]:
    smallest = min(len(share) for share in load(config).partition)
    return [f"partition {config.partition} leaves a client without samples"] if smallest == 0 else []
