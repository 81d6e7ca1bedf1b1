"""Numbers made to break a rule: at the edge of their type, exactly tied, hidden from samples, or in a broken cache."""

import importlib
import inspect
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import strategies.rules
from strategies import compiled, distances
from strategies.rule import Rule
from strategies.rules.caf import caf
from strategies.rules.dnc import dnc
from strategies.rules.flame import flame
from strategies.rules.foolsgold import foolsgold
from strategies.rules.geometric_median import geometric_median
from strategies.rules.mda import mda
from strategies.rules.meamed import meamed
from strategies.rules.median import median
from strategies.rules.norm_clipping import norm_clipping
from strategies.rules.trimmed_mean import trimmed_mean
from strategies.rules.weak_dp import weak_dp
from strategies.stack import Stack
from tasks.errors import AggregationError
from tasks.rng import generator

RULES = sorted(path.stem for path in Path(strategies.rules.__path__[0]).glob("[a-z]*.py"))


@pytest.fixture(params=["torch", "compiled"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "compiled" and compiled.kernels() is None:
        pytest.skip("numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "LEAST_NUMBERS", 0 if request.param == "compiled" else 2**60)
        yield request.param


def normal(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed, "hostile"), dtype=dtype)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("shape", [(5,), (), (2, 3, 4)])
def test_only_a_matrix_is_a_stack(name: str, shape: tuple[int, ...]) -> None:
    rule: Rule = getattr(importlib.import_module(f"strategies.rules.{name}"), name)
    supplied = {
        "generator": generator(1), "clients": list(range(5)), "history": torch.ones(5, 3), "previous": torch.ones(3),
        "root_update": torch.ones(3), "num_byzantine": 1, "max_norm": 1.0, "std": 0.0, "threshold": 2, "trusted": 0,
    }  # fmt: skip
    wanted = inspect.signature(rule).parameters  # pyright: ignore[reportArgumentType]
    given = {key: value for key, value in supplied.items() if key in wanted}
    named = {key: value for key, value in given.items() if wanted[key].kind is inspect.Parameter.KEYWORD_ONLY}
    placed = [given[key] for key in wanted if key in given and key not in named]
    with pytest.raises(AggregationError, match="floating-point stack"):
        rule(torch.ones(shape), *placed, **named)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("size", [1e100, 1e150, 1e153, 1e154, 1e155, 1e200, 1e300])
@pytest.mark.parametrize("row", [0, 5])
def test_caf_leaves_out_what_is_too_far_for_inner_products(size: float, row: int) -> None:
    updates = normal(9, 6)
    near = updates.clone()
    near[row] = size
    got = caf(near, num_byzantine=2)
    assert float(got.abs().max()) <= float(updates.abs().max())
    assert caf.weights(near, num_byzantine=2)[row] == 0
    near[(row + 2) % 9] = -size / 3
    weights = caf.weights(near, num_byzantine=2)
    assert not weights[[row, (row + 2) % 9]].any()
    assert float(weights.sum()) == pytest.approx(1)


def test_caf_without_attackers_is_the_mean() -> None:
    updates = normal(5, 4)
    torch.testing.assert_close(caf(updates, num_byzantine=0), updates.mean(0))


def test_updates_all_too_far_from_each_other_are_one_update_or_an_error() -> None:
    updates = normal(8, 5) * 1e200
    assert bool((caf(updates, num_byzantine=1) == updates).all(1).any())
    assert bool((geometric_median(updates) == updates).all(1).any())
    mixed = Stack.of(updates).mixed(torch.full((4, 8), 0.25, dtype=torch.float64) / 2 + torch.eye(4, 8) / 8)
    for rule in (lambda: caf(mixed, num_byzantine=1), lambda: geometric_median(mixed)):
        with pytest.raises(AggregationError, match="max-update-norm"):
            rule()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("num_clients", [4, 5, 8, 12, 17, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_at_the_edge_of_the_numbers_are_finite(num_clients: int, dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    shares = torch.rand(num_clients, 65, generator=generator(1), dtype=dtype) * 2 - 1
    for share in (shares, shares.sign(), torch.ones_like(shares), -shares.sign().abs()):
        updates = share * most
        small = share.double()
        ranked = small.sort(0).values
        for f in range((num_clients + 1) // 2):
            got = trimmed_mean(updates, num_byzantine=f).double() / most
            wanted = ranked[f : num_clients - f].mean(0)
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
            got = meamed(updates, num_byzantine=f).double() / most
            torch.testing.assert_close(got, meamed(small, num_byzantine=f), rtol=0, atol=1e-5)
        got = median(updates).double() / most
        wanted = (ranked[(num_clients - 1) // 2] + ranked[num_clients // 2]) / 2
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
        weights = geometric_median.weights(updates)
        assert weights.isfinite().all()
        assert float(weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("seed", range(60))
def test_mda_has_the_least_diameter_also_where_distances_tie(seed: int) -> None:
    draws = generator(seed, "ties")
    num_clients = int(torch.randint(3, 9, (), generator=draws))
    f = int(torch.randint(1, (num_clients - 1) // 2 + 1, (), generator=draws)) if num_clients > 2 else 0
    updates = torch.randint(-2, 3, (num_clients, 2), generator=draws).double()
    apart = torch.cdist(updates, updates)

    def diameter(members: tuple[int, ...]) -> float:
        return max((float(apart[i, j]) for i, j in itertools.combinations(members, 2)), default=0.0)

    chosen = tuple(mda.weights(updates, num_byzantine=f).nonzero().flatten().tolist())
    sets = list(itertools.combinations(range(num_clients), num_clients - f))
    assert chosen in sets
    assert diameter(chosen) == min(map(diameter, sets))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e3, 1e6, 1e9, 1e12, 1e15, 1e18])
def test_the_geometric_median_does_not_stick_to_an_update_at_large_scales(scale: float, dtype: torch.dtype) -> None:
    for seed in range(20):
        num_clients = 3 + seed % 9
        updates = normal(num_clients, 2 + seed % 6, seed=seed).to(dtype)
        wanted, got = geometric_median(updates), geometric_median(updates * scale) / scale
        rows, unit = updates.double(), 1e-6 if dtype == torch.float64 else 1e-4
        objective = [float((rows - point.double()).norm(dim=1).sum()) for point in (got, wanted)]
        assert objective[0] <= objective[1] * (1 + unit**1.5)
        torch.testing.assert_close(got, wanted, rtol=0, atol=100 * unit)


def hidden(num_clients: int, num_hidden: int, shrink: float) -> Tensor:
    """Updates of which the first are huge and differ from the median in no column that is sampled."""
    updates = normal(num_clients, 20_000, dtype=torch.float32) * 0.01
    stride = -(-updates.shape[1] // distances.SAMPLE_COLUMNS)
    middle = updates[num_hidden:, ::stride].median(0).values
    for row in range(num_hidden):
        updates[row] = normal(20_000, seed=2 if shrink < 1 else 3 + row, dtype=torch.float32) * 1e3 * shrink**row
        updates[row, ::stride] = middle
    return updates


@pytest.mark.parametrize("shrink", [1.0, 0.5, 0.1, 1e-2, 1e-3])
def test_updates_hidden_from_the_sample_win_few_readings(shrink: float, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = hidden(40, 15, shrink)
    readings = 0.0
    once = distances.gram

    def counted(updates: Tensor, origin: int | None, rows: Tensor) -> Tensor:
        nonlocal readings
        readings += (len(rows) / len(updates)) ** 2  # what a reading costs
        return once(updates, origin, rows)

    monkeypatch.setattr(distances, "gram", counted)
    got = distances.squared_distances(updates)
    assert readings <= 4, readings
    rows = updates.double()
    exact = torch.stack([(rows - row).square().sum(1) for row in rows])
    torch.testing.assert_close(got, exact, rtol=1e-4, atol=0)
    readings = 0.0
    distances.squared_distances(updates[15:])
    assert readings == 1


BROKEN = [
    b"garbage\n..", b"\x80\x04K\x01.", b"V\xff\xfe\xfa\n.", b"cos\nnosuch\n."
]  # fmt: skip


def test_a_cache_whose_files_hold_anything_costs_time_alone(tmp_path: Path) -> None:
    pytest.importorskip("numba")
    code = f"""
import sys
from pathlib import Path
import torch
from numba.core.caching import NullCache
from strategies import compiled, sorting
compiled.LEAST_NUMBERS = 0
def answer():
    assert sorting.sign_sums(torch.ones(9, 1000)).tolist() == [9.0] * 1000
def fresh():
    compiled.kernels.cache_clear()
    sys.modules.pop("strategies._kernels", None)
answer()
files = [path for path in Path({str(tmp_path)!r}).rglob("*sign_sums*") if path.suffix in (".nbi", ".nbc")]
assert len(files) == 2, files
good = {{path: path.read_bytes() for path in files}}
for path in files:
    for data in {BROKEN!r} + [good[path][: len(good[path]) // 2]]:
        for other in files:
            other.write_bytes(good[other])
        path.write_bytes(data)
        fresh()
        answer()
"""
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)


def test_what_is_wrong_with_a_kernel_itself_is_not_hidden() -> None:
    pytest.importorskip("numba")
    with pytest.raises(AttributeError, match="no_such_kernel"):
        compiled._run("no_such_kernel")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1e155, 1e200, 1e300])
def test_float64_updates_beyond_their_squares(scale: float) -> None:
    """What these rules see is angles, norms and rankings, none of which depend on the unit of the updates."""
    updates = normal(8, 5)
    updates[0] *= 3
    far = updates * scale
    draws = [generator(4) for _ in range(4)]
    pairs = {
        "dnc": (dnc.weights(far, draws[0], num_byzantine=1), dnc.weights(updates, draws[1], num_byzantine=1)),
        "flame": (flame.weights(far, draws[2], noise=0.0), flame.weights(updates, draws[3], noise=0.0)),
        "foolsgold": (foolsgold.weights(far, far), foolsgold.weights(updates, updates)),
        "norm_clipping": (norm_clipping.weights(far), norm_clipping.weights(updates)),
        "mean norm": (norm_clipping.weights(far, adaptive="mean"), norm_clipping.weights(updates, adaptive="mean")),
    }
    for name, (got, wanted) in pairs.items():
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(distances.norms(far), distances.norms(updates) * scale, rtol=1e-12, atol=0)
    assert float(distances.norms(weak_dp(far, generator(1), max_norm=1.0, std=0.0)[None])[0]) <= 1 + 1e-9


@pytest.mark.usefixtures("way")
def test_one_float64_update_beyond_its_square_does_not_stop_the_round() -> None:
    updates = normal(9, 5)
    updates[0] = 1e300
    honest = float(updates[1:].norm(dim=1).max())
    for got in (
        dnc(updates, generator(1), num_byzantine=1),
        flame(updates, generator(1), noise=0.001),
        flame(updates.neg(), generator(1), noise=0.001),
        norm_clipping(updates),
        weak_dp(updates, generator(1), max_norm=1.0, std=0.0),
    ):
        assert float(got.norm()) <= honest
    assert foolsgold(updates, updates).isfinite().all()


def test_noise_may_be_as_long_as_float64_updates() -> None:
    updates = normal(8, 5)
    wanted, got = (flame(one, generator(1), noise=0.5) for one in (updates, updates * 1e200))
    torch.testing.assert_close(got / 1e200, wanted, rtol=1e-6, atol=1e-6)


def test_a_history_that_has_left_float32_is_an_angle_like_any_other() -> None:
    history = normal(5, 4, dtype=torch.float32)
    history[2, 1], history[3] = torch.inf, 0
    weights = foolsgold.weights(torch.ones(5, 4), history)
    assert bool(((weights >= 0) & (weights <= 1 / 5)).all())


def test_norms_that_no_float64_holds_are_refused() -> None:
    updates = torch.full((4, 9), 1.7e308, dtype=torch.float64)
    for rule in (lambda: norm_clipping(updates), lambda: flame(updates, generator(1))):
        with pytest.raises(AggregationError, match="max-update-norm"):
            rule()
