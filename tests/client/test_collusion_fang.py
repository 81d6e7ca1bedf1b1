"""Fang's attacks beside the paper's searches and intervals, and against the rules they are made for."""

import math

import pytest
import torch
from torch import Tensor

from client.collusion.fang_krum import fang_krum
from client.collusion.fang_trimmed_mean import fang_trimmed_mean
from strategies.rules.krum import krum
from strategies.rules.trimmed_mean import trimmed_mean
from tasks.errors import AggregationError
from tasks.rng import generator


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "formulas"), dtype=dtype)


def draw() -> torch.Generator:
    return generator(7, "attack")


def moments(known: Tensor) -> tuple[list[float], list[float]]:
    means, stds = [], []
    for column in known.double().t().tolist():
        mean = math.fsum(column) / len(column)
        means.append(mean)
        stds.append(math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column)))
    return means, stds


# ---- Fang's attack on Krum


def slow_krum(rows: Tensor, neighbours: int) -> int:
    scores = []
    for i in range(len(rows)):
        others = sorted(float((rows[i] - rows[j]).square().sum()) for j in range(len(rows)) if j != i)
        scores.append(math.fsum(others[:neighbours]))
    return min(range(len(rows)), key=lambda i: scores[i])


def slow_search(known: Tensor, signs: Tensor, copies: int, neighbours: int) -> tuple[Tensor, bool]:
    """Theorem 1 and the halving with Krum itself run on the whole stack in every step."""
    scores = []
    for i in range(len(known)):
        others = sorted(float((known[i] - known[j]).square().sum()) for j in range(len(known)) if j != i)
        scores.append(math.fsum(others[:neighbours]))
    root = math.sqrt(known.shape[1])
    size = math.sqrt(min(scores) / (neighbours - copies + 1)) / root + max(float(row.norm()) for row in known) / root
    least = 1e-5 * size
    while True:
        stack = torch.cat([known, (-size * signs).expand(copies, -1)])  # honest first: a tie is theirs
        if slow_krum(stack, neighbours) >= len(known):
            return -size * signs, True
        if size / 2 <= least:
            return -size * signs, False
        size /= 2


def slow_fang_krum(known: Tensor, f: int, n: int) -> tuple[Tensor, bool]:
    """The attack with full knowledge; n - f - 2 - f + 1 is the n - 2f - 1 of theorem 1."""
    return slow_search(known, known[slow_krum(known, n - f - 2)].sign(), f, n - f - 2)


@pytest.mark.parametrize(("n", "f"), [(5, 1), (9, 3), (15, 6), (12, 2)])
@pytest.mark.parametrize("shift", [0.0, 0.2, 5.0])
def test_fang_krum_is_the_search_with_krum_itself(n: int, f: int, shift: float) -> None:
    for seed in range(3):
        known = normal(n - f, 40, seed=seed) + shift
        expected, found = slow_fang_krum(known, f, n)
        sent = fang_krum(known, f, n, draw())
        torch.testing.assert_close(sent, expected.expand(f, -1), rtol=1e-10, atol=0)
        if found:  # and the rule of the house falls for it, wherever the attackers sit
            for stack in (torch.cat([known, sent]), torch.cat([sent, known])):
                assert torch.equal(krum(stack.float(), num_byzantine=f), sent[0].float())


def test_fang_krum_succeeds_on_a_spread_and_fails_on_a_tight_cluster_far_away() -> None:
    assert slow_fang_krum(normal(7, 40) + 0.1, 4, 11)[1]
    assert not slow_fang_krum(normal(7, 40) + 50, 4, 11)[1]


def test_fang_krum_bound_is_an_upper_bound() -> None:
    """Beyond theorem 1's lambda no copy is selected: the first step of the search loses nothing."""
    for seed in range(10):
        known = normal(8, 20, seed=seed)
        neighbours = 13 - 5 - 2
        signs = known[slow_krum(known, neighbours)].sign()
        scores = sorted(
            float(s) for s in torch.cdist(known, known).square().sort(1).values[:, 1 : neighbours + 1].sum(1)
        )
        bound = math.sqrt(scores[0] / (2 * 20)) + float(known.norm(dim=1).max()) / math.sqrt(20)
        for factor in (1.001, 1.5, 4, 100):
            stack = torch.cat([known, (-factor * bound * signs).expand(5, -1)])
            assert slow_krum(stack, neighbours) < len(known)


def test_fang_krum_moves_against_the_direction_and_leaves_dead_parameters_alone() -> None:
    known = normal(7, 40) + 0.2
    known[:, 5] = 0.0
    sent = fang_krum(known, 4, 11, draw())
    chosen = known[slow_krum(known, 5)]
    assert torch.equal(sent[0].sign(), -chosen.sign())
    assert sent[:, 5].eq(0).all()
    assert sent[0].abs()[chosen != 0].unique().numel() == 1


