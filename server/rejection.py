"""Rejection of uncertain predictions: around a deployed model, and as curves of a finished run over all thresholds.

FLIP (Zhang et al., ICLR 2023, section 3.3): a prediction whose largest softmax probability is below tau is rejected.
Hardened models are less sure of backdoored inputs, so a threshold costs the attacker more than honest users; how much
more is the ROC curve of the confidence (appendix A.4), and ACC and ASR at every tau (appendix A.9).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from client.attack import read_attack
from server.evaluate import Confidences, Evaluator, confidence_auc, predict
from server.record import RunRecord, read_model, read_run, replace_file
from tasks.errors import ConfigError, RecordError
from tasks.params import bind
from tasks.task import load

REJECTED = -1
FILE = "confidences.safetensors"  # in the run's folder, for the model of the digest in its metadata
Floats = NDArray[np.float64]


class Verdict(NamedTuple):
    """Classes [samples], -1 where rejected, and confidences [samples] (float64)."""

    label: Tensor
    confidence: Tensor


class Rejecting(nn.Module):
    """A model that answers only when it is sure: logits become a `Verdict`.

    Rejected are confidences below `tau` and outputs that are not finite. The module is used as it is, so put a model
    with dropout or batch norm into evaluation mode; `deployed` does.
    """

    def __init__(self, module: nn.Module, tau: float) -> None:
        super().__init__()
        if isinstance(tau, bool) or not (isinstance(tau, int | float) and 0 <= tau <= 1):
            raise ConfigError(f"tau must be from 0 to 1, got {tau!r}")
        self.module, self.tau = module, float(tau)

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Verdict:
        """Return the verdict on inputs [samples, ...]."""
        label, confidence = predict(self.module(inputs))
        return Verdict(torch.where(confidence >= self.tau, label, REJECTED), confidence)


def deployed(folder: Path, tau: float | None = None) -> Rejecting:
    """Return the final model of a finished run, ready to answer; `tau` None: the run's own."""
    run = _finished(folder)
    task = load(run.config)
    model = task.build_model()
    bind(model, task.layout, read_model(run.folder / "model.safetensors", task.layout))
    return Rejecting(model.eval(), run.config.tau if tau is None else tau)


@dataclass(frozen=True, eq=False)
class Rates:
    """Rates in [0, 1] at each threshold; `asr` and `attacked_rejected` are NaN where nobody has a trigger."""

    tau: Floats
    acc: Floats  # accepted and right, of all clean samples
    asr: Floats  # accepted and as the attacker wants, of all attacked samples
    clean_rejected: Floats
    attacked_rejected: Floats


def rates(found: Confidences, taus: Sequence[float] | Floats) -> Rates:
    """Return the rates at all thresholds from one sorting of the confidences."""
    at = np.asarray(taus, dtype=np.float64)
    if at.ndim != 1 or not ((at >= 0) & (at <= 1)).all():
        raise ConfigError(f"thresholds are numbers from 0 to 1, got {taus!r}")
    sure, hit_sure = found.sure.numpy(), found.hit_sure.numpy()
    right, hit = found.right.numpy(), found.hit.numpy()
    return Rates(
        tau=at,
        acc=_share_from(sure[right], at, len(sure)),
        asr=_share_from(hit_sure[hit], at, len(hit_sure)),
        clean_rejected=1.0 - _share_from(sure, at, len(sure)),
        attacked_rejected=1.0 - _share_from(hit_sure, at, len(hit_sure)),
    )


def roc(found: Confidences, points: int = 400) -> tuple[Floats, Floats]:
    """Return the shares of (attacked, clean) samples accepted, both rising, at `points` thresholds at most."""
    sure, hit_sure = np.sort(found.sure.numpy()), np.sort(found.hit_sure.numpy())
    both = np.sort(np.concatenate([sure, hit_sure]))
    both = both[~np.isnan(both)]
    every = np.unique(both)
    if len(every) > points:  # evenly in rank, so that steep parts of the curve keep their points
        every = np.unique(both[np.linspace(0, len(both) - 1, points).round().astype(int)])
    at = np.append(every, np.inf)[::-1]
    return _share_from(hit_sure, at, len(hit_sure)), _share_from(sure, at, len(sure))


def _share_from(values: Floats, at: Floats, total: int) -> Floats:
    """Return, per threshold, how many of `values` are at least it, as a share of `total`; a NaN never is."""
    if total == 0:
        return np.full(len(at), np.nan)
    known = np.sort(values[~np.isnan(values)])
    return (len(known) - np.searchsorted(known, at, side="left")) / total


def auc(found: Confidences) -> float | None:
    """Return the area under the ROC curve; None where nobody has a trigger."""
    return confidence_auc(found.sure, found.hit_sure)


def measure_confidences(folder: Path) -> Confidences:
    """Return the confidences of a finished run's final model: those kept in its folder, else measured and kept."""
    run = _finished(folder)
    if (kept := kept_confidences(run)) is not None:
        return kept
    task, attack = load(run.config), read_attack(run.config.attack)
    target_set = attack.target_set(task.dataset, run.config.data_dir) if attack.target_set else None
    evaluate = Evaluator(task, attack.triggered, target_set=target_set)
    found = evaluate.confidences(read_model(run.folder / "model.safetensors", task.layout))
    tensors = {"right": found.right, "sure": found.sure, "hit": found.hit, "hit_sure": found.hit_sure}
    metadata = {"sha256": str(run.facts["sha256"]), "loss": repr(found.loss)}
    replace_file(run.folder / FILE, save(tensors, metadata))
    return found


def kept_confidences(run: RunRecord) -> Confidences | None:
    """Return what `measure_confidences` kept for the run's final model; None if nothing of that model is there."""
    path = run.folder / FILE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("sha256") != run.facts.get("sha256"):
                return None
            right, sure, hit, hit_sure = (file.get_tensor(name) for name in ("right", "sure", "hit", "hit_sure"))
            return Confidences(right, sure, hit, hit_sure, float(metadata["loss"]))
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # a file that cannot be read is measured anew


def _finished(folder: Path) -> RunRecord:
    run = read_run(Path(folder))
    if run.status != "finished" or not (run.folder / "model.safetensors").exists():
        raise RecordError(f"{folder} is {run.status}; rejection is measured on the final model of a finished run")
    return run
