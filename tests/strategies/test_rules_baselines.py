"""Bulyan, FoolsGold, FLTrust, DnC, FLAME, norm clipping, weak DP: slow versions as the papers read, edges, attacks."""

import itertools
import math
from random import Random
from typing import Literal, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import HDBSCAN
from torch import Tensor

from strategies.context import RoundContext
from strategies.pipeline import Pipeline
from strategies.rules import bulyan as bulyan_file
from strategies.rules import dnc as dnc_file
from strategies.rules import flame as flame_file
from strategies.rules import foolsgold as foolsgold_file
from strategies.rules.bulyan import bulyan
from strategies.rules.dnc import dnc
from strategies.rules.flame import flame
from strategies.rules.fltrust import fltrust
from strategies.rules.foolsgold import foolsgold
from strategies.rules.norm_clipping import norm_clipping
from strategies.rules.weak_dp import weak_dp
from strategies.sorting import nearest_mean
from strategies.stack import Stack
from tasks import spec
from tasks.errors import AggregationError, ConfigError
from tasks.params import Layout
from tasks.rng import generator


def updates_of(num_clients: int, num_params: int = 40, seed: int = 1, common: float = 1.0) -> Tensor:
    draw = generator(seed, "baselines", num_clients)
    return torch.randn(num_clients, num_params, generator=draw) + common * torch.randn(num_params, generator=draw)


def rows_of(updates: Tensor) -> list[list[float]]:
    return updates.double().tolist()


def dot(one: list[float], other: list[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other))


def average(rows: list[list[float]]) -> Tensor:
    return torch.tensor([math.fsum(column) / len(rows) for column in zip(*rows)], dtype=torch.float64)


def close(result: Tensor, slow: Tensor) -> None:
    torch.testing.assert_close(result.double(), slow.double(), rtol=1e-4, atol=1e-5)


# --- Bulyan


Inner = Literal["krum", "trimmed_mean", "median"]
INNERS: tuple[Inner, ...] = get_args(Inner)


