"""Rules against slow obvious versions of their definitions, and their edge cases."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from strategies.context import RoundContext
from strategies.pipeline import Pipeline
from strategies.rule import Stack
from strategies.rules import mda as mda_module
from strategies.rules import smea as smea_module
from strategies.rules.caf import caf
from strategies.rules.centered_clipping import centered_clipping, centered_weights
from strategies.rules.mda import least_diameter, mda
from strategies.rules.meamed import meamed
from strategies.rules.monna import monna
from strategies.rules.rlr import rlr
from strategies.rules.sign_majority import sign_majority
from strategies.rules.smea import smea
from tasks import spec
from tasks.errors import AggregationError, ConfigError
from tasks.rng import generator

CASES = [(1, 0), (2, 0), (3, 1), (5, 1), (5, 2), (9, 2), (9, 4), (10, 3)]
ATTACKS = ["none", "together", "apart", "near", "huge"]


def updates_of(num_clients: int, num_byzantine: int, attack: str = "none", num_params: int = 6) -> Tensor:
    draw = generator(num_clients, num_byzantine, attack)
    updates = torch.randn(num_clients, num_params, generator=draw, dtype=torch.float64) + 1
    bad = updates[:num_byzantine]
    if attack == "together":
        bad += 30
    elif attack == "apart":
        bad *= -50
    elif attack == "near":
        bad.copy_(updates.mean(0) + 0.1 * torch.randn(bad.shape, generator=draw, dtype=torch.float64) + 1.5)
    elif attack == "huge":
        bad *= 1e9
    return updates[torch.randperm(num_clients, generator=draw)]


every_case = pytest.mark.parametrize(("n", "f"), CASES)
every_attack = pytest.mark.parametrize("attack", ATTACKS)


def exact(one: Tensor, other: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(one, other, rtol=rtol, atol=1e-10)


# centered clipping


def slow_centered_clipping(updates: Tensor, start: Tensor, radius: float | None, num_steps: int) -> Tensor:
    v = start.double().clone()
    for _ in range(num_steps):
        lengths = sorted(float((x - v).norm()) for x in updates)
        limit = lengths[(len(lengths) - 1) // 2] if radius is None else radius
        step = torch.zeros_like(v)
        for x in updates:
            length = float((x - v).norm())
            step += (x - v) * (min(1.0, limit / length) if length else 1.0)
        v = v + step / len(updates)
    return v


@every_case
@every_attack
@pytest.mark.parametrize("radius", [None, 0.3, 1e3])
@pytest.mark.parametrize("num_steps", [1, 4])
def test_centered_clipping_walks_as_written(n: int, f: int, attack: str, radius: float | None, num_steps: int) -> None:
    updates = updates_of(n, f, attack)
    for start in (torch.zeros(6), torch.ones(6), 100 * torch.ones(6)):
        wanted = slow_centered_clipping(updates, start, radius, num_steps)
        result = centered_clipping(updates, start, radius=radius, num_steps=num_steps)
        torch.testing.assert_close(result, wanted, rtol=1e-7, atol=1e-7 * float(1 + wanted.abs().max()))


def test_centered_clipping_gives_weights_that_make_its_result() -> None:
    updates, start = updates_of(9, 2, "apart"), torch.full((6,), 2.0)
    weights, share = centered_weights(Stack(updates), start, radius=1.0, num_steps=2)
    assert abs(float(weights.sum()) + share - 1) < 1e-14
    assert share > 0
    exact(weights @ updates + share * start.double(), centered_clipping(updates, start, radius=1.0, num_steps=2))


def test_centered_clipping_forgets_the_start_where_nobody_is_clipped() -> None:
    updates = updates_of(7, 0)
    weights, share = centered_weights(Stack(updates), torch.full((6,), 3.0), radius=1e6, num_steps=1)
    assert share == 0
    exact(weights, torch.full((7,), 1 / 7, dtype=torch.float64))


@pytest.mark.parametrize("size", [1e4, 1e8, 1e12, 1e30])
def test_centered_clipping_in_float32_keeps_the_share_of_a_far_outlier(size: float) -> None:
    """The pull of an outlier is as long as the radius, however far it is: no rounding may make it longer."""
    honest = torch.randn(9, 40, generator=generator(1)) * 1e-3
    updates = torch.cat([honest, size * torch.nn.functional.normalize(torch.ones(2, 40))])
    wanted = slow_centered_clipping(updates.double(), torch.zeros(40), None, 3)
    result = centered_clipping(updates, torch.zeros(40)).double()
    assert float((result - wanted).norm()) < 1e-4 * float(wanted.norm())


def test_centered_clipping_never_moves_further_than_the_radius_allows() -> None:
    updates = updates_of(9, 4, "huge")
    for num_steps in (1, 2, 5):
        moved = centered_clipping(updates, torch.ones(6), radius=0.25, num_steps=num_steps) - 1
        assert float(moved.norm()) <= 0.25 * num_steps * (1 + 1e-9)


def test_centered_clipping_where_the_start_is_far_off_or_an_update() -> None:
    near = 5.0 + 1e-4 * torch.randn(8, 30, generator=generator(2))
    wanted = slow_centered_clipping(near.double(), near[3], None, 3)
    torch.testing.assert_close(centered_clipping(near, near[3]).double(), wanted, rtol=0, atol=2e-6)
    for update in (torch.zeros(30), near[0]):
        assert torch.equal(centered_clipping(update.expand(4, -1), update), update)
    torch.testing.assert_close(centered_clipping(near[:1], torch.zeros(30)), near[0])
    unreachable = torch.cat([near.double(), torch.full((1, 30), 1e200, dtype=torch.float64)])
    assert centered_clipping(unreachable, torch.zeros(30)).norm() < 1e2


def test_centered_clipping_mixed_and_shortened() -> None:
    updates = updates_of(8, 2, "apart")
    matrix = torch.rand(5, 8, generator=generator(3), dtype=torch.float64)
    matrix = matrix / matrix.sum(1, keepdim=True)
    matrix[2] *= 0.4
    start = torch.full((6,), 0.5)
    mixed = Stack(updates).mixed(matrix)
    exact(centered_clipping(mixed, start), slow_centered_clipping(matrix @ updates, start, None, 3), 1e-7)


def test_centered_clipping_refuses() -> None:
    with pytest.raises(ConfigError, match="radius > 0"):
        centered_clipping(torch.ones(3, 2), torch.zeros(2), radius=0.0)
    with pytest.raises(ConfigError, match="num_steps >= 1"):
        centered_clipping(torch.ones(3, 2), torch.zeros(2), num_steps=0)
    with pytest.raises(AggregationError, match=r"previous is \[2\].*got \[3\]"):
        centered_clipping(torch.ones(3, 2), torch.zeros(3))


def test_centered_clipping_starts_at_the_aggregate_of_the_round_before() -> None:
    pipeline = Pipeline(spec.resolve("rule", "centered_clipping(radius=0.5, num_steps=1)"))
    updates, memory = updates_of(5, 0).float(), {}
    first = pipeline.aggregate(updates, RoundContext(range(5), 1, memory=memory)).vector
    second = pipeline.aggregate(updates, RoundContext(range(5), 2, memory=memory)).vector
    wanted = slow_centered_clipping(updates.double(), first, 0.5, 1)
    torch.testing.assert_close(second.double(), wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(first, second)


# minimum diameter averaging


def sorted_lengths(updates: Tensor, members: tuple[int, ...]) -> list[float]:
    return sorted(
        (float((updates[i] - updates[j]).norm()) for i, j in itertools.combinations(members, 2)), reverse=True
    )


@every_case
@every_attack
def test_mda_finds_the_set_of_least_diameter(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack)
    best = min(itertools.combinations(range(n), n - f), key=lambda members: sorted_lengths(updates, members))
    weights = mda.weights(updates, num_byzantine=f)
    assert weights.nonzero().flatten().tolist() == list(best)
    exact(mda(updates, num_byzantine=f), updates[list(best)].mean(0))


@pytest.mark.parametrize("seed", range(30))
def test_mda_on_hard_small_graphs(seed: int) -> None:
    """Distances drawn at random, hence no geometry that would help the search."""
    draw = generator(seed, "graph")
    distances = torch.rand(11, 11, generator=draw, dtype=torch.float64)
    distances = (distances + distances.t()).fill_diagonal_(0).numpy()
    for num_out in (1, 3, 5):
        best = min(
            itertools.combinations(range(11), 11 - num_out),
            key=lambda members: sorted((distances[i, j] for i, j in itertools.combinations(members, 2)), reverse=True),
        )
        assert least_diameter(distances, num_out) == list(best)


def test_mda_with_ties_still_finds_the_least_diameter() -> None:
    for seed in range(20):
        points = torch.randint(0, 3, (9, 2), generator=generator(seed, "ties")).double()
        weights = mda.weights(points, num_byzantine=3)
        members = tuple(weights.nonzero().flatten().tolist())
        least = min(sorted_lengths(points, some)[0] for some in itertools.combinations(range(9), 6))
        assert sorted_lengths(points, members)[0] == least
    assert mda.weights(torch.ones(5, 3), num_byzantine=2).tolist() == [1 / 3] * 3 + [0, 0]
    assert mda.weights(torch.eye(5), num_byzantine=2).tolist() == [1 / 3] * 3 + [0, 0]


def test_mda_at_fifty_clients_needs_next_to_no_search() -> None:
    """Of C(50, 24) = 1e14 sets, in a fraction of a second; every swap of a member leaves a longer pair or the same."""
    updates = torch.randn(50, 30, generator=generator(5), dtype=torch.float64)
    members = mda.weights(updates, num_byzantine=24).nonzero().flatten().tolist()
    distances = torch.cdist(updates, updates)
    diameter = distances[members][:, members].max()
    assert len(members) == 26
    nearest = distances.sort(1).values[:, 25]  # to the 25th other: no set with this client is narrower
    assert diameter >= nearest.sort().values[25]
    balls = distances.argsort(1)[:, :26]
    assert diameter <= min(distances[ball][:, ball].max() for ball in balls)


def test_mda_says_when_it_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mda_module, "MOST_BRANCHES", 3)
    updates = torch.randn(50, 30, generator=generator(5))
    with pytest.raises(AggregationError, match=r"mda gave up .* n = 50 and f = 24 .* use caf or geometric_median"):
        mda(updates, num_byzantine=24)


# mean around the median


def slow_meamed(updates: Tensor, f: int) -> Tensor:
    result = []
    for column in updates.t().tolist():
        values = sorted(column)
        median = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        nearest = sorted(values, key=lambda value: abs(value - median))[: len(values) - f]
        result.append(math.fsum(nearest) / len(nearest))
    return torch.tensor(result, dtype=updates.dtype)


@every_case
@every_attack
def test_meamed_averages_the_values_nearest_to_the_median(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack, num_params=200)
    exact(meamed(updates, num_byzantine=f), slow_meamed(updates, f))


def test_meamed_ties_and_largest_numbers() -> None:
    assert meamed(torch.tensor([[-1.0], [0.0], [1.0]]), num_byzantine=1).tolist() == [-0.5]
    assert meamed(torch.tensor([[2.0], [2.0], [2.0], [9.0], [9.0]]), num_byzantine=2).tolist() == [2.0]
    largest = torch.finfo(torch.float32).max
    assert meamed(torch.full((5, 3), largest), num_byzantine=1).tolist() == [largest] * 3
    hostile = torch.tensor([[1.0], [2.0], [3.0], [largest], [-largest]])
    assert meamed(hostile, num_byzantine=2).tolist() == [2.0]


# smallest maximum eigenvalue averaging


def widest(updates: Tensor, members: tuple[int, ...]) -> float:
    chosen = updates[list(members)]
    centred = chosen - chosen.mean(0)
    return float(torch.linalg.matrix_norm(centred, 2)) ** 2 / len(members)


@every_case
@every_attack
def test_smea_finds_the_set_of_least_largest_eigenvalue(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack)
    best = min(itertools.combinations(range(n), n - f), key=lambda members: widest(updates, members))
    chosen = tuple(smea.weights(updates, num_byzantine=f).nonzero().flatten().tolist())
    assert len(chosen) == n - f
    assert widest(updates, chosen) == pytest.approx(widest(updates, best), rel=1e-9)


@pytest.mark.parametrize("num_params", [1, 2, 300])
@pytest.mark.parametrize("seed", range(4))
def test_smea_among_many_sets(num_params: int, seed: int) -> None:
    """Thousands of sets: several chunks, bounds and batches; the slow version is one batch of eigenvalues."""
    updates = torch.randn(16, num_params, generator=generator(seed, "smea"), dtype=torch.float64)
    sets = torch.tensor(list(itertools.combinations(range(16), 11)))
    members = updates[sets]
    centred = members - members.mean(1, keepdim=True)
    spreads = torch.linalg.eigvalsh(centred @ centred.transpose(1, 2))[:, -1]
    chosen = smea.weights(updates, num_byzantine=5).nonzero().flatten()
    centred = updates[chosen] - updates[chosen].mean(0)
    value = torch.linalg.eigvalsh(centred @ centred.t())[-1]
    assert float(value) == pytest.approx(float(spreads.min()), rel=1e-9)


def test_smea_needs_no_search_for_distant_attackers() -> None:
    updates = torch.randn(60, 40, generator=generator(1))
    updates[5:30] = 1e3 * torch.randn(25, 40, generator=generator(2))
    weights = smea.weights(updates, num_byzantine=25)
    assert weights.nonzero().flatten().tolist() == [*range(5), *range(30, 60)]


def test_smea_says_when_there_are_too_many_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AggregationError, match=r"would have to try 10272278170 sets of 40 among 50 .* use caf"):
        smea(torch.randn(50, 100, generator=generator(3)), num_byzantine=10)
    monkeypatch.setattr(smea_module, "MOST_SETS", 55)
    with pytest.raises(AggregationError, match="would have to try 56 sets of 5 among 8 updates, more than 55"):
        smea(torch.eye(8) + 0.01 * torch.randn(8, 8, generator=generator(3)), num_byzantine=3)


def test_smea_of_equal_updates() -> None:
    assert smea.weights(torch.ones(5, 3), num_byzantine=2).tolist() == [1 / 3] * 3 + [0, 0]
    almost = torch.ones(5, 3)
    almost[1] = 2
    assert smea.weights(almost, num_byzantine=1).tolist() == [0.25, 0, 0.25, 0.25, 0.25]


# covariance-bound agnostic filter


def slow_caf(updates: Tensor, f: int) -> Tensor:
    """In d-space, with the covariance matrix written out."""
    n = len(updates)
    c, best, least = torch.ones(n, dtype=torch.float64), updates.mean(0), torch.inf
    while float(c.sum()) > n - 2 * f:
        mean = (c[:, None] * updates).sum(0) / c.sum()
        offsets = updates - mean
        covariance = sum(c[i] * torch.outer(offsets[i], offsets[i]) for i in range(n)) / c.sum()
        values, vectors = torch.linalg.eigh(covariance)
        if values[-1] < least:
            best, least = mean, values[-1]
        tops = torch.where(c > 0, (offsets @ vectors[:, -1]).square(), 0.0)
        if values[-1] <= 1e-20:
            break
        c = c * (1 - tops / tops.max())
    return best


@every_case
@pytest.mark.parametrize("attack", [attack for attack in ATTACKS if attack != "huge"])
def test_caf_filters_as_in_full_space(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack)
    exact(caf(updates, num_byzantine=f), slow_caf(updates, f), 1e-6)


def test_caf_drops_distant_attackers_entirely() -> None:
    updates = torch.randn(20, 30, generator=generator(4))
    updates[3:9] = 1e20 * torch.randn(6, 30, generator=generator(5))
    weights = caf.weights(updates, num_byzantine=6)
    assert float(weights[3:9].abs().max()) < 1e-25
    assert abs(float(weights.sum()) - 1) < 1e-12


def test_caf_of_equal_updates_and_of_f_zero() -> None:
    uniform = torch.full((5,), 0.2, dtype=torch.float64)
    assert torch.equal(caf.weights(torch.ones(5, 3), num_byzantine=2), uniform)
    assert torch.equal(caf.weights(torch.zeros(5, 3), num_byzantine=2), uniform)
    assert torch.equal(caf.weights(torch.randn(5, 3, generator=generator(1)), num_byzantine=0), uniform)
    almost = torch.ones(7, 3)
    almost[4] = 1e6
    assert caf.weights(almost, num_byzantine=2)[4] == 0


# nearest to a trusted client


@every_case
@every_attack
def test_monna_averages_the_nearest_to_the_trusted_client(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack)
    clients = [10 * i for i in range(n)]
    for row in range(n):
        nearest = sorted(range(n), key=lambda i: float((updates[i] - updates[row]).norm()))[: n - f]
        exact(monna(updates, clients, num_byzantine=f, trusted=10 * row), updates[nearest].mean(0))


def test_monna_keeps_the_trusted_client_among_equals_and_in_float32_next_to_a_large_offset() -> None:
    weights = monna.weights(torch.ones(5, 3), list(range(5)), num_byzantine=2, trusted=4)
    assert weights.tolist() == [1 / 3, 1 / 3, 0, 0, 1 / 3]
    updates = 1e4 + torch.randn(9, 50, generator=generator(1)) * torch.linspace(0.1, 1, 9)[:, None]
    wanted = (updates.double() - updates[2].double()).norm(dim=1).argsort()[:5].sort().values
    given = monna.weights(updates, list(range(9)), num_byzantine=4, trusted=2)
    assert torch.equal(given.nonzero().flatten(), wanted)


def test_monna_refuses_without_its_client_and_behind_a_mixing() -> None:
    with pytest.raises(AggregationError, match=r"monna trusts client 7, .* \[1, 2, 3\]"):
        monna(torch.ones(3, 2), [1, 2, 3], num_byzantine=1, trusted=7)
    mixed = Pipeline(
        spec.resolve("rule", "monna(num_byzantine=1, trusted=0)"),
        spec.resolve_chain("mixing", "clip_norms(max_norm=1.0)"),
    )
    with pytest.raises(ConfigError, match="monna looks at single clients"):
        mixed.check()


# signs


@every_case
@every_attack
def test_sign_majority_counts_votes(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack, num_params=50)
    updates[updates.abs() < 0.3] = 0
    votes = [sum((x > 0) - (x < 0) for x in column) for column in updates.t().tolist()]
    signs = torch.tensor([(vote > 0) - (vote < 0) for vote in votes], dtype=torch.float64)
    exact(sign_majority(updates, step_size=0.01), 0.01 * signs)
    size = updates.abs().mean(1).quantile(0.5)
    exact(sign_majority(updates), size * signs)


def test_sign_majority_is_no_longer_than_the_longest_honest_update() -> None:
    for attack in ATTACKS:
        updates = updates_of(9, 4, attack, num_params=9000).float()
        honest = updates.norm(dim=1).sort().values[4]
        assert float(sign_majority(updates).norm()) <= float(honest) * (1 + 1e-5)
    huge = torch.full((3, 9), 1e38)
    torch.testing.assert_close(sign_majority(huge), huge[0])


def test_sign_majority_edges() -> None:
    assert sign_majority(torch.zeros(3, 4)).tolist() == [0, 0, 0, 0]
    assert sign_majority(torch.tensor([[2.0, -1.0]])).tolist() == [1.5, -1.5]
    assert sign_majority(torch.tensor([[2.0], [-1.0]])).tolist() == [0]
    with pytest.raises(ConfigError, match="step_size > 0"):
        sign_majority(torch.ones(3, 2), step_size=-1.0)


@every_case
@pytest.mark.parametrize("attack", ATTACKS)
def test_rlr_turns_the_mean_where_votes_are_short(n: int, f: int, attack: str) -> None:
    updates = updates_of(n, f, attack, num_params=50)
    for threshold in range(1, n + 1):
        wanted = []
        for column in updates.t().tolist():
            votes = sum((x > 0) - (x < 0) for x in column)
            wanted.append(math.fsum(column) / n * (1 if abs(votes) >= threshold else -1))
        exact(rlr(updates, threshold=threshold), torch.tensor(wanted, dtype=torch.float64))


def test_rlr_edges() -> None:
    updates = torch.tensor([[1.0], [1.0], [1.0], [-9.0], [0.0]])
    assert rlr(updates, threshold=2).item() == pytest.approx(-1.2)
    assert rlr(updates, threshold=3).item() == pytest.approx(1.2)
    assert rlr(updates, threshold=0.4).item() == rlr(updates, threshold=2).item()
    assert rlr(updates, threshold=0.41).item() == rlr(updates, threshold=3).item()
    largest = torch.finfo(torch.float32).max
    torch.testing.assert_close(rlr(torch.full((3, 2), largest), threshold=1), torch.full((2,), largest))
    with pytest.raises(AggregationError, match="threshold <= n, got 6 with n = 5"):
        rlr(updates, threshold=6)
    for wrong in (0, 0.0, 1.5):
        with pytest.raises(ConfigError, match="threshold"):
            rlr(updates, threshold=wrong)


@pytest.mark.parametrize("text", ["mda", "meamed", "smea", "caf", "monna"])
def test_rules_refuse_half_or_more_attackers(text: str) -> None:
    for n, f in ((2, 1), (4, 2), (1, 1)):
        trusted = ", trusted=0" if text == "monna" else ""
        rule = spec.resolve("rule", f"{text}(num_byzantine={f}{trusted})")
        besides = (list(range(n)),) if trusted else ()
        with pytest.raises(AggregationError, match=rf"{text} wants n >= 2f \+ 1 = {2 * f + 1}, got n = {n}"):
            rule(torch.ones(n, 3), *besides)
