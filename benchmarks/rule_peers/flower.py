"""Flower's built-in strategies: `aggregate_train`, from the clients' replies to the new arrays, unpacking included.

The replies carry the updates where a federation would send models; to the arithmetic this is the same.
"""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy
from torch import Tensor

from benchmarks.rule_peers import Call, Case, hawthorn

STRATEGIES: dict[str, Callable[[int, int, int], Any]] = {  # of n, f and the f that Bulyan can take
    "mean": lambda n, f, q: strategy.FedAvg(),
    "median": lambda n, f, q: strategy.FedMedian(),
    "trimmed_mean": lambda n, f, q: strategy.FedTrimmedAvg(beta=f / n),
    "krum": lambda n, f, q: strategy.Krum(num_malicious_nodes=f),
    "multi_krum": lambda n, f, q: strategy.MultiKrum(num_malicious_nodes=f, num_nodes_to_select=n - f),
    "bulyan": lambda n, f, q: strategy.Bulyan(num_malicious_nodes=q),
}


def prepare(row: str, case: Case) -> Call | str:
    """Return the strategy of the same rule; its replies are made anew for every call, as it takes them apart."""
    if row not in STRATEGIES:
        return ""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    contestant = STRATEGIES[row](len(case.updates), case.f, hawthorn.quarter(case))

    def run(messages: list[Message]) -> Tensor:
        arrays, _ = contestant.aggregate_train(1, messages)
        return torch.from_numpy(np.array(next(iter(arrays.values())).numpy()))

    return Call(run, lambda: replies(case.updates))


def replies(updates: Tensor) -> list[Message]:
    """Return one reply per client, each with its update as the only array, of equally many examples."""
    made = []
    for node, update in enumerate(updates, 1):
        record = ArrayRecord({"w": Array(update.numpy())})
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10})})
        made.append(Message(content, reply_to=Message(RecordDict(), node, "train")))
    return made