def slow_median(values: list[float]) -> float:
    ordered = sorted(values)
    return (ordered[(len(values) - 1) // 2] + ordered[len(values) // 2]) / 2


def slow_inner(pool: list[list[float]], f: int, inner: Inner) -> int:
    """Return the place in `pool` of the row nearest to the output of the inner rule, as the definitions read."""
    if inner == "krum":
        scores = []
        for i, one in enumerate(pool):
            others = sorted(math.dist(one, other) ** 2 for j, other in enumerate(pool) if j != i)
            scores.append(math.fsum(others[: len(pool) - f - 2]))
    else:
        if inner == "median":
            point = [slow_median(list(column)) for column in zip(*pool)]
        else:
            point = [math.fsum(sorted(column)[f : len(pool) - f]) / (len(pool) - 2 * f) for column in zip(*pool)]
        scores = [math.dist(row, point) for row in pool]
    return scores.index(min(scores))


def slow_picks(updates: Tensor, f: int, inner: Inner) -> list[int]:
    rows, left, picks = rows_of(updates), list(range(len(updates))), []
    for _ in range(len(updates) - 2 * f):
        picks.append(left.pop(slow_inner([rows[i] for i in left], f, inner)))
    return picks


def slow_nearest_mean(column: list[float], count: int) -> float:
    middle = slow_median(column)
    return math.fsum(sorted(column, key=lambda value: (abs(value - middle), value))[:count]) / count


def slow_bulyan(updates: Tensor, f: int, inner: Inner) -> Tensor:
    chosen = [rows_of(updates)[i] for i in slow_picks(updates, f, inner)]
    return torch.tensor([slow_nearest_mean(list(column), len(updates) - 4 * f) for column in zip(*chosen)])


def picks_of(updates: Tensor, f: int, inner: Inner) -> list[int]:
    if inner == "krum":
        return bulyan_file.krum_picks(Stack.of(updates).squared_distances, f).tolist()
    return bulyan_file.central_picks(Stack.of(updates), f, inner).tolist()


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize(("n", "f"), [(3, 0), (6, 0), (7, 1), (10, 1), (11, 2), (12, 2), (19, 4), (24, 5)])
def test_bulyan_is_the_slow_one(n: int, f: int, inner: Inner) -> None:
    for seed in range(3):
        updates = updates_of(n, 17, seed)
        updates[:f] *= 30
        assert picks_of(updates, f, inner) == slow_picks(updates, f, inner)
        close(bulyan(updates, num_byzantine=f, inner=inner), slow_bulyan(updates, f, inner))


def test_bulyan_without_attackers_is_the_mean() -> None:
    updates = updates_of(9)
    for inner in INNERS:
        close(bulyan(updates, num_byzantine=0, inner=inner), updates.mean(0))


@pytest.mark.parametrize(("n", "f"), [(6, 1), (10, 2), (10, 4), (18, 4), (2, 0)])
def test_bulyan_wants_4f_plus_3(n: int, f: int) -> None:
    with pytest.raises(AggregationError, match=rf"bulyan wants n >= 4f \+ 3 = {4 * f + 3}, got n = {n} with f = {f}"):
        bulyan(updates_of(n), num_byzantine=f)


def test_bulyans_ties_go_to_the_lowest_index() -> None:
    same = torch.ones(11, 5)
    for inner in INNERS:
        assert picks_of(same, 2, inner) == list(range(7))
        assert torch.equal(bulyan(same, num_byzantine=2, inner=inner), torch.ones(5))


def test_bulyans_last_pick_with_f_of_1_has_no_neighbours() -> None:
    """With 3 updates left and f = 1, Krum sums no distance at all: whatever they hold, the lowest index is next."""
    updates = updates_of(7, 20)
    *_, last = picks_of(updates, 1, "krum")
    earlier = picks_of(updates, 1, "krum")[:-1]
    assert last == min(set(range(7)) - set(earlier))
    far = updates.clone()
    far[last] *= 5  # still not among the first picks, so still the lowest of the three
    assert picks_of(far, 1, "krum")[-1] == min(set(range(7)) - set(picks_of(far, 1, "krum")[:-1]))


@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("size", [1e2, 1e12, 1e30])
def test_bulyan_stays_among_honest_values_at_breakdown(inner: Inner, size: float) -> None:
    for n, f in ((7, 1), (11, 2), (23, 5)):
        for outlier in (torch.ones(30), torch.randn(f, 30, generator=generator(7))):
            updates = updates_of(n, 30)
            updates[n - f :] = size * outlier
            honest = updates[: n - f]
            result = bulyan(updates, num_byzantine=f, inner=inner)
            assert bool((result >= honest.amin(0)).all())
            assert bool((result <= honest.amax(0)).all())


def test_bulyan_krum_with_distances_that_no_float64_holds() -> None:
    updates = updates_of(11, 30).double()
    updates[[2, 5]] *= 1e200
    assert set(picks_of(updates, 2, "krum")[:5]).isdisjoint({2, 5})
    assert float(bulyan(updates, num_byzantine=2).abs().max()) < 10
    assert picks_of(updates_of(11, 30).double() * 1e200, 2, "krum") == list(range(7))


@pytest.mark.parametrize("inner", INNERS)
def test_bulyan_of_mixtures_is_bulyan_of_the_mixed_updates(inner: Inner) -> None:
    updates = updates_of(13)
    pairs = torch.eye(13, dtype=torch.float64) / 2 + torch.eye(13, dtype=torch.float64).roll(1, 0) / 2
    stack = Stack.of(updates).mixed(pairs)
    mixed = pairs.float() @ updates
    close(bulyan(stack, num_byzantine=2, inner=inner), bulyan(mixed, num_byzantine=2, inner=inner))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(-4, 4), min_size=1, max_size=12), st.data())
