"""Against Flower's own robust strategies (`flwr.serverapp.strategy`), which aggregate whole models."""

import pytest
import torch
from torch import Tensor

from strategies.rules.bulyan import bulyan
from strategies.rules.krum import krum
from strategies.rules.median import median
from strategies.rules.multi_krum import multi_krum
from strategies.rules.trimmed_mean import trimmed_mean
from strategies.sorting import nearest_mean
from tasks.errors import AggregationError
from tasks.rng import generator

pytestmark = pytest.mark.reference
flwr_app = pytest.importorskip("flwr.app", reason="flwr is not installed")
flwr_strategy = pytest.importorskip("flwr.serverapp.strategy", reason="flwr is not installed")


def updates_of(n: int, f: int, seed: int = 1, num_params: int = 15) -> Tensor:
    draw = generator(seed, n, f, "flower")
    updates = 1 + torch.randn(n, num_params, generator=draw, dtype=torch.float64)
    updates[:f] += 1.5
    return updates[torch.randperm(n, generator=draw)]


def theirs(strategy: object, models: Tensor, claims: list[float] | None = None) -> Tensor | None:
    """Return what a strategy makes of client models ``[clients, params]`` in two arrays each."""
    replies = []
    for row, model in enumerate(models.numpy()):
        arrays = flwr_app.ArrayRecord({"a": flwr_app.Array(model[:4].reshape(2, 2)), "b": flwr_app.Array(model[4:])})
        metrics = flwr_app.MetricRecord({"num-examples": 1.0 if claims is None else claims[row]})
        question = flwr_app.Message(flwr_app.RecordDict(), row + 1, "train")
        replies.append(flwr_app.Message(flwr_app.RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=question))
    arrays, _ = strategy.aggregate_train(1, replies)  # type: ignore[attr-defined]
    return None if arrays is None else torch.cat([torch.from_numpy(a).flatten() for a in arrays.to_numpy_ndarrays()])


def same(ours: Tensor, other: Tensor | None) -> None:
    assert other is not None
    torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("n", "f"), [(7, 1), (10, 2), (11, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_same_definitions_same_numbers(n: int, f: int, seed: int) -> None:
    """On the models theirs are given, ours on the same rows; all five commute with the global model's shift."""
    updates = updates_of(n, f, seed)
    same(median(updates), theirs(flwr_strategy.FedMedian(), updates))
    same(trimmed_mean(updates, num_byzantine=f), theirs(flwr_strategy.FedTrimmedAvg(beta=f / n + 1e-9), updates))
    same(krum(updates, num_byzantine=f), theirs(flwr_strategy.Krum(num_malicious_nodes=f), updates))
    same(
        multi_krum(updates, num_byzantine=f, num_selected=n - f),
        theirs(flwr_strategy.MultiKrum(num_malicious_nodes=f, num_nodes_to_select=n - f), updates),
    )


def test_trimmed_mean_counts_a_share_as_it_is_written() -> None:
    """0.3 of 10 is 3; theirs truncates the float product 0.29 * 100 = 28.999... to 28."""
    updates = updates_of(100, 29)
    same(trimmed_mean(updates, num_byzantine=28), theirs(flwr_strategy.FedTrimmedAvg(beta=0.29), updates))
    assert torch.equal(trimmed_mean(updates, num_byzantine=0.29), trimmed_mean(updates, num_byzantine=29))


def test_bulyan_picks_one_by_one_and_theirs_all_at_once() -> None:
    """Ours is the paper's (El Mhamdi et al., section 4): the rule runs again on who is left; theirs is one cut."""
    for seed in range(20):
        updates = updates_of(11, 2, seed)
        at_once = multi_krum.weights(updates, num_byzantine=2, num_selected=7).nonzero().flatten()
        one_cut = nearest_mean(updates[at_once], 3)
        if not torch.allclose(bulyan(updates, num_byzantine=2), one_cut):
            same(one_cut, theirs(flwr_strategy.Bulyan(num_malicious_nodes=2), updates))
            return
    raise AssertionError("in 20 rounds the two definitions never differed")


def test_krum_refuses_more_attackers_than_it_can_bear_and_theirs_does_not() -> None:
    updates = updates_of(6, 2)
    assert theirs(flwr_strategy.Krum(num_malicious_nodes=9), updates) is not None
    with pytest.raises(AggregationError, match=r"2f \+ 3 = 21, got n = 6"):
        krum(updates, num_byzantine=9)


def test_multi_krum_trusts_no_claims_and_theirs_does() -> None:
    updates = updates_of(8, 2)
    chosen = multi_krum.weights(updates, num_byzantine=2, num_selected=6).nonzero().flatten().tolist()
    strategy = flwr_strategy.MultiKrum(num_malicious_nodes=2, num_nodes_to_select=6)
    claimed = theirs(strategy, updates, [1e12 if row == chosen[0] else 1.0 for row in range(8)])
    assert claimed is not None
    torch.testing.assert_close(claimed, updates[chosen[0]], rtol=1e-6, atol=1e-6)
    same(multi_krum(updates, num_byzantine=2, num_selected=6), updates[chosen].mean(0))


def test_krum_sees_distances_that_cancel_in_theirs() -> None:
    """Models of norm 33 whose updates have norm 0.01: in float32, |x|^2 + |y|^2 - 2 <x, y> is mostly rounding.

    Ours measures updates, not models, so the length of the model does not come in at all; and on a stack with such an
    offset it is still right.
    """
    draw = generator(1, "cancel")
    wrong = 0
    for _ in range(12):
        start = 33 * torch.nn.functional.normalize(torch.randn(1, 5000, generator=draw))
        updates = 0.01 * torch.nn.functional.normalize(torch.randn(10, 5000, generator=draw))
        updates[4] *= 2
        models = start + updates
        exact = (models.double()[:, None] - models.double()).square().sum(2)
        scores = exact.sort(1).values[:, 1:8].sum(1)
        assert torch.equal(krum(models, num_byzantine=1), models[int(scores.argmin())])
        assert int(scores.argmin()) != 4
        result = theirs(flwr_strategy.Krum(num_malicious_nodes=1), models)
        assert result is not None
        wrong += not torch.equal(result, models[int(scores.argmin())])
    assert wrong > 0


def test_a_value_that_is_not_a_number_becomes_their_median() -> None:
    """Ours never reach a rule: replies are checked before."""
    updates = updates_of(5, 1)
    updates[2, 3] = torch.nan
    result = theirs(flwr_strategy.FedMedian(), updates)
    assert result is not None
    assert bool(result.isnan().any())
