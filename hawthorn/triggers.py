"""What a finished run's model gives away: the inverted triggers of all pairs of classes, kept in the run's folder.

FLIP (Zhang et al., ICLR 2023) hardens a model so that small triggers no longer turn one class into another: the class
distances, l1 norms of the smallest masks found, grow. `measure_triggers` finds them on test samples for the final model
and for one to compare with, such as the model the run started from, and keeps both for the report.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from client.attack import read_attack
from client.flip.inspect import inspect
from server.record import RunRecord, read_model, read_run, replace_file
from tasks.errors import RecordError
from tasks.params import bind, digest
from tasks.task import Task, load

FILE = "triggers.safetensors"
NUM_IMAGES = 2000  # test samples that the searches choose theirs from


@dataclass(frozen=True, eq=False)
class Seen:
    """One model's triggers; row i turns class ``pairs[i][0]`` into ``pairs[i][1]``."""

    name: str
    pairs: Tensor  # [pairs, 2], int64
    masks: Tensor  # [pairs, 1, height, width], or [pairs, features]
    patterns: Tensor
    distances: Tensor  # [classes, classes], source by target; NaN: not sought, inf: none found

    def to_class(self, target: int) -> list[tuple[int, Tensor, Tensor, float]]:
        """Return (source, mask, pattern, l1 norm) of every trigger towards a class."""
        rows = [row for row, pair in enumerate(self.pairs.tolist()) if pair[1] == target]
        return [(int(self.pairs[r, 0]), self.masks[r], self.patterns[r], float(self.masks[r].sum())) for r in rows]


@dataclass(frozen=True, eq=False)
class TriggersOfRun:
    """The final model's triggers, those of the model before, and the attacker's own."""

    after: Seen
    before: Seen | None
    true_mask: Tensor | None  # [channels, height, width] or [features]; None where the attack has no trigger
    true_pattern: Tensor | None
    target: int | None


def measure_triggers(folder: Path, before: Path | None = None, *, samples: int = 8, steps: int = 200) -> TriggersOfRun:
    """Invert the triggers of a finished run's model, and of `before` (a run folder or a model file), and keep them.

    `before` None: the model that the run started from, if it names one that is still there. Raises `RecordError`.
    """
    run = read_run(folder)
    if run.status != "finished" or not (run.folder / "model.safetensors").exists():
        raise RecordError(f"{folder} is {run.status}; triggers are inverted on the final model of a finished run")
    task = load(run.config)
    after = _seen(task, run.folder / "model.safetensors", "after", samples, steps, run.config.seed)
    if before is None and run.config.from_model and Path(run.config.from_model).exists():
        before = Path(run.config.from_model)
    earlier = None
    if before is not None:
        file = before / "model.safetensors" if before.is_dir() else before
        earlier = _seen(task, file, str(before), samples, steps, run.config.seed)
    mask, pattern, target = true_trigger(task, run)
    found = TriggersOfRun(after, earlier, mask, pattern, target)
    _keep(run, found)
    return found


def true_trigger(task: Task, run: RunRecord) -> tuple[Tensor | None, Tensor | None, int | None]:
    """Return the attacker's (mask, pattern, target) as the test time trigger stamps them; Nones without one.

    What a stamp (1 - m) x + m p does to an input of zeros and to one of ones gives m and p.
    """
    triggered = read_attack(run.config.attack).triggered if run.config.attack else None
    if triggered is None:
        return None, None, None
    shape, classes = task.dataset.input_shape, task.dataset.num_classes
    both = torch.stack([torch.zeros(shape), torch.ones(shape)])
    stamped, wanted, _ = triggered(both, torch.zeros(2, dtype=torch.int64), classes)
    mask = 1 - (stamped[1] - stamped[0])
    return mask, torch.where(mask > 0, stamped[0] / mask.clamp_min(1e-12), 0.0), int(wanted[0])


def kept_triggers(run: RunRecord) -> TriggersOfRun | None:
    """Return what `measure_triggers` kept for the run's final model; None if nothing of that model is there."""
    path = run.folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("sha256") != run.facts.get("sha256"):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        names = json.loads(metadata["names"])
        seen = {
            part: Seen(names[part], *(tensors[f"{part}.{key}"] for key in ("pairs", "masks", "patterns", "distances")))
            for part in names
        }
        target = json.loads(metadata["target"])
        return TriggersOfRun(seen["after"], seen.get("before"), tensors.get("mask"), tensors.get("pattern"), target)
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # a file that cannot be read is measured anew


def _keep(run: RunRecord, found: TriggersOfRun) -> None:
    tensors, names = dict[str, Tensor](), dict[str, str]()
    for part, seen in (("after", found.after), ("before", found.before)):
        if seen is not None:
            names[part] = seen.name
            for key in ("pairs", "masks", "patterns", "distances"):
                tensors[f"{part}.{key}"] = getattr(seen, key).contiguous()
    for key, tensor in (("mask", found.true_mask), ("pattern", found.true_pattern)):
        if tensor is not None:
            tensors[key] = tensor.contiguous()
    metadata = {
        "sha256": str(run.facts.get("sha256")),
        "names": json.dumps(names),
        "target": json.dumps(found.target),
    }
    replace_file(run.folder / FILE, save(tensors, metadata))


def _seen(task: Task, file: Path, name: str, samples: int, steps: int, seed: int) -> Seen:
    vector = read_model(file, task.layout)
    model = task.build_model()
    bind(model, task.layout, vector)
    inputs, labels = task.dataset.batch("test", slice(0, NUM_IMAGES))
    found = inspect(model, inputs, labels, task.dataset.num_classes, samples=samples, steps=steps, seed=seed)
    triggers = found.triggers
    name = name if name == "after" else f"{name} ({digest(vector)[:8]})"
    return Seen(name, torch.tensor(found.pairs), triggers.masks, triggers.patterns, found.distances)
