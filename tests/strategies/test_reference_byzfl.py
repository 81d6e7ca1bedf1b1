"""Against ByzFL 0.0.11 (Gonzalez, Guerraoui, Pinot, Rizk, Stephan and Taiani, 2025), where it is installed.

ByzFL takes NumPy arrays in their own precision and casts tensors to float32; it is compared on float64 arrays. Where
the two differ, the test says whose definition is whose.
"""

import importlib
import importlib.util
import itertools
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strategies.mixing.arc import arc
from strategies.mixing.bucketing import bucketing
from strategies.mixing.clip_norms import clip_norms
from strategies.mixing.nearest_neighbours import nearest_neighbours
from strategies.rules.caf import caf
from strategies.rules.centered_clipping import centered_clipping
from strategies.rules.geometric_median import geometric_median
from strategies.rules.krum import krum
from strategies.rules.mda import mda
from strategies.rules.meamed import meamed
from strategies.rules.mean import mean
from strategies.rules.median import median
from strategies.rules.monna import monna
from strategies.rules.multi_krum import multi_krum
from strategies.rules.smea import smea
from strategies.rules.trimmed_mean import trimmed_mean
from tasks.errors import AggregationError
from tasks.rng import generator

pytestmark = pytest.mark.reference
SIZES = [(7, 1), (10, 2), (11, 4), (13, 5)]


@pytest.fixture(scope="module")
def byzfl() -> Any:
    """ByzFL's aggregators without the rest of it, whose benchmarks want more libraries than its formulas do."""
    found = importlib.util.find_spec("byzfl")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("byzfl is not installed; pip install --no-deps byzfl==0.0.11")
    package = types.ModuleType("byzfl")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules.setdefault("byzfl", package)
    return importlib.import_module("byzfl.aggregators")


def updates_of(n: int, f: int, seed: int = 1, num_params: int = 20) -> Tensor:
    """Honest updates around 1, and attackers moderately off in one direction."""
    draw = generator(seed, n, f, "byzfl")
    updates = 1 + torch.randn(n, num_params, generator=draw, dtype=torch.float64)
    updates[:f] += 1.5
    return updates[torch.randperm(n, generator=draw)]


