"""Evaluation on the server's own test data: accuracy, attack success rate, rejection, confidence AUC.

With a confidence threshold tau (FLIP, ICLR 2023, section 3.3 and appendix A.9) a prediction counts only if its
largest softmax probability is at least tau. ACC = accepted and correct / all test samples: a rejected clean sample
counts as wrong. ASR = accepted and predicted as the attacker wants / all samples the attack applies to: a rejected
one is a failure.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from scipy.stats import rankdata
from torch import Tensor

from client.attack import Triggered
from tasks.params import bind
from tasks.task import Task

BATCH = 500  # a few MB of activations: faster on a CPU than larger batches


@dataclass(frozen=True)
class Metrics:
    """What the server measures of a model. `asr` and `auc` are None without an attack that acts at test time."""

    acc: float  # at tau
    asr: float | None
    loss: float  # mean cross-entropy on clean test samples
    acc_all: float  # without rejection (tau = 0)
    asr_all: float | None
    auc: float | None  # chance that a clean sample's confidence exceeds a triggered one's


class Evaluator:
    """Measures models of one task; holds one model whose parameters are views into its vector."""

    def __init__(self, task: Task, triggered: Triggered | None, tau: float = 0.0) -> None:
        self.task, self.tau = task, tau
        self.triggered = triggered
        self.model = task.build_model()
        self.vector = torch.empty(task.layout.num_params)
        bind(self.model, task.layout, self.vector)
        self.model.eval()

    @torch.no_grad()
    def __call__(self, vector: Tensor) -> Metrics:
        """Measure the model `vector` ([params]) on the whole test split."""
        self.vector.copy_(vector)
        clean_right, clean_conf, attack_hit, attack_conf = [], [], [], []
        loss, total = 0.0, len(self.task.dataset.test_labels)
        with _all_cores():
            for start in range(0, total, BATCH):
                inputs, labels = self.task.dataset.batch("test", slice(start, start + BATCH))
                logits = self.model(inputs)
                loss += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
                predicted, confidence = _predict(logits)
                clean_right.append(predicted == labels)
                clean_conf.append(confidence)
                if self.triggered is not None:
                    attacked, wanted, counts = self.triggered(inputs, labels)
                    predicted, confidence = _predict(self.model(attacked[counts]))
                    attack_hit.append(predicted == wanted[counts])
                    attack_conf.append(confidence)
        right, sure = torch.cat(clean_right), torch.cat(clean_conf)
        acc, acc_all = _rate(right & (sure >= self.tau)), _rate(right)
        asr = asr_all = auc = None
        if self.triggered is not None:
            hit, hit_sure = torch.cat(attack_hit), torch.cat(attack_conf)
            asr, asr_all = _rate(hit & (hit_sure >= self.tau)), _rate(hit)
            auc = confidence_auc(sure, hit_sure)
        return Metrics(acc, asr, loss / max(total, 1), acc_all, asr_all, auc)


def confidence_auc(clean: Tensor, attacked: Tensor) -> float | None:
    """Return P(clean confidence > attacked confidence), ties half: the ROC curve's area; None if one is empty."""
    if not len(clean) or not len(attacked):
        return None
    ranks = rankdata(torch.cat([clean, attacked]).double().numpy())
    above = ranks[: len(clean)].sum() - len(clean) * (len(clean) + 1) / 2
    return float(above / (len(clean) * len(attacked)))


def _predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (class, softmax confidence); a row that is not finite has confidence 0 and predicts nothing (-1)."""
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(dim=1)
    finite = torch.isfinite(confidence)
    return torch.where(finite, predicted, -1), torch.where(finite, confidence, 0.0)


def _rate(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Use every core while evaluating: no client trains at that time, and the counts do not depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