def test_nearest_mean_settles_ties_as_the_slow_one(column: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(column)))
    result = float(nearest_mean(torch.tensor(column, dtype=torch.float64)[:, None], count))
    assert result == pytest.approx(slow_nearest_mean([float(value) for value in column], count), abs=1e-12)


# --- FoolsGold


def slow_foolsgold(history: Tensor) -> list[float]:
    """Algorithm 1 of the paper as it reads, in loops, with weights over n."""
    rows = rows_of(history)
    n = len(rows)

    def cosine(i: int, j: int) -> float:
        lengths = math.sqrt(dot(rows[i], rows[i])) * math.sqrt(dot(rows[j], rows[j]))
        return dot(rows[i], rows[j]) / lengths if lengths and i != j else 0.0

    cs = [[cosine(i, j) for j in range(n)] for i in range(n)]
    most = [max(row) for row in cs]
    for i, j in itertools.product(range(n), repeat=2):
        if i != j and most[i] < most[j]:
            cs[i][j] *= most[i] / most[j]
    singular = [min(1.0, max(0.0, 1 - max(row))) for row in cs]
    top = max(singular)
    weights = []
    for value in singular:
        share = value / top
        share = 0.99 if share == 1 else share
        rate = math.log(share / (1 - share)) + 0.5 if share > 0 else -math.inf
        weights.append(min(1.0, max(0.0, rate)) / n)
    return weights