def same(ours: Tensor, theirs: np.ndarray) -> None:
    torch.testing.assert_close(ours, torch.from_numpy(np.asarray(theirs)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("n", "f"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_same_definitions_same_numbers(byzfl: Any, n: int, f: int, seed: int) -> None:
    updates = updates_of(n, f, seed)
    given = updates.numpy()
    same(mean(updates), byzfl.Average()(given))
    same(median(updates), byzfl.Median()(given))
    same(trimmed_mean(updates, num_byzantine=f), byzfl.TrMean(f)(given))
    same(meamed(updates, num_byzantine=f), byzfl.Meamed(f)(given))
    same(nearest_neighbours(updates, num_byzantine=f), byzfl.NNM(f)(given))
    for row in (0, n - 1):
        same(monna(updates, list(range(n)), num_byzantine=f, trusted=row), byzfl.MoNNA(f, row)(given))
    same(clip_norms(updates, max_norm=5.0), byzfl.Clipping(5.0)(given.copy()))
    same(arc(updates, num_byzantine=f), byzfl.ARC(f)(given.copy()))


@pytest.mark.parametrize("num_steps", [1, 3, 7])
@pytest.mark.parametrize("radius", [0.5, 3.0, 100.0])
def test_centered_clipping_over_rounds(byzfl: Any, num_steps: int, radius: float) -> None:
    """Theirs keeps the aggregate of the round before in itself; ours is given it."""
    theirs, previous = byzfl.CenteredClipping(L=num_steps, tau=radius), torch.zeros(20, dtype=torch.float64)
    for seed in range(4):
        updates = updates_of(11, 3, seed)
        previous = centered_clipping(updates, previous, radius=radius, num_steps=num_steps)
        same(previous, theirs(updates.numpy()))


@pytest.mark.parametrize(("n", "f"), SIZES)
def test_geometric_median_is_where_theirs_goes(byzfl: Any, n: int, f: int) -> None:
    """Theirs starts at 0 and takes 3 steps of Weiszfeld unless told otherwise; ours runs until it is there."""
    updates = updates_of(n, f)

    def objective(point: Tensor) -> float:
        return float((updates - point).norm(dim=1).sum())

    ours = geometric_median(updates, tolerance=1e-10)
    far = torch.from_numpy(byzfl.GeometricMedian(nu=1e-6, T=3000)(updates.numpy()))
    torch.testing.assert_close(ours, far, rtol=1e-6, atol=1e-6)
    assert objective(ours) < objective(torch.from_numpy(byzfl.GeometricMedian()(updates.numpy())))


def krum_by_hand(updates: Tensor, num_neighbours: int) -> list[float]:
    squares = [[float((x - y).square().sum()) for y in updates] for x in updates]
    return [sum(sorted(row[:i] + row[i + 1 :])[:num_neighbours]) for i, row in enumerate(squares)]


def test_krum_counts_n_minus_f_minus_2_neighbours_and_theirs_one_more(byzfl: Any) -> None:
    """Ours is the paper's (Blanchard et al., section 4: i -> j over the n - f - 2 closest)."""
    different = 0
    for seed in range(60):
        updates = updates_of(9, 3, seed, num_params=4)
        paper, more = krum_by_hand(updates, 9 - 3 - 2), krum_by_hand(updates, 9 - 3 - 1)
        assert torch.equal(krum(updates, num_byzantine=3), updates[paper.index(min(paper))])
        same(updates[more.index(min(more))], byzfl.Krum(3)(updates.numpy()))
        many = sorted(range(9), key=paper.__getitem__)[:6]
        same(multi_krum(updates, num_byzantine=3), updates[many].mean(0).numpy())
        same(updates[sorted(range(9), key=more.__getitem__)[:6]].mean(0), byzfl.MultiKrum(3)(updates.numpy()))
        different += paper.index(min(paper)) != more.index(min(more))
    assert different > 0, "the extra neighbour decides some rounds"


def test_krum_where_theirs_accepts_what_the_paper_excludes(byzfl: Any) -> None:
    updates = updates_of(6, 2)
    assert byzfl.Krum(2)(updates.numpy()).shape == (20,)
    with pytest.raises(AggregationError, match=r"2f \+ 3"):
        krum(updates, num_byzantine=2)
    assert byzfl.NNM(5)(updates.numpy()).shape == (6, 20)
    with pytest.raises(AggregationError, match=r"2f \+ 1"):
        nearest_neighbours(updates, num_byzantine=5)


def test_float64_stays_float64_and_theirs_becomes_float32(byzfl: Any) -> None:
    updates = 1e6 + updates_of(7, 2) * 1e-3
    assert byzfl.Median()(updates).dtype == torch.float32
    assert median(updates).dtype == torch.float64
    lost = byzfl.TrMean(2)(updates).double() - trimmed_mean(updates, num_byzantine=2)
    same(trimmed_mean(updates, num_byzantine=2), byzfl.TrMean(2)(updates.numpy()))
    assert float(lost.abs().max()) > 1e-3, "as much as the updates differ by"


@pytest.mark.parametrize(("n", "f"), [(5, 1), (7, 2), (9, 3)])
@pytest.mark.parametrize("seed", range(5))
def test_mda_has_their_diameter(byzfl: Any, n: int, f: int, seed: int) -> None:
    """Theirs is the first set of least diameter in lexicographic order of rows; ours does not depend on the order."""
    updates = updates_of(n, f, seed)
    theirs = torch.from_numpy(byzfl.MDA(f)(updates.numpy()))
    sets = [list(chosen) for chosen in itertools.combinations(range(n), n - f)]
    chosen = next(members for members in sets if torch.allclose(updates[members].mean(0), theirs))
    ours = mda.weights(updates, num_byzantine=f).nonzero().flatten().tolist()
    lengths = [
        sorted((float((updates[i] - updates[j]).norm()) for i, j in itertools.combinations(some, 2)), reverse=True)
        for some in (ours, chosen)
    ]
    assert lengths[0][0] == lengths[1][0]
    assert lengths[0] <= lengths[1]


@pytest.mark.parametrize("seed", range(5))
def test_smea_is_at_least_as_narrow_as_theirs(byzfl: Any, seed: int) -> None:
    """Theirs compares what one step of the power method from a random vector gives, ours the eigenvalues."""
    updates = updates_of(9, 3, seed)
    theirs = torch.from_numpy(byzfl.SMEA(3)(updates.numpy()))
    sets = [list(chosen) for chosen in itertools.combinations(range(9), 6)]
    spreads = [float(torch.linalg.matrix_norm(updates[s] - updates[s].mean(0), 2)) for s in sets]
    chosen = next(i for i, members in enumerate(sets) if torch.allclose(updates[members].mean(0), theirs))
    ours = sets.index(smea.weights(updates, num_byzantine=3).nonzero().flatten().tolist())
    assert spreads[ours] == pytest.approx(min(spreads), rel=1e-9)
    assert spreads[ours] <= spreads[chosen] * (1 + 1e-9)


def test_caf_is_theirs_but_for_the_eigenvector(byzfl: Any) -> None:
    """Theirs takes one step of the power method from a vector of NumPy's global generator, and so another every time.

    It also takes the largest offset over all rows, those of weight 0 included; with distant attackers, dropped at once,
    their filter then wears the rest down very slowly, so only ours is shown such a stack.
    """
    updates = updates_of(12, 3)
    assert torch.equal(caf(updates, num_byzantine=3), caf(updates, num_byzantine=3))
    results = [byzfl.CAF(3)(updates.numpy()) for _ in range(4)]
    assert any(not np.array_equal(results[0], other) for other in results[1:])
    updates[2:5] += 1e6
    honest = updates[[i for i in range(12) if not 2 <= i < 5]]
    spread = float((honest - honest.mean(0)).norm(dim=1).max())
    assert float((caf(updates, num_byzantine=3) - honest.mean(0)).norm()) < spread
    assert byzfl.CAF(0)(updates.numpy()) is None
    torch.testing.assert_close(caf(updates, num_byzantine=0), updates.mean(0))


@pytest.mark.parametrize(("n", "size"), [(12, 3), (11, 2), (10, 4)])
def test_bucketing_makes_groups_of_the_same_sizes(byzfl: Any, n: int, size: int) -> None:
    """Theirs shuffles by a global generator; sizes and what all groups hold together are the same."""
    updates = updates_of(n, 2)
    theirs = torch.from_numpy(byzfl.Bucketing(size)(updates.numpy()))
    ours = bucketing(updates, generator(1), bucket_size=size)
    assert ours.shape == theirs.shape
    sizes = torch.full((len(ours),), float(size), dtype=torch.float64)
    sizes[-1] = n - size * (len(ours) - 1)
    for groups in (ours, theirs):
        torch.testing.assert_close(sizes @ groups, updates.sum(0))


def test_clipping_leaves_the_updates_as_they_are_and_theirs_does_not(byzfl: Any) -> None:
    updates = updates_of(8, 2)
    before = updates.clone()
    arc(updates, num_byzantine=2)
    clip_norms(updates, max_norm=1.0)
    assert torch.equal(updates, before)
    given = before.numpy().copy()
    byzfl.ARC(2)(given)
    assert not np.array_equal(given, before.numpy())
