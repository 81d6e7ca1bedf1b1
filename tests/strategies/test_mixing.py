"""Mixings: laws on every one there is, slow obvious versions, and chains of mixings with rules.

A mixing that breaks a law names it, with the reason, in `LAWS_NOT_KEPT` of its own file; then the law has to fail
here. What to try where arguments cannot be guessed stands in `LAW_ARGUMENTS`.
"""

import copy
import importlib
import inspect
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strategies.context import RoundContext, supply
from strategies.mixing.arc import arc
from strategies.mixing.bucketing import bucketing
from strategies.mixing.clip_norms import clip_norms
from strategies.mixing.nearest_neighbours import nearest_neighbours
from strategies.pipeline import Pipeline
from strategies.rule import Mixing, Stack, WeightRule
from tasks import spec
from tasks.errors import AggregationError, ConfigError
from tasks.rng import generator

NUM_CLIENTS, NUM_BYZANTINE, NUM_PARAMS = 11, 2, 257


def stack(num_clients: int = NUM_CLIENTS, num_params: int = NUM_PARAMS, dtype: torch.dtype = torch.float64) -> Tensor:
    """Updates with a common direction and norms that differ by a factor of three."""
    draw = generator(num_clients, num_params, "mixing")
    noise = torch.randn(num_clients, num_params, generator=draw, dtype=torch.float64)
    common = torch.randn(num_params, generator=draw, dtype=torch.float64)
    return ((common + noise) * torch.linspace(0.5, 1.5, num_clients, dtype=torch.float64)[:, None]).to(dtype)


def module_of(name: str) -> object:
    return importlib.import_module(f"{spec.PACKAGES['mixing']}.{name}")


def component_of(name: str) -> spec.Component:
    given = dict(getattr(module_of(name), "LAW_ARGUMENTS", {}))
    if "num_byzantine" in spec.hyper_parameters(spec.find("mixing", name)):
        given.setdefault("num_byzantine", NUM_BYZANTINE)
    return spec.resolve("mixing", f"{name}({', '.join(f'{key}={value!r}' for key, value in given.items())})")


def context(num_clients: int = NUM_CLIENTS) -> RoundContext:
    return RoundContext(range(num_clients), seed=3)


def matrix_of(mixing: spec.Component, updates: Tensor | Stack, num_clients: int | None = None) -> Tensor:
    offered = supply(mixing, context(num_clients or len(updates)), Stack.of(updates).updates)
    return mixing.function.matrix(updates, *offered, **mixing.arguments)


def mixed(mixing: spec.Component, updates: Tensor) -> Tensor:
    return mixing(updates, *supply(mixing, context(len(updates)), updates))


def law_client_order(mixing: spec.Component) -> None:
    """The same rows come out, in the order of the clients."""
    updates = stack()
    order = torch.randperm(NUM_CLIENTS, generator=generator(2, "order"))
    result = mixed(mixing, updates)
    assert len(result) == NUM_CLIENTS
    torch.testing.assert_close(mixed(mixing, updates[order]), result[order])


def law_shift(mixing: spec.Component) -> None:
    updates, offset = stack(), torch.randn(NUM_PARAMS, generator=generator(3, "offset"), dtype=torch.float64) * 10
    torch.testing.assert_close(mixed(mixing, updates + offset) - offset, mixed(mixing, updates))


def law_scale(mixing: spec.Component) -> None:
    updates = stack()
    for factor in (1e-2, -3.0, 1e3):
        torch.testing.assert_close(mixed(mixing, updates * factor) / factor, mixed(mixing, updates))


def law_unanimity(mixing: spec.Component) -> None:
    updates = stack()[:1].expand(NUM_CLIENTS, -1)
    result = mixed(mixing, updates)
    torch.testing.assert_close(result, updates[: len(result)])


def law_input_untouched(mixing: spec.Component) -> None:
    updates = stack()
    before = updates.clone()
    mixed(mixing, updates)
    assert torch.equal(updates, before)


