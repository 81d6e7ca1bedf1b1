"""Hawthorn's in-process engine: messages, checks, the rule `mean`, the run record, all as in `hawthorn run`."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.ways.gate import Gate
from benchmarks.workloads import Workload
from hawthorn.engines import in_process
from server.record import RoundRecord
from tasks.config import RunConfig


class EnoughRounds(Exception):
    """The measured rounds are over; ends a run before its last round, which would be the one that evaluates."""


def engine(workload: Workload, gate: Gate, folder: Path, workers: int) -> Tensor:
    """Run the federation with so many workers; return the final model as a vector."""
    torch.set_num_threads(1)
    config = workload.config(folder, workers)
    try:
        in_process.run(config, lambda record: pass_gate(record, workload, gate))
    except EnoughRounds:
        return last_model(config)
    raise RuntimeError("the run ended before the measured rounds did")


def pass_gate(record: RoundRecord, workload: Workload, gate: Gate) -> None:
    """Report a round, with its parts as the run record has them; stop after the last measured one."""
    if record.dropped or record.skipped or record.acc is not None:
        raise RuntimeError(f"round {record.round} is not what is to be measured: {record}")
    gate.end_round(record.round, train=record.seconds_train, aggregate=record.seconds_aggregate)
    if record.round == workload.rounds:
        raise EnoughRounds


def last_model(config: RunConfig) -> Tensor:
    """Return the model of the last finished round as a vector."""
    with safe_open(config.run_folder / "checkpoint.safetensors", "pt") as file:
        return file.get_tensor("vector")
