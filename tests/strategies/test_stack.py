"""`Stack`: what it says of mixed rows, which never exist in memory, against the rows written down in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strategies.distances import squared_distances
from strategies.stack import BLOCK_COLUMNS, Stack
from tasks.errors import AggregationError
from tasks.rng import generator

NUM_CLIENTS, NUM_PARAMS = 9, 300


def draw(*shape: int, name: str = "updates") -> Tensor:
    return torch.randn(*shape, generator=generator(1, name), dtype=torch.float64)


def averages(rows: int, columns: int, name: str = "averages") -> Tensor:
    """A matrix of averages: rows sum to 1."""
    matrix = torch.rand(rows, columns, generator=generator(2, name, rows), dtype=torch.float64).square()
    return matrix / matrix.sum(1, keepdim=True)


def near_duplicates(num_clients: int) -> Tensor:
    """Two rows that mix almost the same."""
    matrix = averages(3, num_clients)
    matrix[1] = matrix[0]
    matrix[1, :2] += torch.tensor([1e-5, -1e-5], dtype=torch.float64)
    return matrix


MATRICES: dict[str, Callable[[int], Tensor]] = {
    "averages": lambda n: averages(n, n),
    "fewer rows": lambda n: averages(4, n),
    "one row": lambda n: averages(1, n),
    "nearly equal rows": near_duplicates,
    "equal rows": lambda n: averages(1, n).expand(3, -1),
    "shortened": lambda n: torch.linspace(0.2, 1, n, dtype=torch.float64).diag(),
    "averages shortened": lambda n: averages(n, n) * torch.linspace(0, 1, n, dtype=torch.float64)[:, None],
    "affine": lambda n: 2 * torch.eye(n, dtype=torch.float64) - averages(n, n),
}
every_matrix = pytest.mark.parametrize("kind", MATRICES)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def pair(kind: str, updates: Tensor) -> tuple[Stack, Tensor]:
    """Return the mixed stack, and its rows in float64."""
    matrix = MATRICES[kind](len(updates))
    return Stack(updates).mixed(matrix), matrix @ updates.double()


def gaps(rows: Tensor) -> Tensor:
    return (rows[:, None] - rows).square().sum(2)


def share(dtype: torch.dtype) -> float:
    """How wrong a number may be, as a share of the numbers it is made of."""
    return 2e-6 if dtype == torch.float32 else 1e-13


@every_matrix
@every_dtype
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_mixed_distances_norms_products_and_cosines(kind: str, dtype: torch.dtype, offset: float) -> None:
    updates = (draw(NUM_CLIENTS, NUM_PARAMS) + offset).to(dtype)
    mixed, rows = pair(kind, updates)
    size = share(dtype) * float(updates.double().square().sum(1).max()) * float(mixed.matrix.abs().sum(1).max()) ** 2
    distances = mixed.squared_distances
    torch.testing.assert_close(distances, gaps(rows), rtol=1e-4, atol=size)
    assert distances.dtype == torch.float64
    assert torch.equal(distances, distances.t())
    assert not distances.diagonal().any()
    assert bool((distances >= 0).all())
    torch.testing.assert_close(mixed.norms.square(), rows.square().sum(1), rtol=1e-5, atol=size)
    torch.testing.assert_close(mixed.products(), rows @ rows.t(), rtol=1e-5, atol=size)
    for centre in range(len(rows)):
        around = rows - rows[centre]
        torch.testing.assert_close(mixed.products(centre), around @ around.t(), rtol=1e-5, atol=size)
    wanted = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    long = rows.norm(dim=1) > 1e-3 * rows.norm(dim=1).max()
    torch.testing.assert_close(mixed.cosines()[long][:, long], wanted[long][:, long], rtol=1e-4, atol=1e-4)


@every_dtype
def test_plain_products_norms_and_cosines(dtype: torch.dtype) -> None:
    updates = draw(NUM_CLIENTS, NUM_PARAMS).to(dtype)
    stack, rows = Stack(updates), updates.double()
    torch.testing.assert_close(stack.products(), rows @ rows.t(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stack.products(2), (rows - rows[2]) @ (rows - rows[2]).t(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(stack.norms, rows.norm(dim=1), rtol=1e-6, atol=0)
    updates[3] = 0
    cosines = Stack(updates).cosines()
    assert not cosines[3].any()
    assert float((cosines.diagonal() - 1).abs().sum()) == pytest.approx(1)


@every_matrix
@every_dtype
def test_majority_products_are_around_one_of_the_rows(kind: str, dtype: torch.dtype) -> None:
    mixed, rows = pair(kind, draw(NUM_CLIENTS, NUM_PARAMS).to(dtype))
    products = mixed.majority_products
    centre = int(products.diagonal().argmin())
    around = rows - rows[centre]
    torch.testing.assert_close(products, around @ around.t(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("dtype", "offset"), [(torch.float32, 1e4), (torch.float64, 1e7)])
@pytest.mark.parametrize("kind", ["averages", "fewer rows", "affine"])
def test_a_large_common_offset_does_not_drown_distances(kind: str, dtype: torch.dtype, offset: float) -> None:
    """Inner products of such rows would be wrong by far more than their distances are."""
    updates = (draw(NUM_CLIENTS, NUM_PARAMS) + offset).to(dtype)
    mixed, rows = pair(kind, updates)
    centred = MATRICES[kind](NUM_CLIENTS) @ (updates.double() - updates[0].double())
    torch.testing.assert_close(mixed.squared_distances, gaps(centred), rtol=2e-4, atol=1e-9)
    assert rows.shape == centred.shape


@pytest.mark.parametrize("size", [1e6, 1e12, 1e30])
def test_an_outlier_of_weight_0_leaves_mixed_rows_alone(size: float) -> None:
    updates = draw(NUM_CLIENTS, NUM_PARAMS).float()
    updates[4] = size
    for rest in (1.0, 0.5):
        matrix = averages(NUM_CLIENTS, NUM_CLIENTS)
        matrix[:, 4] = 0
        matrix = rest * matrix / matrix.sum(1, keepdim=True)
        mixed = Stack(updates).mixed(matrix)
        rows = matrix @ updates.double().index_fill(0, torch.tensor(4), 0.0)
        torch.testing.assert_close(mixed.squared_distances, gaps(rows), rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mixed.norms, rows.norm(dim=1), rtol=1e-4, atol=1e-3)
        weights = averages(1, NUM_CLIENTS)[0]
        torch.testing.assert_close(mixed.weighted_sum(weights).double(), weights @ rows, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1e2, 1e6, 1e12, 1e30])
def test_a_shortened_outlier_has_the_length_it_was_shortened_to(size: float) -> None:
    """Clipping leaves a tiny share of a huge row: its norm and its distances must not be lost in rounding."""
    updates = draw(NUM_CLIENTS, NUM_PARAMS).float()
    updates[4] *= size
    lengths = updates.double().norm(dim=1)
    matrix = torch.diag(10 / lengths)
    mixed, rows = Stack(updates).mixed(matrix), matrix @ updates.double()
    torch.testing.assert_close(mixed.norms, torch.full_like(lengths, 10), rtol=1e-4, atol=0)
    torch.testing.assert_close(mixed.squared_distances, gaps(rows), rtol=1e-3, atol=1e-2)


@every_matrix
def test_columns_and_blocks_are_those_of_the_mixed_rows(kind: str) -> None:
    num_params = BLOCK_COLUMNS + 77
    updates = draw(5, num_params)
    mixed, rows = pair(kind, updates)
    chosen = torch.tensor([7, 3, num_params - 1])
    torch.testing.assert_close(mixed.columns(chosen), rows[:, chosen])
    torch.testing.assert_close(mixed.columns(slice(5, 9)), rows[:, 5:9])
    for width in (BLOCK_COLUMNS, 1000):
        parts = list(mixed.blocks(width))
        assert [columns.start for columns, _ in parts] == list(range(0, num_params, width))
        torch.testing.assert_close(torch.cat([block for _, block in parts], 1), rows)
    vector = draw(num_params, name="vector")
    torch.testing.assert_close(mixed.dots(vector), rows @ vector)
    weights = averages(1, len(rows))[0]
    torch.testing.assert_close(mixed.weighted_sum(weights), weights @ rows)
    torch.testing.assert_close(mixed.client_weights(weights) @ updates, weights @ rows)


def test_columns_of_a_plain_stack_are_a_view() -> None:
    updates = draw(4, 20)
    assert Stack(updates).columns(slice(3, 9)).data_ptr() == updates[:, 3:].data_ptr()
    assert Stack(updates).columns(slice(None)).data_ptr() == updates.data_ptr()
    weights = averages(1, 4)[0]
    assert Stack(updates).client_weights(weights) is weights


@pytest.mark.parametrize("kind", [None, *MATRICES])
def test_chosen_rows_are_rows(kind: str | None) -> None:
    updates = draw(NUM_CLIENTS, 40)
    whole, rows = (Stack(updates), updates) if kind is None else pair(kind, updates)
    order = torch.randperm(len(rows), generator=generator(5))
    for chosen in (order, order[: max(1, len(rows) // 2)], order[:1]):
        part = whole.rows(chosen)
        assert len(part) == len(chosen)
        torch.testing.assert_close(part.columns(slice(None)), rows[chosen])
        torch.testing.assert_close(part.squared_distances, gaps(rows[chosen]), atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(part.norms, rows[chosen].norm(dim=1), atol=1e-9, rtol=1e-9)
        weights = averages(1, len(chosen))[0]
        torch.testing.assert_close(part.weighted_sum(weights), weights @ rows[chosen])
        if len(chosen) > 1:
            again = torch.tensor([1, 0])
            torch.testing.assert_close(part.rows(again).columns(slice(2, 30)), rows[chosen[again]][:, 2:30])
            torch.testing.assert_close(part.mixed(averages(2, len(chosen))).norms,
                                       (averages(2, len(chosen)) @ rows[chosen]).norm(dim=1))  # fmt: skip


def test_chosen_rows_of_a_plain_stack_are_exact() -> None:
    """No product with a matrix of zeros and ones: outliers that were left out cannot reach the rest."""
    updates = draw(4, 20).float()
    updates[2] = torch.inf
    part = Stack(updates).mixed(torch.eye(4, dtype=torch.float64))
    assert part.columns(slice(None)).isnan().any()
    stack = Stack(updates)
    stack.__dict__["squared_distances"] = torch.zeros(4, 4, dtype=torch.float64)
    assert torch.equal(stack.rows(torch.tensor([3, 0])).columns(slice(None)), updates[[3, 0]])


@pytest.mark.parametrize("first", MATRICES)
@pytest.mark.parametrize("second", ["averages", "fewer rows", "shortened"])
def test_a_mixture_of_mixtures_is_the_product_of_the_matrices(first: str, second: str) -> None:
    once, rows = pair(first, draw(NUM_CLIENTS, 50))
    matrix = MATRICES[second](len(rows))
    twice = once.mixed(matrix)
    torch.testing.assert_close(twice.columns(slice(None)), matrix @ rows)
    torch.testing.assert_close(twice.squared_distances, gaps(matrix @ rows), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(twice.norms, (matrix @ rows).norm(dim=1), rtol=1e-7, atol=1e-7)
    weights = averages(1, len(matrix))[0]
    torch.testing.assert_close(twice.client_weights(weights), once.client_weights(matrix.t() @ weights))


def test_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every mixture of one stack shares its distances."""
    calls: list[int] = []

    def counted(updates: Tensor) -> Tensor:
        calls.append(len(updates))
        return squared_distances(updates)

    monkeypatch.setattr("strategies.stack.squared_distances", counted)
    plain = Stack(draw(6, 30))
    mixed = plain.mixed(averages(6, 6))
    for stack in (mixed, mixed.mixed(averages(3, 6)), plain, plain.rows(torch.tensor([1, 2]))):
        assert stack.squared_distances is stack.squared_distances
    assert calls == [6]