def law_repeatable(mixing: spec.Component) -> None:
    assert torch.equal(matrix_of(mixing, stack()), matrix_of(mixing, stack()))


def law_rows_sum_to_one(mixing: spec.Component) -> None:
    sums = matrix_of(mixing, stack()).sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def law_matrix(mixing: spec.Component) -> None:
    """Shape, type, no negative share, no row longer than an average, and the tensor is the matrix times the updates."""
    for dtype in (torch.float32, torch.float64):
        updates = stack(dtype=dtype)
        matrix = matrix_of(mixing, updates)
        assert matrix.dtype == torch.float64
        assert 1 <= len(matrix) <= NUM_CLIENTS
        assert matrix.shape[1] == NUM_CLIENTS
        assert bool((matrix >= 0).all())
        assert bool((matrix.sum(1) <= 1 + 1e-12).all())
        result = mixed(mixing, updates)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), matrix @ updates.double(), rtol=1e-4, atol=1e-5)


def law_finite(mixing: spec.Component) -> None:
    for size in (0.0, 1e-30, 1e12, 1e30):
        updates = stack(dtype=torch.float32)
        updates[:NUM_BYZANTINE] *= size
        assert matrix_of(mixing, updates).isfinite().all()
        assert mixed(mixing, updates).isfinite().all()
        assert mixed(mixing, stack(dtype=torch.float32) * size).isfinite().all()


def law_on_mixed_rows(mixing: spec.Component) -> None:
    """On rows that are mixed already the matrix is that for the rows written down."""
    updates = stack()
    before = torch.rand(NUM_CLIENTS, NUM_CLIENTS, generator=generator(4), dtype=torch.float64).square()
    for first in (
        before / before.sum(1, keepdim=True),
        torch.linspace(0.3, 1, NUM_CLIENTS, dtype=torch.float64).diag(),
    ):
        rows = Stack(updates).mixed(first)
        torch.testing.assert_close(matrix_of(mixing, rows, NUM_CLIENTS), matrix_of(mixing, first @ updates))


LAWS: dict[str, Callable[[spec.Component], None]] = {
    name.removeprefix("law_"): value for name, value in list(globals().items()) if name.startswith("law_")
}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("name", spec.names("mixing"))
def test_mixing_keeps_law(name: str, law: str) -> None:
    if law in getattr(module_of(name), "LAWS_NOT_KEPT", {}):
        with pytest.raises(AssertionError):
            LAWS[law](component_of(name))
    else:
        LAWS[law](component_of(name))


@pytest.mark.parametrize("name", spec.names("mixing"))
def test_mixing_reads_as_a_component(name: str) -> None:
    mixing = spec.find("mixing", name)
    assert mixing.__name__ == name
    assert mixing.__doc__
    assert mixing.__doc__ != Mixing.__doc__
    assert next(iter(inspect.signature(mixing).parameters)) == "updates"
    assert pickle.loads(pickle.dumps(mixing)) is mixing  # noqa: S301
    assert copy.deepcopy(mixing) is mixing
    for law, reason in getattr(module_of(name), "LAWS_NOT_KEPT", {}).items():
        assert law in LAWS
        assert len(reason) > 20


# slow obvious versions


@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (7, 2), (12, 5)])
def test_nearest_neighbours_averages_the_nearest(n: int, f: int) -> None:
    updates = stack(n, 5)
    for row, result in enumerate(nearest_neighbours(updates, num_byzantine=f)):
        nearest = sorted(range(n), key=lambda i, row=row: float((updates[i] - updates[row]).norm()))[: n - f]
        torch.testing.assert_close(result, updates[nearest].mean(0))


def test_nearest_neighbours_counts_the_row_itself_among_equals() -> None:
    matrix = nearest_neighbours.matrix(torch.ones(5, 3), num_byzantine=2)
    assert bool((matrix.diagonal() > 0).all())
    assert bool(((matrix > 0).sum(1) == 3).all())
    assert matrix[4].nonzero().flatten().tolist() == [0, 1, 4]


