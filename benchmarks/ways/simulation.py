"""Flower's simulation on Ray: an ordinary Flower app with FedAvg, and Hawthorn's own apps on the same engine."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor, nn

from benchmarks.ways.engine import EnoughRounds, last_model, pass_gate
from benchmarks.ways.gate import Gate
from benchmarks.ways.plain import accuracy, train_client
from benchmarks.workloads import Workload, offer_partitions
from client import app as hawthorn_client
from server.federation import run_federation
from tasks.params import model_vector
from tasks.task import Task, load

ONE_CORE = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}


def flower(workload: Workload, gate: Gate, folder: Path) -> Tensor:
    """Run an ordinary Flower app with FedAvg; return the final model as a vector."""
    torch.set_num_threads(1)
    model = load(workload.config(folder)).build_model()
    server = flower_server(workload, model, gate, folder)
    run_simulation(server, flower_client(workload, folder), workload.clients, backend_config=ONE_CORE)
    return model_vector(model)


def flower_client(workload: Workload, folder: Path) -> ClientApp:
    """Return a ClientApp as Flower's tutorials write it; kinder than most, it keeps data and model between messages."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        task, model = at_hand(workload, folder)
        client, number = context.node_config["partition-id"], message.content["config"]["server-round"]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        train_client(model, task, int(client), int(number))  # type: ignore[arg-type]
        metrics = MetricRecord({"num-examples": len(task.partition[int(client)])})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


@functools.lru_cache(maxsize=1)
def at_hand(workload: Workload, folder: Path) -> tuple[Task, nn.Module]:
    """Return this process's task and model."""
    torch.set_num_threads(1)
    task = load(workload.config(folder))
    return task, task.build_model()


def flower_server(workload: Workload, model: nn.Module, gate: Gate, folder: Path) -> ServerApp:
    """Return a ServerApp with FedAvg over all clients; its final model ends up in `model`."""
    app = ServerApp()

    def after_round(number: int, arrays: ArrayRecord) -> MetricRecord | None:
        if number > 0:
            gate.end_round(number)
            return None
        return MetricRecord({"accuracy": accuracy(model, load(workload.config(folder)).dataset)})

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        everyone = workload.clients
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=everyone, min_available_nodes=everyone)
        start = ArrayRecord(model.state_dict())
        result = strategy.start(grid, start, num_rounds=workload.rounds, evaluate_fn=after_round)
        model.load_state_dict(result.arrays.to_torch_state_dict())

    return app


def hawthorn(workload: Workload, gate: Gate, folder: Path) -> Tensor:
    """Run Hawthorn's own apps on Flower's simulation; return the final model as a vector."""
    torch.set_num_threads(1)
    config = workload.config(folder)
    server, client = ServerApp(), ClientApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            run_federation(config, grid, lambda record: pass_gate(record, workload, gate))
        except EnoughRounds:
            return

    settings = config.settings()
    client.train()(with_settings(hawthorn_client.train, settings))
    client.query("whoami")(with_settings(hawthorn_client.whoami, settings))
    run_simulation(server, client, workload.clients, backend_config=ONE_CORE)
    return last_model(config)


def with_settings(
    answer: Callable[[Message, Context], Message], settings: dict[str, bool | int | float | str]
) -> Callable[[Message, Context], Message]:
    """Give a ClientApp's function the run's settings, which this way of starting a simulation does not pass on."""

    def call(message: Message, context: Context) -> Message:
        offer_partitions()
        told = Context(context.run_id, context.node_id, context.node_config, context.state, dict(settings))
        return answer(message, told)

    return call
