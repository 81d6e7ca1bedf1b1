"""The plain PyTorch loop, without any framework: what the others are measured against.

`by_hand` is the same loop in two forked processes with shared memory and nothing else: how fast two processes can be
on this machine.
"""

import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.ways.gate import Gate
from benchmarks.workloads import BATCH_SIZE, LEARNING_RATE, SEED, Workload
from tasks.dataset import Dataset
from tasks.params import model_vector
from tasks.rng import generator
from tasks.task import Task, load

State = dict[str, Tensor]


def plain(workload: Workload, gate: Gate, folder: Path, threads: int = 1) -> Tensor:
    """Train the clients one after the other and average; return the final model as a vector."""
    torch.set_num_threads(threads)
    task = load(workload.config(folder))
    model = task.build_model()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    accuracy(model, task.dataset)
    for number in range(1, workload.rounds + 1):
        total = {name: torch.zeros_like(value) for name, value in state.items()}
        train_clients(task, model, state, total, range(workload.clients), number)
        state = {name: value / workload.clients for name, value in total.items()}
        gate.end_round(number)
    model.load_state_dict(state)
    return model_vector(model)


def train_clients(task: Task, model: nn.Module, state: State, total: State, clients: range, number: int) -> None:
    """Train `clients` from the global `state` and add their models to `total`."""
    for client in clients:
        model.load_state_dict(state)
        train_client(model, task, client, number)
        for name, value in model.state_dict().items():
            total[name] += value


def train_client(model: nn.Module, task: Task, client: int, number: int) -> None:
    """Train `model` for one pass over a client's samples, in the batches that Hawthorn's clients use."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    indices = task.partition[client]
    shuffle = generator(SEED, "client", client, "round", number, "shuffle")
    for index in indices[torch.randperm(len(indices), generator=shuffle)].split(BATCH_SIZE):
        inputs, labels = task.dataset.batch("train", index)
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, dataset: Dataset, batch: int = 500) -> float:
    """Return the accuracy on the test split."""
    model.eval()
    total, right = len(dataset.test_labels), 0
    for start in range(0, total, batch):
        inputs, labels = dataset.batch("test", slice(start, start + batch))
        right += int((model(inputs).argmax(dim=1) == labels).sum())
    return right / total


def by_hand(workload: Workload, gate: Gate, folder: Path) -> Tensor:
    """Do what `plain` does in two processes, each with every other client."""
    torch.set_num_threads(1)
    task = load(workload.config(folder))
    model = task.build_model()
    state = {name: value.clone().share_memory_() for name, value in model.state_dict().items()}
    mine, theirs = ({n: torch.zeros_like(v).share_memory_() for n, v in state.items()} for _ in range(2))
    here, there = multiprocessing.Pipe()
    fork = multiprocessing.get_context("fork")
    helper = fork.Process(target=_help, args=(there, here, task, state, theirs, workload.clients), daemon=True)
    helper.start()
    there.close()
    accuracy(model, task.dataset)
    for number in range(1, workload.rounds + 1):
        here.send(number)
        _train_half(task, model, state, mine, range(0, workload.clients, 2), number)
        here.recv()
        for name, value in state.items():
            value.copy_((mine[name] + theirs[name]) / workload.clients)
        gate.end_round(number)
    here.close()
    helper.join()
    model.load_state_dict(state)
    return model_vector(model)


def _help(pipe: Connection, other: Connection, task: Task, state: State, total: State, num_clients: int) -> None:
    other.close()
    torch.set_num_threads(1)
    model = task.build_model()
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        _train_half(task, model, state, total, range(1, num_clients, 2), number)
        pipe.send(None)


def _train_half(task: Task, model: nn.Module, state: State, total: State, clients: range, number: int) -> None:
    for value in total.values():
        value.zero_()
    train_clients(task, model, state, total, clients, number)