def test_nearest_neighbours_keeps_distant_attackers_out_of_honest_rows() -> None:
    updates = stack(dtype=torch.float32)
    updates[2:6] = 1e20
    matrix = nearest_neighbours.matrix(updates, num_byzantine=4)
    honest = [i for i in range(NUM_CLIENTS) if not 2 <= i < 6]
    assert not matrix[honest][:, 2:6].any()


@pytest.mark.parametrize(
    ("n", "bucket_size", "sizes"), [(1, 1, [1]), (1, 3, [1]), (6, 2, [2, 2, 2]), (7, 3, [3, 3, 1]), (5, 4, [4, 1])]
)
def test_bucketing_puts_every_row_in_one_group(n: int, bucket_size: int, sizes: list[int]) -> None:
    matrix = bucketing.matrix(stack(n, 4), generator(1), bucket_size=bucket_size)
    assert (matrix > 0).sum(1).tolist() == sizes
    assert (matrix > 0).sum(0).tolist() == [1] * n
    torch.testing.assert_close(matrix.sum(1), torch.ones(len(sizes), dtype=torch.float64))


def test_bucketing_draws_from_its_generator_alone_and_evenly() -> None:
    updates, together = stack(6, 3), torch.zeros(6, 6)
    for seed in range(600):
        matrix = bucketing.matrix(updates, generator(seed), bucket_size=2)
        assert torch.equal(matrix, bucketing.matrix(updates * 7, generator(seed), bucket_size=2))
        together += (matrix.t() @ matrix > 0).float() / 600
    others = together[~torch.eye(6, dtype=torch.bool)]
    assert float((others - 0.2).abs().max()) < 4 * math.sqrt(0.2 * 0.8 / 600)


def test_bucketing_refuses() -> None:
    with pytest.raises(ConfigError, match="bucket_size >= 1, got 0"):
        bucketing(stack(4, 2), generator(1), bucket_size=0)
    with pytest.raises(AggregationError, match="bucket_size < n, got 4 with n = 4"):
        bucketing(stack(4, 2), generator(1), bucket_size=4)


@pytest.mark.parametrize(("n", "f"), [(1, 0), (2, 0), (3, 1), (5, 2), (8, 2), (9, 3), (18, 6), (50, 24)])
def test_arc_clips_the_longest_to_the_next(n: int, f: int) -> None:
    updates = stack(n, 7)
    lengths = sorted((float(x.norm()) for x in updates), reverse=True)
    num_clipped = (2 * f * (n - f)) // n
    limit = lengths[num_clipped]
    wanted = torch.stack([x * min(1.0, limit / float(x.norm())) for x in updates])
    torch.testing.assert_close(arc(updates, num_byzantine=f), wanted)
    assert int((arc.matrix(updates, num_byzantine=f).diagonal() < 1).sum()) == num_clipped