@pytest.mark.parametrize("n", [1, 2, 3, 8, 15])
def test_foolsgold_is_the_slow_one(n: int) -> None:
    for seed in range(8):
        history = updates_of(n, 12, seed, common=0.5)
        history[: n // 3] = history[0] + 0.1 * history[: n // 3]
        weights = foolsgold.weights(updates_of(n), history)
        torch.testing.assert_close(weights, torch.tensor(slow_foolsgold(history), dtype=torch.float64))


def test_foolsgold_silences_sybils_and_pardons_who_resembles_them_a_little() -> None:
    history = torch.eye(6)
    history[1] = history[0]  # two sybils
    history[2, 0] = 0.3  # honest, a little like them
    weights = foolsgold.weights(torch.zeros(6, 4), history)
    assert weights[:2].tolist() == [0, 0]
    assert weights[2:].tolist() == [1 / 6] * 4
    assert foolsgold_file.learning_rates(torch.tensor([[0.0, 0.9], [0.9, 0.0]]).double()).tolist() == [1, 1]


def test_foolsgold_bears_any_number_of_sybils() -> None:
    history = torch.randn(20, 500, generator=generator(2))
    history[3:] = history[3] * torch.linspace(1e-3, 1e6, 17)[:, None]
    history[3:] += (
        0.05 * history[3:].norm(dim=1, keepdim=True) * torch.randn(17, 500, generator=generator(3)) / 500**0.5
    )
    weights = foolsgold.weights(torch.zeros(20, 4), history)
    assert weights.tolist() == [1 / 20] * 3 + [0.0] * 17


def test_foolsgold_with_equal_histories_moves_nothing() -> None:
    updates = updates_of(5)
    for history in (torch.ones(5, 3), torch.ones(5, 3) * torch.arange(1, 6)[:, None]):
        assert torch.equal(foolsgold(updates, history), torch.zeros(40))
    almost = torch.ones(5, 1000) + 1e-7 * torch.randn(5, 1000, generator=generator(3))
    assert torch.equal(foolsgold(updates, almost), torch.zeros(40))


def test_foolsgold_of_one_client_and_of_zeros() -> None:
    assert foolsgold.weights(torch.ones(1, 4), torch.ones(1, 4)).tolist() == [1]
    assert foolsgold.weights(torch.ones(1, 4), torch.zeros(1, 4)).tolist() == [1]
    assert foolsgold.weights(torch.ones(4, 4), torch.zeros(4, 4)).tolist() == [0.25] * 4
    half = torch.eye(4)
    half[:2] = 0
    assert foolsgold.weights(torch.ones(4, 4), half).tolist() == [0.25] * 4


def test_foolsgold_tells_directions_apart_at_any_size() -> None:
    history = torch.eye(4)
    history[1] = history[0]
    sizes = torch.tensor([1e30, 1e-30, 1.0, 1e12])[:, None]
    assert foolsgold.weights(torch.zeros(4, 4), history * sizes).tolist() == [0, 0, 0.25, 0.25]


def test_foolsgold_remembers_clients_by_identity() -> None:
    """Two sybils whose updates are orthogonal in every round, but whose sums are equal, are found in the second."""
    rule = spec.resolve("rule", "foolsgold()")
    layout = Layout(("hidden.weight", "output.weight", "output.bias"), ((2, 2), (3, 2), (2,)), num_trainable=12)
    output = torch.zeros(4, 12)
    context = RoundContext([7, 3, 9, 5], layout=layout)
    output[0, 4], output[1, 5], output[2, 6], output[3, 7] = 1, 1, 1, 1
    output[:, 0] = 5  # alike outside of the output layer's weight, where nobody looks
    weights = Pipeline(rule).aggregate(output, context).weights
    assert weights is not None
    assert weights.tolist() == [0.25] * 4
    context.round, context.clients = 2, [3, 11, 7]  # 7 and 3 swap what they send
    again = torch.zeros(3, 12)
    again[0, 4], again[1, 8], again[2, 5] = 1, 1, 1
    weights = Pipeline(rule).aggregate(again, context).weights
    assert weights is not None
    assert weights.tolist() == [0, pytest.approx(1 / 3), 0]
    assert context.memory["history"].shape == (5, 6)


def test_foolsgold_refuses() -> None:
    with pytest.raises(AggregationError, match=r"history of every client, \[3, output features\], got \[2, 5\]"):
        foolsgold(torch.ones(3, 5), torch.ones(2, 5))
    with pytest.raises(ConfigError, match="confidence > 0"):
        foolsgold(torch.ones(3, 5), torch.ones(3, 5), confidence=0.0)


def test_foolsgold_confidence_is_a_factor() -> None:
    similarities = torch.tensor([[0, 0.5, 0], [0.5, 0, 0], [0, 0, 0]]).double()
    plain, half = (foolsgold_file.learning_rates(similarities, confidence) for confidence in (1.0, 0.5))
    assert plain[0] == pytest.approx(0.5)
    assert half[0] == pytest.approx(0.25)
    most = foolsgold_file.learning_rates(similarities, 0.1)[2]
    assert most == pytest.approx(0.1 * (math.log(0.99 / 0.01) + 0.5))


# --- FLTrust


def slow_fltrust(updates: Tensor, root: Tensor) -> Tensor:
    guide = root.double().tolist()
    total, parts = 0.0, []
    for row in rows_of(updates):
        length = math.sqrt(dot(row, row))
        cosine = dot(row, guide) / (length * math.sqrt(dot(guide, guide))) if length else 0.0
        trust = max(0.0, cosine)
        total += trust
        parts.append([trust * math.sqrt(dot(guide, guide)) / length * value if length else 0.0 for value in row])
    return torch.tensor([math.fsum(column) / total for column in zip(*parts)])


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_fltrust_is_the_slow_one(n: int) -> None:
    for seed in range(4):
        updates = updates_of(n, 30, seed)
        root = updates[0] + torch.randn(30, generator=generator(seed, "root"))
        updates[n // 2] = updates[n // 2] * 50 if n > 1 else updates[0]
        updates[2:3] = 0
        close(fltrust(updates, root), slow_fltrust(updates, root))


def test_fltrust_moves_nothing_where_nobody_agrees() -> None:
    root = torch.tensor([1.0, 0.0, 0.0])
    for updates in (-torch.ones(4, 3), torch.zeros(4, 3), torch.tensor([[0.0, 2.0, 1.0]])):
        weights = fltrust.weights(updates, root)
        assert weights.tolist() == [0.0] * len(updates)
        assert torch.equal(fltrust(updates, root), torch.zeros(3))
    assert torch.equal(fltrust(torch.ones(4, 3), torch.zeros(3)), torch.zeros(3))


def test_fltrust_takes_no_part_of_an_update_of_zeros() -> None:
    updates = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 0.0]])
    assert torch.equal(fltrust(updates, torch.tensor([2.0, 0.0])), torch.tensor([2.0, 0.0]))


