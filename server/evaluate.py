"""Evaluation on the server's own test data: accuracy, attack success rate, rejection, confidence AUC.

With a confidence threshold tau (FLIP, ICLR 2023, section 3.3 and appendix A.9) a prediction counts only if its
largest softmax probability is at least tau. ACC = accepted and correct / all test samples: a rejected clean sample
counts as wrong. ASR = accepted and predicted as the attacker wants / all samples the attack applies to: a rejected
one is a failure.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from client.attack import Triggered
from tasks.params import bind
from tasks.task import Task

BATCH = 200  # small activations stay in the cache; each batch is one thread's, so no core waits for another


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

    def __call__(self, vector: Tensor) -> Metrics:
        """Measure the model `vector` ([params]) on the whole test split, batches spread over all cores."""
        self.vector.copy_(vector)
        total = len(self.task.dataset.test_labels)
        starts = range(0, total, BATCH)
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(self._batch, starts))
        loss, right, sure, hit, hit_sure = (list(column) for column in zip(*parts, strict=True))
        clean_right, clean_sure = torch.cat(right), torch.cat(sure)
        acc, acc_all = _rate(clean_right & (clean_sure >= self.tau)), _rate(clean_right)
        asr = asr_all = auc = None
        if self.triggered is not None:
            attack_hit, attack_sure = torch.cat(hit), torch.cat(hit_sure)
            if len(attack_hit):
                asr, asr_all = _rate(attack_hit & (attack_sure >= self.tau)), _rate(attack_hit)
            auc = confidence_auc(clean_sure, attack_sure)
        return Metrics(acc, asr, sum(loss) / max(total, 1), acc_all, asr_all, auc)

    @torch.no_grad()
    def _batch(self, start: int) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
        """Return (summed loss, clean right, clean confidence, attack hit, attack confidence) of one batch."""
        inputs, labels = self.task.dataset.batch("test", slice(start, start + BATCH))
        logits = self.model(inputs)
        loss = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        predicted, confidence = _predict(logits)
        right, hit, hit_confidence = predicted == labels, labels[:0] > 0, confidence[:0]
        if self.triggered is not None:
            attacked, wanted, counts = self.triggered(inputs, labels, self.task.dataset.num_classes)
            predicted, hit_confidence = _predict(self.model(attacked[counts]))
            hit = predicted == wanted[counts]
        return loss, right, confidence, hit, hit_confidence


def confidence_auc(clean: Tensor, attacked: Tensor) -> float | None:
    """Return P(clean confidence > attacked confidence), ties half: the ROC curve's area; None if one is empty."""
    if not len(clean) or not len(attacked):
        return None
    others = attacked.double().sort().values
    below = torch.searchsorted(others, clean.double(), side="left") + torch.searchsorted(
        others, clean.double(), side="right"
    )  # those below, plus those not above: ties count half
    return float(below.double().mean() / (2 * len(others)))


def _predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (class, softmax confidence); a row that is not finite has confidence 0 and predicts nothing (-1)."""
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(dim=1)
    finite = torch.isfinite(confidence)
    return torch.where(finite, predicted, -1), torch.where(finite, confidence, 0.0)


def _rate(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0