def test_single_rows_equal_rows_and_zero_rows() -> None:
    one = Stack(draw(1, 5))
    assert one.squared_distances.tolist() == [[0.0]]
    assert one.mixed(torch.ones(1, 1, dtype=torch.float64)).squared_distances.tolist() == [[0.0]]
    equal = Stack(draw(1, 5).expand(4, -1)).mixed(averages(4, 4))
    assert float(equal.squared_distances.max()) < 1e-28
    zero = Stack(torch.zeros(4, 5)).mixed(averages(4, 4))
    assert not zero.squared_distances.any()
    assert not zero.norms.any()
    assert not zero.cosines().any()
    gone = Stack(draw(3, 5)).mixed(torch.zeros(2, 3))
    assert float(gone.norms.max()) < 1e-6
    assert float(gone.squared_distances.max()) < 1e-12


def test_a_stack_refuses_what_does_not_fit() -> None:
    stack = Stack(draw(4, 5))
    assert Stack.of(stack) is stack
    for wrong in (torch.ones(2, 3), torch.ones(4), torch.ones(0, 4)):
        with pytest.raises(AggregationError, match=r"a mixing matrix is \[new rows, 4\]"):
            stack.mixed(wrong)
    mixed = stack.mixed(averages(3, 4))
    with pytest.raises(AggregationError, match=r"one weight per row, \[3\], got \[4\]"):
        mixed.weighted_sum(torch.ones(4))
    with pytest.raises(AggregationError, match=r"one weight per row, \[3\], got \[4\]"):
        mixed.client_weights(torch.ones(4))
    with pytest.raises(AggregationError, match=r"a mixing matrix is \[new rows, 3\]"):
        mixed.mixed(torch.ones(2, 4))