@pytest.mark.parametrize("size", [1e-45, 1e-38, 1e-30, 1e-12, 1.0, 1e12, 1e30, 3e38])
def test_fltrust_is_never_longer_than_the_servers_update(size: float) -> None:
    root = torch.randn(50, generator=generator(1))
    updates = torch.randn(9, 50, generator=generator(2)).clamp(-1, 1) + 0.2 * root.clamp(-1, 1)
    updates[:8] = (updates[:8] / updates[:8].abs().max()).double().mul(size).float()
    result = fltrust(updates, root)
    assert result.isfinite().all()
    assert float(result.norm()) <= float(root.norm()) * (1 + 1e-5)


def test_fltrust_refuses_a_root_update_that_is_none() -> None:
    with pytest.raises(AggregationError, match=r"server's own, \[5\], got \[4\]"):
        fltrust(torch.ones(3, 5), torch.ones(4))
    with pytest.raises(AggregationError, match="finite"):
        fltrust(torch.ones(3, 2), torch.tensor([1.0, torch.nan]))
    with pytest.raises(AggregationError, match="root-samples"):
        Pipeline(spec.resolve("rule", "fltrust()")).aggregate(torch.ones(2, 3), RoundContext([0, 1]))


# --- DnC


def slow_dnc(updates: Tensor, draws: torch.Generator, f: int, repetitions: int, fraction: float, b: int) -> Tensor:
    """Algorithm 2 as it reads, with a singular value decomposition and sets; the fallback by counting."""
    kept = []
    for _ in range(repetitions):
        sampled = updates[:, dnc_file.sample_columns(updates.shape[1], b, draws)].double()
        centred = sampled - sampled.mean(0)
        direction = torch.linalg.svd(centred, full_matrices=False).Vh[0]
        scores = [float(row @ direction) ** 2 for row in centred]
        order = sorted(range(len(updates)), key=lambda i: scores[i])
        kept.append(set(order[: len(updates) - math.ceil(fraction * f)]))
    chosen = set.intersection(*kept)
    if not chosen:
        counts = [sum(i in one for one in kept) for i in range(len(updates))]
        chosen = {i for i, count in enumerate(counts) if count == max(counts)}
    return average([row for i, row in enumerate(rows_of(updates)) if i in chosen])


@pytest.mark.parametrize(("n", "f", "repetitions", "fraction", "b"), [
    (5, 2, 1, 1.0, 10_000), (10, 3, 1, 1.0, 15), (10, 4, 4, 1.0, 10), (10, 3, 3, 1.5, 5), (12, 2, 5, 1.0, 2),
    (3, 0, 2, 1.0, 7),
])  # fmt: skip
def test_dnc_is_the_slow_one(n: int, f: int, repetitions: int, fraction: float, b: int) -> None:
    for seed in range(4):
        updates = updates_of(n, 40, seed)
        updates[:f] += 2
        result = dnc(
            updates, generator(seed), num_byzantine=f, num_iterations=repetitions, filter_fraction=fraction,
            num_columns=b,
        )  # fmt: skip
        close(result, slow_dnc(updates, generator(seed), f, repetitions, fraction, b))


