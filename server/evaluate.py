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

from client.attack import TargetSet, Triggered
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
    # of an attack with a test set of its own, such as edge cases, else None; without rejection
    edge_acc: float | None = None  # share of that test set that gets its true label
    raw_acc: float | None = None  # accuracy on the clean test samples of the attacker's target classes


@dataclass(frozen=True)
class Confidences:
    """What a model says of the test split, clean and as attacked; the attacked part is empty without a trigger."""

    right: Tensor  # [clean] bool: classified right
    sure: Tensor  # [clean] float64: confidence
    hit: Tensor  # [attacked] bool: classified as the attacker wants
    hit_sure: Tensor  # [attacked] float64
    loss: float  # mean cross-entropy on clean samples
    hit_right: Tensor | None = None  # [attacked] bool: classified by their true label, for a test set of the attack's


class Evaluator:
    """Measures models of one task; holds one model whose parameters are views into its vector."""

    def __init__(
        self, task: Task, triggered: Triggered | None, tau: float = 0.0, target_set: TargetSet | None = None
    ) -> None:
        self.task, self.tau = task, tau
        self.triggered = triggered if target_set is None else None
        self.target_set = target_set  # the attack is measured on these inputs, in place of a trigger
        self.model = task.build_model()
        self.vector = torch.empty(task.layout.num_params)
        bind(self.model, task.layout, self.vector)
        self.model.eval()

    def __call__(self, vector: Tensor) -> Metrics:
        """Measure the model `vector` ([params]) on the whole test split, batches spread over all cores."""
        found, tau = self.confidences(vector), self.tau
        asr = asr_all = auc = None
        if self.triggered is not None or self.target_set is not None:
            if len(found.hit):
                asr, asr_all = _rate(found.hit & (found.hit_sure >= tau)), _rate(found.hit)
            auc = confidence_auc(found.sure, found.hit_sure)
        acc = _rate(found.right & (found.sure >= tau))
        edge_acc = None if found.hit_right is None else _rate(found.hit_right)
        return Metrics(acc, asr, found.loss, _rate(found.right), asr_all, auc, edge_acc, self._raw_acc(found))

    def _raw_acc(self, found: Confidences) -> float | None:
        if self.target_set is None:
            return None
        of_target = torch.isin(self.task.dataset.test_labels, self.target_set.wanted.unique())
        return _rate(found.right[of_target]) if of_target.any() else None

    def confidences(self, vector: Tensor) -> Confidences:
        """Return what the model `vector` ([params]) says of every test sample: the metrics at every tau follow."""
        self.vector.copy_(vector)
        total = len(self.task.dataset.test_labels)
        starts = range(0, total, BATCH)
        with ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,)) as pool:
            parts = list(pool.map(self._batch, starts))
        loss, right, sure, hit, hit_sure = (list(column) for column in zip(*parts, strict=True))
        hit_right = None
        if self.target_set is not None:
            hit, hit_sure, edge_right = self._on_target_set(self.target_set)
            hit_right = torch.cat(edge_right)
        joined = [torch.cat(part) for part in (right, sure, hit, hit_sure)]
        return Confidences(joined[0], joined[1], joined[2], joined[3], sum(loss) / max(total, 1), hit_right)

    @torch.no_grad()
    def _on_target_set(self, found: TargetSet) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return, in batches, which samples are classified as the attacker wants, how surely, and which truly."""
        hit, sure, right = list[Tensor](), list[Tensor](), list[Tensor]()
        parts = (part.split(BATCH) for part in (found.inputs, found.wanted, found.labels))
        for inputs, wanted, labels in zip(*parts, strict=True):
            predicted, confidence = predict(self.model(inputs))
            hit.append(predicted == wanted)
            sure.append(confidence)
            right.append(predicted == labels)
        return hit, sure, right

    @torch.no_grad()
    def _batch(self, start: int) -> tuple[float, Tensor, Tensor, Tensor, Tensor]:
        """Return (summed loss, clean right, clean confidence, attack hit, attack confidence) of one batch."""
        inputs, labels = self.task.dataset.batch("test", slice(start, start + BATCH))
        logits = self.model(inputs)
        loss = float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        predicted, confidence = predict(logits)
        right, hit, hit_confidence = predicted == labels, labels[:0] > 0, confidence[:0]
        if self.triggered is not None:
            attacked, wanted, counts = self.triggered(inputs, labels, self.task.dataset.num_classes)
            predicted, hit_confidence = predict(self.model(attacked[counts]))
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


def predict(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return (class, softmax confidence); a row that is not finite has confidence 0 and predicts nothing (-1)."""
    confidence, predicted = torch.softmax(logits.double(), dim=1).max(dim=1)
    finite = torch.isfinite(confidence)
    return torch.where(finite, predicted, -1), torch.where(finite, confidence, 0.0)


def _rate(hits: Tensor) -> float:
    return float(hits.double().mean()) if len(hits) else 0.0
