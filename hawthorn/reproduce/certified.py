"""Certified curves of a run: the paper's certificate and those that hold for the released model, side by side.

- "paper": Corollary 1 of Xie et al., "CRFL" (ICML 2021), from M votes with the printed confidence bounds;
- "votes": sound, from the same M votes (Neyman and Pearson), a class chosen by 100 draws of their own before;
- "margin": sound and exact for softmax regression, nothing drawn.

The sound ones charge what the attackers do in the run: relabelled samples, inputs as long as they are.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from certify.bounds import Floats, crfl_top_two, two_stage
from certify.crfl.certificates import BrokenAssumption, certify_crfl
from certify.crfl.evidence import Evidence
from certify.crfl.training_record import TrainingRecord
from certify.network import Network
from certify.record import Certificate
from certify.smoothing.sampled import count_votes
from hawthorn.reproduce.figure import Line
from server.crfl import model_file, network_of, read_training_record
from server.record import read_model, read_run
from tasks.errors import CertificationError, RecordError
from tasks.task import load

WAYS = ("paper", "votes", "margin")
SELECTION_DRAWS = 100


@dataclass(frozen=True, eq=False)
class Found:
    """One way to certify one curve: a certificate per point, or none and the reason."""

    certificates: tuple[Certificate, ...] = ()
    problem: str = ""
    broken: tuple[str, ...] = ()  # assumptions that are known not to hold

    @property
    def radii(self) -> Floats:
        """Return the radius of every point; 0 where it abstained."""
        return np.array([certificate.radius for certificate in self.certificates])

    @property
    def abstained(self) -> float:
        """Return the share of points without a certificate."""
        return float(np.mean([certificate.label is None for certificate in self.certificates]))


@dataclass(frozen=True, eq=False)
class Certified:
    """One curve: the accuracy of the released model on its points, their labels, and what each way found."""

    line: Line
    seed: int
    labels: tuple[int, ...] = ()
    accuracy: float = float("nan")
    rounds: int = 0
    ways: dict[str, Found] = field(default_factory=dict)
    problem: str = ""  # why there is nothing


def certify_line(line: Line, folder: Path, seed: int, points: int) -> Certified:
    """Certify the first `points` test points (0: all) for the model of a curve; raises `RecordError`."""
    run = read_run(folder)
    number = line.rounds or len(run.rounds)
    task = load(run.config)
    vector = read_model(model_file(folder, number, len(run.rounds)), task.layout)
    network = network_of(task, vector)
    inputs, labels = task.dataset.batch("test", slice(0, points or None))
    with torch.no_grad():
        accuracy = float((network(inputs).argmax(1) == labels).double().mean())
    ways: dict[str, Found] = {}
    try:
        record = read_training_record(folder, number)
    except (RecordError, CertificationError) as error:
        ways = dict.fromkeys(WAYS, Found(problem=str(error)))
    else:
        ways = _ways(record, network, inputs, line, seed)
    return Certified(line, seed, tuple(labels.tolist()), accuracy, number, ways)


def _ways(record: TrainingRecord, network: Network, inputs: torch.Tensor, line: Line, seed: int) -> dict[str, Found]:
    margin = _found(lambda: certify_crfl(record, Evidence.margins(network, inputs)))
    sigma = record.smoothing_sigma
    if not sigma > 0:
        none = Found(problem="no noise was added, so there are no votes")
        return {"paper": none, "votes": none, "margin": margin}
    votes = count_votes(network, inputs, sigma=sigma, num_draws=line.draws, seed=seed)
    chosen = count_votes(
        network, inputs, sigma=sigma, num_draws=SELECTION_DRAWS, seed=seed, stream="votes/selection"
    ).counts
    printed = Evidence.from_votes(votes, crfl_top_two(votes.counts, line.draws, line.alpha))
    fresh = Evidence.from_votes(votes, two_stage(chosen, votes.counts, line.draws, line.alpha))
    return {
        "paper": _found(lambda: certify_crfl(record, printed, certificate="paper")),
        "votes": _found(lambda: certify_crfl(record, fresh)),
        "margin": margin,
    }


def _found(make: Callable[[], list[Certificate]]) -> Found:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BrokenAssumption)  # every certificate says it, and so does the table
        try:
            certificates = tuple(make())
        except CertificationError as error:
            return Found(problem=str(error))
    broken = tuple(a.name for a in certificates[0].assumptions if a.status == "violated")
    return Found(certificates, broken=broken)