@pytest.mark.parametrize("seed", range(6))
def test_dnc_averages_those_kept_most_often_where_nobody_is_always_kept(seed: int) -> None:
    """One column is looked at, and in each another client is in the middle and alone kept."""
    updates = torch.tensor([[0.0, 5.0, -5.0], [-5.0, 0.0, 5.0], [5.0, -5.0, 0.0]])
    draws = generator(seed)
    looked = [int(dnc_file.sample_columns(3, 1, draws)) for _ in range(5)]
    assert len(set(looked)) > 1
    counts = [looked.count(column) for column in range(3)]
    most = [column for column in range(3) if counts[column] == max(counts)]
    rule = spec.resolve("rule", "dnc(num_byzantine=1, num_iterations=5, filter_fraction=2.0, num_columns=1)")
    close(rule(updates, generator(seed)), updates[most].mean(0))


def test_dnc_drops_outliers_at_breakdown() -> None:
    for n, f in ((5, 2), (11, 5), (50, 24)):
        for size in (1e2, 1e12, 1e30):
            updates = updates_of(n, 60)
            updates[:f] = size * torch.randn(60, generator=generator(4))
            weights = dnc.weights(updates, generator(1), num_byzantine=f)
            assert weights.tolist() == [0.0] * f + [pytest.approx(1 / (n - f))] * (n - f)


def test_dnc_looks_in_one_direction_only() -> None:
    """The limit that the file names: a huge decoy hides an outlier that is far off by all honest measures."""
    updates = updates_of(12, 60, common=0.0)
    updates[:2] = 0
    updates[0, 0], updates[1, 1] = 1e12, 1e4
    assert dnc.weights(updates[1:], generator(1), num_byzantine=1)[0] == 0
    scores = dnc_file.outlier_scores(Stack.of(updates), torch.arange(60))
    assert int(scores.argmax()) == 0
    torch.testing.assert_close(scores[1].expand(10), scores[2:], rtol=1e-6, atol=0)


def test_dnc_with_more_columns_than_parameters_looks_at_all() -> None:
    updates = updates_of(9, 21)
    drawn = generator(1)
    before = drawn.get_state()
    close(dnc(updates, drawn, num_byzantine=2, num_columns=21), dnc(updates, generator(8), num_byzantine=2))
    assert torch.equal(drawn.get_state(), before)


def test_dncs_ties_go_to_the_lowest_index() -> None:
    assert dnc.weights(torch.ones(5, 3), generator(1), num_byzantine=2).tolist() == [pytest.approx(1 / 3)] * 3 + [0, 0]
    assert dnc.weights(torch.ones(1, 3), generator(1), num_byzantine=0).tolist() == [1]


def test_dnc_refuses() -> None:
    updates = updates_of(4)
    with pytest.raises(AggregationError, match=r"dnc wants n >= 2f \+ 1 = 5, got n = 4 with f = 2"):
        dnc(updates, generator(1), num_byzantine=2)
    with pytest.raises(AggregationError, match=r"dnc wants n > filter_fraction \* f, got n = 4 with 4.0 \* 1"):
        dnc(updates, generator(1), num_byzantine=1, filter_fraction=4.0)
    for wrong in ("num_iterations=0", "filter_fraction=0.0", "num_columns=0"):
        with pytest.raises(ConfigError, match="dnc wants"):
            spec.resolve("rule", f"dnc(num_byzantine=1, {wrong})")(updates, generator(1))


@pytest.mark.parametrize(("num_params", "num_columns"), [(5, 9), (12, 12), (12, 5), (60, 6), (200, 49), (10**9, 50)])
def test_sampled_columns_are_distinct_and_as_many_as_wanted(num_params: int, num_columns: int) -> None:
    columns = dnc_file.sample_columns(num_params, num_columns, generator(3))
    assert len(columns) == min(num_params, num_columns)
    assert bool((columns.diff() > 0).all())
    assert 0 <= int(columns[0]) <= int(columns[-1]) < num_params


@pytest.mark.parametrize(("num_params", "num_columns"), [(8, 3), (20, 4)])
def test_sampled_columns_are_as_likely_each(num_params: int, num_columns: int) -> None:
    draws, counts, trials = generator(5), torch.zeros(num_params), 2000
    for _ in range(trials):
        counts[dnc_file.sample_columns(num_params, num_columns, draws)] += 1
    share = num_columns / num_params
    assert float((counts / trials - share).abs().max()) < 5 * math.sqrt(share * (1 - share) / trials)


