"""What is certified: a network from a model file and the text of its architecture, and points of a data set."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from certify.crfl.training_record import TrainingRecord
from certify.files.header import Header, ModelSource, PointSource, relative_to
from certify.network import Network
from certify.smoothing.votes import inputs_sha256
from tasks import spec
from tasks.dataset import Dataset, Split
from tasks.errors import ConfigError, DataError, RecordError
from tasks.model import build
from tasks.params import Layout, bind
from tasks.rng import generator
from tasks.source import DataSource


@dataclass(frozen=True, eq=False)
class Subject:
    """A network and points [points, ...] with their true labels [points], and where both came from."""

    network: Network
    inputs: Tensor
    labels: Tensor
    file: Path
    architecture: str
    dataset: str
    split: Split
    indices: tuple[int, ...]

    def sources(self, out: Path) -> tuple[ModelSource, PointSource]:
        """Return both as the header of the file `out` has them."""
        model = ModelSource(
            file=relative_to(self.file, out), architecture=self.architecture, sha256=self.network.sha256()
        )
        points = PointSource(
            dataset=self.dataset, split=self.split, indices=self.indices, labels=tuple(self.labels.tolist()),
            sha256=inputs_sha256(self.inputs),
        )  # fmt: skip
        return model, points


def from_run(
    model: Path, *, architecture: str | None, dataset: str | None, data_dir: str | None, split: Split = "test",
    first: int = 0, num_points: int = 0,
) -> Subject:  # fmt: skip
    """Return the subject of a model file or a run folder; what is not named is read from the run's run.json.

    The points are `num_points` of the split in its order, from number `first` on; 0 are all of the rest.
    """
    file = model / "model.safetensors" if model.is_dir() else model
    known = run_settings(file.parent) if architecture is None or dataset is None else {}
    architecture = architecture or known.get("model")
    dataset = dataset or known.get("dataset")
    if not architecture or not dataset:
        missing = "--model, such as 'logistic_regression()'," if not architecture else "--dataset, such as 'mnist()',"
        raise ConfigError(f"there is no run.json beside {file} that says it: give {missing}")
    data = load_points(dataset, data_dir)
    available = len(data.split(split)[1])
    last = first + (num_points or available - first)
    if not 0 <= first < last <= available:
        raise ConfigError(f"{data.name} has {available} {split} points, asked for {first} to {last - 1}")
    return _subject(file, architecture, dataset, data, split, tuple(range(first, last)))


def from_header(
    header: Header, path: Path, *, file: Path | None = None, architecture: str | None = None,
    data_dir: str | None = None,
) -> Subject:  # fmt: skip
    """Return the subject of the certificates at `path`, with another model file or architecture where given."""
    place = file or path.parent / header.model.file
    try:
        place = place / "model.safetensors" if place.is_dir() else place
        there = place.is_file()
    except OSError:  # such as a name that is too long
        there = False
    if not there:
        raise RecordError(f"the model {str(place)!r:.300} is not there any more; name it with --model-file")
    points = header.points
    data = load_points(points.dataset, data_dir)
    if max(points.indices) >= len(data.split(points.split)[1]):
        raise RecordError(f"{data.name} has no {points.split} point {max(points.indices)}")
    return _subject(
        place, architecture or header.model.architecture, points.dataset, data, points.split, points.indices
    )


def run_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run in `folder`; nothing where it is no run folder."""
    try:
        settings = json.loads((folder / "run.json").read_text("utf-8"))["settings"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordError(f"{folder / 'run.json'} cannot be read: {error!r}; give --model and --dataset") from None
    return settings if isinstance(settings, dict) else {}


def training_record(path: Path) -> tuple[Path, TrainingRecord]:
    """Return the training record of a run folder or of a file, and where it lies."""
    place = path / "crfl.json" if path.is_dir() else path
    if not place.exists():
        refused = place.with_name("crfl-refused.txt")
        why = refused.read_text("utf-8", "replace").strip()[:2000] if refused.is_file() else ""
        advice = why or "name a run folder that has one, or its file"
        raise RecordError(f"there is no training record {place}; {advice}")
    return place, load_record(place)


def load_record(place: Path) -> TrainingRecord:
    """Return the training record in a file; `RecordError` for whatever else is in it."""
    try:
        return TrainingRecord.load(place)
    except (ValueError, ArithmeticError, TypeError, RecursionError) as error:  # such as an integer of 400 digits
        raise RecordError(f"{place} holds no training record: {error!r:.200}") from None


def load_points(dataset: str, data_dir: str | None) -> Dataset:
    """Return the data set that `dataset` names, such as mnist()."""
    data = spec.resolve("dataset", dataset)(DataSource.default(data_dir))
    if not isinstance(data, Dataset):
        raise DataError(f"{dataset} gives {type(data).__name__}, no data set")
    return data


def load_network(file: Path, architecture: str, input_shape: tuple[int, ...], num_classes: int) -> Network:
    """Return the network of named arrays and an architecture; names and shapes must be the architecture's."""
    try:
        arrays = load_file(file)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{file} holds no model: {error}; wanted the model.safetensors of a run") from None
    try:
        model = build(spec.resolve("model", architecture), input_shape, num_classes, generator(0, "certify")).eval()
    except (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError) as error:  # such as of endless width
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RecordError(f"{architecture:.200} cannot be built: {reason:.200}") from None
    layout = Layout.of(model)
    wanted = dict(zip(layout.names, layout.shapes))
    found = {name: tuple(array.shape) for name, array in arrays.items()}
    if found != wanted:
        differ = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        told = ", ".join(f"{name} {found.get(name)}, wanted {wanted.get(name)}" for name in differ[:4])
        raise RecordError(f"{file} is no {architecture}: {told}; name the architecture with --model")
    bind(model, layout, layout.join({name: array.to(torch.float32) for name, array in arrays.items()}))
    return Network.from_module(model, input_shape)


def _subject(
    file: Path, architecture: str, dataset: str, data: Dataset, split: Split, indices: tuple[int, ...]
) -> Subject:
    network = load_network(file, architecture, data.input_shape, data.num_classes)
    inputs, labels = data.batch(split, torch.tensor(indices))
    return Subject(network, inputs, labels, file, architecture, dataset, split, indices)
