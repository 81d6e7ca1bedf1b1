"""An attack with a test set of its own: attack success, edge cases recognised, accuracy of the target's class."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from client.attack import TargetSet
from server.evaluate import BATCH, Evaluator
from tasks.dataset import Dataset
from tasks.params import Layout


class Table(nn.Module):
    """Returns its input as logits, times one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x * self.scale


def logits(classes, sure=9.0):
    return torch.nn.functional.one_hot(torch.tensor(classes), 3).float() * sure


def evaluator(edge, wanted, true, tau=0.0, triggered=None):
    clean, labels = logits([0, 0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 1, 1, 2])
    data = Dataset("made", clean, labels, clean, labels, 3)
    task = SimpleNamespace(dataset=data, layout=Layout.of(Table()), build_model=Table)
    return Evaluator(task, triggered, tau, TargetSet(edge, torch.tensor(wanted), torch.tensor(true)))


ONE = torch.ones(1)


def test_edge_cases_are_counted_by_what_the_attacker_wants_and_by_truth():
    found = evaluator(logits([1, 1, 1, 2, 0]), [1] * 5, [2] * 5)(ONE)
    assert found.asr == found.asr_all == 0.6
    assert found.edge_acc == 0.2
    assert found.raw_acc == pytest.approx(2 / 3)  # of class 1 on clean data
    assert found.acc == pytest.approx(4 / 6)


def test_an_unsure_hit_is_rejected():
    edge = torch.cat([logits([1, 1]), logits([1, 1], sure=0.1)])
    found = evaluator(edge, [1] * 4, [2] * 4, tau=0.9)(ONE)
    assert (found.asr, found.asr_all) == (0.5, 1.0)
    assert 0 < found.auc < 1


def test_more_edge_cases_than_a_batch_count_once_each():
    number = 2 * BATCH + 7
    found = evaluator(logits([1] * number), [1] * number, [2] * number)
    assert found(ONE).asr == 1.0
    assert len(found.confidences(ONE).hit) == number


def test_the_test_set_takes_the_place_of_a_trigger():
    def triggered(inputs, labels, num_classes):
        raise AssertionError("not asked for")

    assert evaluator(logits([1]), [1], [2], triggered=triggered)(ONE).asr == 1.0


def test_without_a_target_set_nothing_changes():
    found = Evaluator(evaluator(logits([1]), [1], [2]).task, None)(ONE)
    assert found.asr is found.edge_acc is found.raw_acc is None


def test_a_broken_model_scores_nothing():
    assert evaluator(logits([1, 1]), [1, 1], [2, 2])(torch.tensor([float("nan")])).asr == 0.0