# --- FLAME


def hdbscan_admits(distances: Tensor, min_samples: int) -> list[int]:
    """What scikit-learn's HDBSCAN admits with FLAME's settings."""
    n = len(distances)
    model = HDBSCAN(
        min_cluster_size=n // 2 + 1,
        min_samples=min_samples,
        metric="precomputed",
        allow_single_cluster=True,
        copy=True,  # pyright: ignore[reportArgumentType]
    )
    return [i for i, label in enumerate(model.fit(distances.numpy()).labels_) if label == 0]


@pytest.mark.parametrize("n", [3, 4, 5, 8, 13, 30])
def test_flame_admits_what_hdbscan_admits(n: int) -> None:
    for seed in range(10):
        updates = updates_of(n, 15, seed, common=seed / 3)
        updates[: n // 3] *= -1
        distances = 1 - Stack.of(updates).cosines()
        distances.fill_diagonal_(0)
        admitted = flame_file.majority_cluster(distances)
        # the paper's 1 is 1, or 2 if it counts the point itself as scikit-learn does: either is single linkage
        assert admitted.tolist() == hdbscan_admits(distances, 1) == hdbscan_admits(distances, 2)
        assert len(admitted) > n // 2


def slow_majority(distances: list[list[float]]) -> list[int]:
    """Join what is no farther than t, for growing t, until more than half hang together."""
    n = len(distances)
    for reach in sorted({distances[i][j] for i in range(n) for j in range(n) if i != j} or {0.0}):
        group = {i: {i} for i in range(n)}
        for i, j in itertools.combinations(range(n), 2):
            if distances[i][j] <= reach and group[i] is not group[j]:
                joined = group[i] | group[j]
                for member in joined:
                    group[member] = joined
        largest = max(group.values(), key=len)
        if len(largest) > n // 2:
            return sorted(largest)
    raise AssertionError("all hang together at the largest distance")


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.randoms(use_true_random=False))
def test_flames_cluster_is_the_slow_one_with_ties(n: int, random: Random) -> None:
    distances = torch.zeros(n, n, dtype=torch.float64)
    for i, j in itertools.combinations(range(n), 2):
        distances[i, j] = distances[j, i] = random.randint(0, 4) / 4
    assert flame_file.majority_cluster(distances).tolist() == slow_majority(distances.tolist())


def test_flame_of_few_clients() -> None:
    one, two = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert torch.equal(flame(one, generator(1), noise=0.0), one[0])
    assert flame.weights(two, generator(1)).tolist() == [0.5, 0.5]  # no majority but both
    three = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [3.0, 4.1]])
    assert flame.weights(three, generator(1))[1] == 0
    pairs = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert flame.weights(pairs, generator(1)).tolist() == [0.25] * 4
    assert flame.weights(torch.zeros(5, 2), generator(1)).tolist() == [0.2] * 5
    assert torch.equal(flame(torch.zeros(5, 2), generator(1)), torch.zeros(2))


def test_flame_clips_to_the_median_norm_of_all() -> None:
    direction = torch.nn.functional.normalize(torch.ones(4), dim=0)
    updates = torch.tensor([1.0, 2.0, 3.0, 8.0, -100.0])[:, None] * direction
    # the last points elsewhere and is rejected, but its norm counts: the median of 1, 2, 3, 8, 100 is 3
    weights = flame.weights(updates, generator(1))
    torch.testing.assert_close(weights, torch.tensor([1, 1, 1, 3 / 8, 0]).double() / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e2, 1e12, 1e30])
def test_flame_rejects_a_minority_that_points_elsewhere(size: float) -> None:
    for n, f in ((3, 1), (10, 4), (21, 10)):
        updates = updates_of(n, 200, common=2.0)
        updates[:f] = -size * updates[n - 1]
        weights = flame.weights(updates, generator(1))
        assert weights[:f].tolist() == [0.0] * f
        assert float(flame(updates, generator(1)).norm()) < float(updates[f:].norm(dim=1).max())


