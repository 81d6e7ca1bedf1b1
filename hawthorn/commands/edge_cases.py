"""`hawthorn edge-cases`: which samples of a pool are rare under a run's training data, as an edge set for attacks."""

import io
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from server.record import read_model, read_run
from tasks import spec
from tasks.dataset import Dataset
from tasks.edge_density import Method, cut, features, scores
from tasks.edge_set import read_edge_set
from tasks.errors import ConfigError
from tasks.params import bind
from tasks.rng import generator
from tasks.source import DataSource
from tasks.task import load

console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
METHODS = ("gaussian", "knn")


@dataclass(frozen=True)
class Pool:
    """Samples to look among, as the run's data set stores them."""

    name: str
    inputs: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Ranked:
    """A pool's scores, the cut, and what the model makes of each sample."""

    pool: Pool
    scores: torch.Tensor  # [samples]: the lower, the rarer
    predicted: torch.Tensor
    cut: float  # below it lies a share p of fresh samples
    order: torch.Tensor  # indices of the samples below the cut, the rarest first

    @property
    def share(self) -> float:
        """Share of the pool below the cut; of fresh samples it is p."""
        return len(self.order) / len(self.scores)


def edge_cases(
    run: Annotated[
        Path, typer.Argument(help="A finished run: its data set and its model are what rare is measured by.")
    ],
    pool: Annotated[
        str,
        typer.Option(
            help="Where to look: an edge set 'ardis()', a data set 'emnist_letters()', a file .npz or .txt, or test."
        ),
    ] = "test",
    p: Annotated[float, typer.Option(help="Rarer than this share of fresh samples of the data.")] = 0.05,
    method: Annotated[str, typer.Option(help="gaussian or knn.")] = "gaussian",
    neighbours: Annotated[int, typer.Option(help="For knn: which neighbour's distance counts.")] = 10,
    limit: Annotated[int, typer.Option(help="Keep this many of the rarest at most; 0: all below the cut.")] = 0,
    label: Annotated[int | None, typer.Option(help="The true label of all samples of a file without labels.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write them here, for edge='from_file(path=...)'.")] = None,
    samples: Annotated[int, typer.Option(help="Training samples that densities are fitted to.")] = 10_000,
    data_dir: Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")] = None,
) -> None:
    """Find edge cases: rank a pool by how unlikely it is under a run's training data, and cut at p."""
    found = rank(run, pool, p, method, neighbours=neighbours, label=label, samples=samples, data_dir=data_dir)
    kept = found.order[:limit] if limit else found.order
    console.print(_table(found, kept))
    console.print(
        f"{len(found.order)} of {len(found.scores)} samples ({100 * found.share:.1f} %) are rarer than {100 * p:g} % "
        "of the run's test samples",
        soft_wrap=True,
    )
    if out is not None:
        if not len(kept):
            raise ConfigError(f"no sample of {found.pool.name} lies below the cut; raise --p ({p}), or look elsewhere")
        write_edge_set(out, found, kept)
        console.print(f"edge set: {out}, as edge_case(edge=\"from_file(path='{out}', target=...)\")", soft_wrap=True)


def rank(
    folder: Path,
    pool: str,
    p: float,
    method: str,
    *,
    neighbours: int = 10,
    label: int | None = None,
    samples: int = 10_000,
    data_dir: str | None = None,
) -> Ranked:
    """Return a pool's ranking under the data and the final model of a finished run; raises `HawthornError`."""
    if method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    chosen: Method = "gaussian" if method == "gaussian" else "knn"
    config = read_run(folder).config
    config = config.replace(data_dir=os.path.abspath(data_dir)) if data_dir else config
    task = load(config)
    model, vector = task.build_model(), read_model(folder / "model.safetensors", task.layout)
    bind(model, task.layout, vector)
    data = task.dataset
    size = len(data.train_labels) - data.num_edge
    drawn = torch.randperm(size, generator=generator(config.seed, "edge_cases"))[:samples]
    inputs, labels = data.batch("train", drawn)
    train, _ = features(model, inputs)
    fresh, fresh_predicted = features(model, data.batch("test", slice(None))[0])
    limit_scores = scores(chosen, train, labels, fresh, neighbours)
    bound = cut(limit_scores, p)
    if pool == "test":
        found, values, predicted = Pool("test", data.test_inputs, data.test_labels), limit_scores, fresh_predicted
    else:
        found = _pool(pool, data, DataSource.default(config.data_dir or None), label)
        held = Dataset(
            "pool", found.inputs, found.labels, found.inputs[:0], found.labels[:0], data.num_classes, data.scale,
            vocabulary=data.vocabulary,
        )  # fmt: skip
        looked, predicted = features(model, held.batch("train", slice(None))[0])
        values = scores(chosen, train, labels, looked, neighbours)
    order = values.argsort(stable=True)
    return Ranked(found, values, predicted, bound, order[values[order] < bound])


def _pool(text: str, data: Dataset, source: DataSource, label: int | None) -> Pool:
    name = text.partition("(")[0].strip()
    if Path(text).expanduser().is_file():
        own = f", label={label}" if label is not None else ""
        text, name = f"from_file(path={text!r}, target=0{own}, test_share=0.5)", "from_file"
    if name in spec.names("edge"):
        found = read_edge_set(text, data, source)
        return Pool(
            name,
            torch.cat([found.train_inputs, found.test_inputs]),
            torch.cat([found.train_labels, found.test_labels]),
        )
    if name in spec.names("dataset"):
        other = spec.resolve("dataset", text)(source)
        if other.input_shape != data.input_shape or other.train_inputs.dtype != data.train_inputs.dtype:
            raise ConfigError(f"{text} has inputs of shape {other.input_shape}, and {data.name} of {data.input_shape}")
        return Pool(name, other.train_inputs, other.train_labels)
    known = ", ".join((*spec.names("edge"), *spec.names("dataset")))
    raise ConfigError(f"--pool wants test, a file, an edge set or a data set ({known}); got {text!r}")


def _table(found: Ranked, kept: torch.Tensor) -> Table:
    """Return a table of what is kept, by true label: number, median score, what the model calls it most often."""
    table = Table("true label", "kept", "of", "median score", "the model says", box=SIMPLE_HEAD, pad_edge=False)
    labels = found.pool.labels
    for label in labels.unique().tolist():
        chosen = kept[labels[kept] == label]
        said = found.predicted[chosen].bincount() if len(chosen) else torch.zeros(0)
        top = said.argsort(descending=True)[:3].tolist()
        table.add_row(
            str(label),
            str(len(chosen)),
            str(int((labels == label).sum())),
            f"{float(found.scores[chosen].median()):.4g}" if len(chosen) else "–",
            ", ".join(f"{each} ({int(said[each])})" for each in top if said[each] > 0),
        )
    return table


def write_edge_set(path: Path, found: Ranked, kept: torch.Tensor) -> None:
    """Write the samples to an .npz that the edge set `from_file` reads, dealt in a random order, with their scores.

    In order of rarity the test samples, which are the last, would be the least rare.
    """
    dealt = kept[torch.randperm(len(kept), generator=generator(0, "edge_cases", "deal"))]
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        inputs=found.pool.inputs[dealt].numpy(),
        labels=found.pool.labels[dealt].numpy(),
        scores=found.scores[dealt].numpy(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)