def test_fang_krum_of_a_krum_that_assumes_another_number() -> None:
    known = normal(9, 40) + 0.1
    sent = fang_krum(known, 2, 11, draw(), num_byzantine=4)
    assert torch.equal(krum(torch.cat([known, sent]), num_byzantine=4), sent[0])
    assert not torch.equal(sent, fang_krum(known, 2, 11, draw()))


@pytest.mark.parametrize(("n", "f", "assumed"), [(10, 4, None), (6, 2, None), (11, 2, 5), (13, 7, 5), (4, 1, None)])
def test_fang_krum_refuses_a_krum_that_is_not_defined(n: int, f: int, assumed: int | None) -> None:
    with pytest.raises(AggregationError, match="fang_krum wants n >="):
        fang_krum(normal(n - f, 5), f, n, draw(), num_byzantine=assumed)


@pytest.mark.parametrize("shift", [0.0, 0.9, 3.0])
def test_fang_krum_with_partial_knowledge_wins_the_round_it_imagines(shift: float) -> None:
    numbers = []
    for seed in range(10):
        own = normal(5, 40, seed=seed) + shift
        signs = own.mean(0).sign()
        for copies in (1, 2, 3):
            expected, found = slow_search(own, signs, copies, 3)
            if found:
                break
        numbers.append(copies if found else 0)
        torch.testing.assert_close(fang_krum(own, 5, 20, draw()), expected.expand(5, -1), rtol=1e-10, atol=0)
    assert set(numbers) == {0.0: {1}, 0.9: {1, 2}, 3.0: {0}}[shift]  # 0: none is found


def test_fang_krum_loses_ties() -> None:
    """With one known update, it and the copy have the same score whatever is sent: there is nothing to win."""
    own = torch.full((1, 40), 2.0)
    sent = fang_krum(own, 3, 12, draw())
    assert (sent < 0).all()
    assert sent.abs().max() <= 2 * 2e-5


# ---- Fang's attack on the trimmed mean


def slow_interval(column: list[float], factor: float) -> tuple[float, float]:
    """The paper's four cases."""
    if sum(column) / len(column) > 0:
        w = min(column)
        return (w / factor, w) if w > 0 else (factor * w, w)
    w = max(column)
    return (w, factor * w) if w > 0 else (w, w / factor)


@pytest.mark.parametrize("factor", [2.0, 1.25])
def test_fang_trimmed_mean_draws_from_the_papers_intervals(factor: float) -> None:
    known = torch.cat([normal(9, 300) + 4, normal(9, 300) - 4, normal(9, 300)], 1)  # all four cases occur
    sent = fang_trimmed_mean(known, 200, 209, draw(), factor=factor)
    for j, column in enumerate(known.t().tolist()):
        low, high = slow_interval(column, factor)
        drawn = sent[:, j]
        assert low <= float(drawn.min())
        assert float(drawn.max()) <= high
        assert float(drawn.mean()) == pytest.approx((low + high) / 2, abs=0.12 * (high - low))
        assert float(drawn.max() - drawn.min()) > 0.9 * (high - low)


def test_fang_trimmed_mean_with_partial_knowledge_is_three_to_four_deviations_out() -> None:
    own = normal(5, 300) + 0.1
    means, stds = moments(own)
    sent = fang_trimmed_mean(own, 5, 20, draw())
    for j, (mean, std) in enumerate(zip(means, stds)):
        out = ((sent[:, j] - mean) / std * (-1 if mean > 0 else 1)).tolist()
        assert min(out) >= 3 - 1e-9
        assert max(out) <= 4 + 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "f"), [(10, 3), (21, 10), (5, 1)])
def test_fang_trimmed_mean_pushes_every_parameter_against_its_mean(n: int, f: int, dtype: torch.dtype) -> None:
    known = normal(n - f, 500, dtype=dtype)
    sent = fang_trimmed_mean(known, f, n, draw())
    down = known.mean(0) > 0
    assert (sent <= known.amin(0)).all(0)[down].all()
    assert (sent >= known.amax(0)).all(0)[~down].all()
    before, after = known.double().mean(0), trimmed_mean(torch.cat([known, sent]), num_byzantine=f).double()
    assert (after < before)[down].all()
    assert (after > before)[~down].all()


def test_fang_trimmed_mean_leaves_dead_parameters_dead_and_draws_per_attacker() -> None:
    known = normal(6, 10)
    known[:, 3] = 0.0
    known[:, 4] = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.5, -0.5])
    sent = fang_trimmed_mean(known, 4, 10, draw())
    assert sent[:, 3].eq(0).all()
    assert (sent[:, 4] >= 2).all()  # no direction at all: pushed up
    assert len({tuple(row) for row in sent.tolist()}) == 4