def test_flames_noise_is_a_share_of_the_median_norm() -> None:
    updates = updates_of(7, 20_000)
    plain = flame(updates, generator(1), noise=0.0)
    noise = flame(updates, generator(1), noise=0.01) - plain
    wanted = 0.01 * float(updates.norm(dim=1).median())
    assert float(noise.std()) == pytest.approx(wanted, rel=0.03)
    assert abs(float(noise.mean())) < 4 * wanted / math.sqrt(20_000)
    assert torch.equal(flame(updates, generator(1), noise=0.01) - plain, noise)
    with pytest.raises(ConfigError, match="noise >= 0"):
        flame(updates, generator(1), noise=-0.1)


# --- norm clipping, weak DP


def slow_clipping(updates: Tensor, limit: float) -> Tensor:
    rows = []
    for row in rows_of(updates):
        length = math.sqrt(dot(row, row))
        rows.append([value / max(1.0, length / limit) for value in row])
    return average(rows)


def test_norm_clipping_is_the_slow_one() -> None:
    for n in (1, 2, 7, 10):
        updates = updates_of(n, 30) * torch.linspace(0.2, 3, n)[:, None]
        lengths = sorted(math.sqrt(dot(row, row)) for row in rows_of(updates))
        close(norm_clipping(updates, max_norm=4.0), slow_clipping(updates, 4.0))
        close(norm_clipping(updates), slow_clipping(updates, slow_median(lengths)))
        close(norm_clipping(updates, adaptive="mean"), slow_clipping(updates, math.fsum(lengths) / n))
        close(weak_dp(updates, generator(1), max_norm=4.0, std=0.0), slow_clipping(updates, 4.0))


def test_clipping_leaves_zeros_alone_and_bears_huge_norms() -> None:
    updates = torch.zeros(4, 3)
    assert torch.equal(norm_clipping(updates), torch.zeros(3))
    assert torch.equal(weak_dp(updates, generator(1), max_norm=1.0, std=0.0), torch.zeros(3))
    updates[0] = 1e30
    close(weak_dp(updates, generator(1), max_norm=1.0, std=0.0), torch.full((3,), 1 / math.sqrt(3) / 4))
    assert torch.equal(norm_clipping(updates), torch.zeros(3))  # the median norm is 0


def test_each_attacker_moves_weak_dp_by_at_most_its_share() -> None:
    updates = updates_of(10)
    for size in (1e2, 1e30):
        forged = updates.clone()
        forged[:4] = size
        moved = weak_dp(forged, generator(1), max_norm=1.5, std=0.01) - weak_dp(
            updates, generator(1), max_norm=1.5, std=0.01
        )
        assert float(moved.norm()) <= 2 * 4 * 1.5 / 10 + 1e-5


def test_weak_dps_noise() -> None:
    updates = updates_of(5, 20_000)
    quiet = weak_dp(updates, generator(1), max_norm=2.0, std=0.0)
    noise = weak_dp(updates, generator(1), max_norm=2.0, std=0.025) - quiet
    assert float(noise.std()) == pytest.approx(0.025, rel=0.03)
    assert torch.equal(weak_dp(updates, generator(1), max_norm=2.0, std=0.025) - quiet, noise)
    assert not torch.equal(weak_dp(updates, generator(2), max_norm=2.0, std=0.025) - quiet, noise)
    assert torch.equal(quiet, norm_clipping(updates, max_norm=2.0))


def test_weak_dp_refuses() -> None:
    for max_norm, std in ((0.0, 0.1), (-1.0, 0.1), (1.0, -0.1)):
        with pytest.raises(ConfigError, match="weak_dp wants max_norm > 0 and std >= 0"):
            weak_dp(torch.ones(2, 2), generator(1), max_norm=max_norm, std=std)
