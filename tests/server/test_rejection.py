"""Rejection: the wrapper's verdicts, curves against a loop over thresholds, and the ROC curve's area."""

import numpy as np
import pytest
import torch
from torch import nn

from server.evaluate import Confidences
from server.rejection import Rejecting, auc, rates, roc
from tasks.errors import ConfigError


def drawn(seed=1, clean=500, attacked=300):
    draw = torch.Generator().manual_seed(seed)

    def sure(number):
        return (torch.rand(number, generator=draw, dtype=torch.float64) * 50).round() / 50  # ties, and taus among them

    right, hit = torch.rand(clean, generator=draw) < 0.8, torch.rand(attacked, generator=draw) < 0.6
    return Confidences(right, sure(clean), hit, sure(attacked) ** 2, 0.5)


def test_rates_are_those_of_a_loop():
    found, taus = drawn(), np.linspace(0, 1, 51)
    at = rates(found, taus)
    for tau, acc, asr, clean, attacked in zip(taus, at.acc, at.asr, at.clean_rejected, at.attacked_rejected):
        assert acc == pytest.approx((found.right & (found.sure >= tau)).double().mean().item())
        assert asr == pytest.approx((found.hit & (found.hit_sure >= tau)).double().mean().item())
        assert clean == pytest.approx((found.sure < tau).double().mean().item())
        assert attacked == pytest.approx((found.hit_sure < tau).double().mean().item())
    assert (np.diff(at.acc) <= 0).all()


def test_the_rocs_area_is_the_auc():
    found = drawn()
    attacked, clean = roc(found, points=10_000)
    assert (attacked[0], clean[0], attacked[-1], clean[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(clean, attacked) == pytest.approx(auc(found), abs=1e-12)
    few = roc(found, points=40)
    assert len(few[0]) <= 41
    assert np.trapezoid(few[1], few[0]) == pytest.approx(auc(found), abs=0.01)


def test_without_a_trigger_there_is_no_asr():
    found = drawn(attacked=0)
    assert auc(found) is None
    assert np.isnan(rates(found, [0.0, 0.5]).asr).all()


def test_a_confidence_that_is_no_number_is_rejected_at_every_tau():
    found = drawn()
    sure = found.sure.clone()
    sure[::5] = torch.nan
    found = Confidences(found.right, sure, found.hit, found.hit_sure, 0.5)
    at = rates(found, [0.0, 0.5])
    assert at.clean_rejected[0] == pytest.approx(0.2)
    assert at.acc[0] == pytest.approx((found.right & ~sure.isnan()).double().mean().item())
    _, clean = roc(found)
    assert clean[-1] == pytest.approx(0.8)


@pytest.mark.parametrize("taus", [[-0.1], [1.1], [float("nan")], [[0.5]]])
def test_thresholds_are_confidences(taus):
    with pytest.raises(ConfigError, match="thresholds are numbers from 0 to 1"):
        rates(drawn(), taus)


def test_the_wrapper_answers_or_says_that_it_does_not():
    logits = torch.tensor([[0.0, 0.0], [0.0, 3.0], [5.0, 0.0], [float("nan"), 1.0], [float("inf"), 0.0]])
    model = Rejecting(nn.Identity(), tau=0.9)
    label, confidence = model(logits)
    assert label.tolist() == [-1, 1, 0, -1, -1]
    assert confidence[:3].tolist() == pytest.approx([0.5, 0.952574, 0.993307], abs=1e-6)
    assert confidence[3:].tolist() == [0.0, 0.0]
    assert Rejecting(nn.Identity(), 0.5)(logits).label.tolist() == [0, 1, 0, -1, -1]  # exactly tau is accepted
    assert Rejecting(nn.Identity(), 0.0)(logits).label.tolist() == [0, 1, 0, -1, -1]
    assert not label.requires_grad
    assert len(model(logits[:0]).label) == 0


@pytest.mark.parametrize("tau", [-0.1, 1.5, float("nan"), True, "0.3"])
def test_tau_is_a_confidence(tau):
    with pytest.raises(ConfigError, match="tau must be from 0 to 1"):
        Rejecting(nn.Identity(), tau)
