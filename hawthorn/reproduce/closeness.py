"""How close a run with an attack stays to its twin without one: the l2 distance of their models, round by round.

Xie et al., "CRFL" (ICML 2021), figure 9(a). Both runs have the same seed, so the same start, batches and noise; the
twin's attackers scale their honest update as the others do theirs (the paper's virtual training), or do nothing.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from hawthorn.reproduce.figure import Line
from server.crfl import model_file
from server.record import read_model, read_run
from tasks.errors import RecordError
from tasks.task import load

MAY_DIFFER = {"name", "attack", "malicious_clients", "attack_schedule", "runs_dir", "data_dir", "resume", "workers"}


@dataclass(frozen=True, eq=False)
class Distances:
    """Distances of two arms' models by round, or why there are none."""

    line: Line
    seed: int
    rounds: tuple[tuple[int, float], ...] = ()
    problem: str = ""


def closeness(attacked: Path, clean: Path) -> list[tuple[int, float]]:
    """Return (round, distance of the two released models) for every round whose models both runs kept.

    Raises `RecordError` for runs that differ in more than the attack, and where no round was kept by both.
    """
    first, second = read_run(attacked), read_run(clean)
    ours, theirs = vars(first.config), vars(second.config)
    if differ := [key for key in ours if key not in MAY_DIFFER and ours[key] != theirs[key]]:
        raise RecordError(f"{attacked} and {clean} are no twins; they differ in {', '.join(differ)}")
    layout, found = load(first.config).layout, []
    for number in range(1, min(len(first.rounds), len(second.rounds)) + 1):
        try:
            files = [model_file(run.folder, number, len(run.rounds)) for run in (first, second)]
        except RecordError:
            continue
        one, two = (read_model(file, layout).double() for file in files)
        found.append((number, float(torch.linalg.vector_norm(one - two))))
    if not found:
        raise RecordError(f"{attacked} and {clean} kept no model of one round; set keep-models = 1")
    return found
