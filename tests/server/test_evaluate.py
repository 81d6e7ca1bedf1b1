"""ACC, ASR, rejection and AUC as FLIP defines them, on a model whose logits are known."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from server.evaluate import Evaluator, confidence_auc
from tasks.dataset import Dataset
from tasks.params import Layout, model_vector


class Table(nn.Module):
    """Returns its input as logits, times one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def evaluator(logits, labels, triggered=None, tau=0.0):
    data = Dataset("made", logits, labels, logits, labels, logits.shape[1])
    task = SimpleNamespace(dataset=data, layout=Layout.of(Table()), build_model=Table)
    return Evaluator(task, triggered, tau)


ONE = torch.ones(1)


def test_acc_counts_rejected_as_wrong():
    logits = torch.tensor([[9.0, 0, 0], [0.1, 0, 0], [0, 0, 9.0], [9.0, 0, 0]])
    labels = torch.tensor([0, 0, 2, 1])
    plain, strict = evaluator(logits, labels)(ONE), evaluator(logits, labels, tau=0.5)(ONE)
    assert plain.acc == 0.75
    assert strict.acc == 0.5
    assert strict.acc_all == 0.75
    assert plain.asr is None


def test_asr_over_samples_the_attack_applies_to():
    logits, labels = torch.zeros(6, 3), torch.tensor([0, 0, 1, 1, 2, 2])

    def triggered(x, y, num_classes):
        x = x.clone()
        x[:3, 2] = 9.0  # a sure hit
        x[3, 2] = 0.1  # an unsure hit
        return x, torch.full_like(y, 2), y != 2

    assert evaluator(logits, labels, triggered)(ONE).asr == 1.0
    strict = evaluator(logits, labels, triggered, tau=0.5)(ONE)
    assert strict.asr == 0.75
    assert strict.asr_all == 1.0


def test_a_broken_model_scores_nothing():
    metrics = evaluator(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))(torch.tensor([float("nan")]))
    assert metrics.acc == 0.0


def test_auc_against_the_definition():
    g = torch.Generator().manual_seed(1)
    clean, attacked = torch.rand(200, generator=g).round(decimals=1), torch.rand(150, generator=g).round(decimals=1)
    pairs = (clean[:, None] > attacked[None, :]).double() + 0.5 * (clean[:, None] == attacked[None, :])
    assert confidence_auc(clean, attacked) == pytest.approx(float(pairs.mean()), abs=1e-12)
    assert confidence_auc(clean, torch.empty(0)) is None


def test_batches_do_not_change_the_counts():
    g = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(1203, 5, generator=g), torch.randint(0, 5, (1203,), generator=g)
    assert evaluator(logits, labels)(ONE).acc == pytest.approx(float((logits.argmax(1) == labels).double().mean()))
    assert model_vector(Table()).tolist() == [1.0]
