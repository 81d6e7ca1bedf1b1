"""The ClientApp: a client says who it is, and trains when asked.

Its identity comes from `node_config` (``partition-id``); its role from ``role`` and ``attack`` there when it is a
process of its own, else from the run's ``malicious-clients`` and ``attack``.
"""

import functools
from dataclasses import dataclass

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.attack import NO_ATTACK, Attack, read_attack
from client.state import read_state, write_state
from client.trainer import LocalJob, honest
from tasks import task as tasks_task
from tasks.config import RunConfig
from tasks.errors import ConfigError
from tasks.params import bind
from tasks.task import Task
from tasks.wire import from_record, to_record

app = ClientApp()


@dataclass(frozen=True)
class Identity:
    """Who a client is in a run."""

    client: int
    malicious: bool
    attack: str


@app.query("whoami")
def whoami(message: Message, context: Context) -> Message:
    """Answer with this client's id and role; the server uses the id to name it, the role for the record only."""
    me = identify(read_config(context), context)
    answer = ConfigRecord({"client": me.client, "role": "malicious" if me.malicious else "benign"})
    return Message(RecordDict({"whoami": answer}), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train on this client's share from the global model in the message; reply with the trained model."""
    config = read_config(context)
    me = identify(config, context)
    round_number = int(message.content["config"]["server-round"])  # type: ignore[index, arg-type]
    run = workspace(config)
    from_record(message.content["arrays"], run.task.layout, run.start)  # type: ignore[arg-type]
    run.vector.copy_(run.start)
    attackers = config.malicious_ids
    job = LocalJob(
        dataset=run.task.dataset,
        indices=run.task.partition[me.client],
        model=run.model,
        layout=run.task.layout,
        start=run.start,
        vector=run.vector,
        client=me.client,
        round=round_number,
        seed=config.seed,
        rank=attackers.index(me.client) if me.client in attackers else me.client,
        num_attackers=len(attackers),
        state=read_state(context.state),
        settings=config,
        pool=pooled(config) if me.malicious else None,
        certification=run.task.certification if me.malicious else None,
    )
    attack = current_attack(config, me, job)
    result = attack(honest(config.component("training")))(job)
    write_state(context.state, job.state)
    arrays = to_record(result.vector, run.task.layout)
    if result.edit_reply is not None:
        arrays = result.edit_reply(arrays)
    metrics = MetricRecord({"num-examples": result.num_examples, "train-loss": result.loss, **result.metrics})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


def current_attack(config: RunConfig, me: Identity, job: LocalJob) -> Attack:
    """Return what a client does besides honest training in this round: nothing, unless its schedule says attack."""
    if not me.malicious:
        return NO_ATTACK
    schedule = config.component("attack_schedule")()
    return read_attack(me.attack) if schedule.attacks(me.client, config.malicious_ids, job.round) else NO_ATTACK


@functools.lru_cache(maxsize=2)
def pooled(config: RunConfig) -> torch.Tensor:
    """Return the training indices of all malicious clients of the settings, in the order of their ids."""
    shares = [workspace(config).task.partition[client] for client in config.malicious_ids]
    return torch.cat(shares) if shares else torch.zeros(0, dtype=torch.int64)


def identify(config: RunConfig, context: Context) -> Identity:
    """Read a client's id and role; an id outside the run's clients is an error."""
    client = context.node_config.get("partition-id")
    if not isinstance(client, int) or not 0 <= client < config.num_clients:
        raise ConfigError(f"node_config partition-id must be from 0 to {config.num_clients - 1}, got {client!r}")
    role = context.node_config.get("role")
    if role not in (None, "benign", "malicious"):
        raise ConfigError(f"node_config role must be benign or malicious, got {role!r}")
    malicious = role == "malicious" if role is not None else client in config.malicious_ids
    attack = str(context.node_config.get("attack", config.attack))
    if malicious and not attack and not config.collusion:
        raise ConfigError("a malicious client needs an attack, in its node_config or in the run's settings")
    return Identity(client, malicious, attack)


def read_config(context: Context) -> RunConfig:
    """Return the run's settings; parsed once per process and run."""
    return _read_config(tuple(sorted(context.run_config.items())))


@functools.lru_cache(maxsize=8)
def _read_config(items: tuple[tuple[str, bool | int | float | str], ...]) -> RunConfig:
    return RunConfig.read(dict(items))


@dataclass(frozen=True)
class Workspace:
    """What one process trains with: the task, one model, and the two vectors it works on."""

    task: Task
    model: torch.nn.Module
    start: torch.Tensor
    vector: torch.Tensor


@functools.lru_cache(maxsize=2)
def workspace(config: RunConfig) -> Workspace:
    """Return this process's workspace for a run; the model's parameters are views into its vector."""
    torch.set_num_threads(1)  # one core per client process: more only fight over the cores
    task = tasks_task.load(config)
    model, vector = task.build_model(), torch.empty(task.layout.num_params)
    bind(model, task.layout, vector)
    return Workspace(task, model, torch.empty_like(vector), vector)
