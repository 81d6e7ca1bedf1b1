"""What every way of running a round is given to do: the same models, data, batches and starting point."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from tasks.config import RunConfig
from tasks.prepare import catalogue
from tasks.source import DataSource

SEED, LEARNING_RATE, BATCH_SIZE = 1, 0.1, 64
NEVER = 10**9  # rounds between evaluations: after the initial model no way evaluates in the rounds that are measured


@dataclass(frozen=True)
class Workload:
    """One federation: every client takes part in every round, with one pass over its samples."""

    name: str
    model: str
    dataset: str
    clients: int
    samples: int  # per client
    rounds: int  # how many are run: the first, and those measured as steady

    def config(self, folder: Path, workers: int = 1) -> RunConfig:
        """Return the settings of this federation; one round more than measured, as the last one would evaluate."""
        offer_partitions()
        return RunConfig.read(
            {
                "name": self.name,
                "runs-dir": str(folder),
                "seed": SEED,
                "num-rounds": self.rounds + 1,
                "dataset": self.dataset,
                "model": self.model,
                "partition": f"equal_shares(samples={self.samples})",
                "num-clients": self.clients,
                "training": f"sgd(lr={LEARNING_RATE}, batch_size={BATCH_SIZE})",
                "rule": "mean()",
                "eval-every": NEVER,
                "workers": workers,
            }
        )


def workload(name: str, clients: int, samples: int, rounds: int) -> Workload:
    """Return a workload by name, with real MNIST where it is to be found; `rounds` includes the first."""
    model = MODELS[name]
    dataset = "digits()" if name == "tiny" else "mnist()" if has_mnist() else "digits(size=28)"
    return Workload(name, model, dataset, clients, samples, rounds)


MODELS = {"tiny": "logistic_regression()", "cnn12k": "small_cnn()", "cnn431k": "mnist_net()"}


def has_mnist() -> bool:
    """Whether MNIST's files are here (HAWTHORN_DATA or the cache)."""
    return any(status.ready for status in catalogue(DataSource.default()) if status.name == "mnist")


def offer_partitions() -> None:
    """Let settings of this process name the partitions of the benchmarks, beside the product's own."""
    path = importlib.import_module("tasks.partitions").__path__
    if (ours := str(Path(__file__).parent / "partitions")) not in path:
        path.append(ours)