def test_arc_leaves_no_row_longer_than_an_honest_one() -> None:
    """k >= f for f <= n / 2, so the limit is at most the longest honest norm."""
    for n in range(1, 40):
        for f in range((n + 1) // 2):
            assert f <= 2 * f * (n - f) // n < n - f or f == 0
    updates = stack(dtype=torch.float32)
    updates[:5] *= 1e25
    longest = float(updates[5:].norm(dim=1).max())
    assert float(arc(updates, num_byzantine=5).norm(dim=1).max()) <= longest * (1 + 1e-5)


def test_clipping_of_zero_rows_and_ties() -> None:
    assert torch.equal(arc.matrix(torch.zeros(5, 3), num_byzantine=2), torch.eye(5, dtype=torch.float64))
    assert torch.equal(arc.matrix(torch.ones(5, 3), num_byzantine=2), torch.eye(5, dtype=torch.float64))
    few = torch.zeros(5, 3)
    few[1] = 4.0
    assert torch.equal(arc(few, num_byzantine=1), torch.zeros(5, 3))
    assert torch.equal(clip_norms.matrix(torch.zeros(4, 3), max_norm=1.0), torch.eye(4, dtype=torch.float64))


def test_clip_norms_shortens_to_its_largest_norm() -> None:
    updates = stack()
    result = clip_norms(updates, max_norm=16.0)
    wanted = torch.stack([x * min(1.0, 16 / float(x.norm())) for x in updates])
    torch.testing.assert_close(result, wanted)
    assert 0 < int((updates.norm(dim=1) > 16).sum()) < NUM_CLIENTS
    with pytest.raises(ConfigError, match="max_norm > 0, got -1"):
        clip_norms(updates, max_norm=-1.0)


@pytest.mark.parametrize("name", ["nearest_neighbours", "arc"])
def test_mixings_refuse_half_or_more_attackers(name: str) -> None:
    for n, f in ((1, 1), (2, 1), (4, 2)):
        with pytest.raises(AggregationError, match=rf"{name} wants n >= 2f \+ 1 = {2 * f + 1}, got n = {n}"):
            mixed(spec.resolve("mixing", f"{name}(num_byzantine={f})"), stack(n, 3))


# chains

CHAINS = [
    "nearest_neighbours(num_byzantine=2)",
    "nearest_neighbours(num_byzantine=2) | bucketing(bucket_size=2)",
    "bucketing(bucket_size=2) | nearest_neighbours(num_byzantine=1)",
    "arc(num_byzantine=2) | nearest_neighbours(num_byzantine=2)",
    "clip_norms(max_norm=14.0) | bucketing(bucket_size=2) | arc(num_byzantine=1)",
]  # fmt: skip
RULES = [
    "geometric_median()", "krum(num_byzantine=1)", "multi_krum(num_byzantine=1)", "mean()", "norm_clipping()",
    "median()", "trimmed_mean(num_byzantine=1)", "meamed(num_byzantine=1)", "mda(num_byzantine=1)",
    "smea(num_byzantine=1)", "caf(num_byzantine=1)", "centered_clipping()", "sign_majority()", "rlr(threshold=2)",
]  # fmt: skip


@pytest.mark.parametrize("chain", CHAINS)
@pytest.mark.parametrize("text", RULES)
def test_a_chain_gives_what_the_rule_gives_on_the_mixed_rows(chain: str, text: str) -> None:
    """The pipeline never writes the mixed rows down; its result, and its weights per client, are as if it had."""
    updates, around = stack(12, 40), context(12)
    mixings, rule = spec.resolve_chain("mixing", chain), spec.resolve("rule", text)
    rows = updates
    for place, mixing in enumerate(mixings):
        rows = mixing(rows, *supply(mixing, around, updates, f"mixing {place}"))
    wanted = rule(rows, *supply(rule, context(12), updates))
    aggregate = Pipeline(rule, mixings).aggregate(updates, context(12))
    torch.testing.assert_close(aggregate.vector, wanted, rtol=1e-6, atol=1e-7)
    if isinstance(rule.function, WeightRule):
        assert aggregate.weights is not None
        assert aggregate.weights.shape == (12,)
        torch.testing.assert_close(aggregate.weights @ updates, wanted, rtol=1e-6, atol=1e-7)
    else:
        assert aggregate.weights is None


@pytest.mark.parametrize("chain", [
    "nearest_neighbours(num_byzantine=2)",
    "nearest_neighbours(num_byzantine=2) | bucketing(bucket_size=2)",
    "bucketing(bucket_size=2) | nearest_neighbours(num_byzantine=2)",
    "arc(num_byzantine=2) | nearest_neighbours(num_byzantine=2)",
])  # fmt: skip
@pytest.mark.parametrize("size", [1e2, 1e6, 1e12, 1e30])
def test_a_chain_bears_outliers_in_float32(chain: str, size: float) -> None:
    updates = stack(12, 40, dtype=torch.float32)
    updates[[3, 8]] = size
    pipeline = Pipeline(spec.resolve("rule", "geometric_median()"), spec.resolve_chain("mixing", chain))
    longest = float(updates[[i for i in range(12) if i not in (3, 8)]].norm(dim=1).max())
    assert float(pipeline.aggregate(updates, context(12)).vector.norm()) < 4 * longest
