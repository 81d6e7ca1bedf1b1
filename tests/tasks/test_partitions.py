"""Partitions: laws that all keep, and the client sizes of the papers."""

from collections.abc import Callable

import pytest
import torch

from tasks.dataset import Dataset
from tasks.errors import ConfigError
from tasks.rng import generator
from tasks.spec import names, resolve

Load = Callable[[str], Dataset]
PARTITIONS = [
    *names("partition"),
    "dirichlet(balanced=True)",
    "by_group(choose='random')",
    "shards(shards_per_client=3)",
]
COMPLETE = ["iid", "dirichlet", "dirichlet(alpha=0.1, min_samples=5)", "dirichlet(balanced=True)", "shards"]


@pytest.fixture(scope="module")
def data() -> Dataset:
    """1,003 samples of 7 classes of unequal size, in 12 natural groups."""
    draws = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 28, (1003,), generator=draws).float().sqrt().long().clamp(max=6) % 7
    labels[:7] = torch.arange(7)
    groups = torch.randint(0, 12, (1003,), generator=draws) * 10
    inputs = torch.zeros(1003, 2)
    return Dataset("made", inputs, labels, inputs[:5], labels[:5], num_classes=7, train_groups=groups)


def _split(text: str, data: Dataset, num_clients: int, seed: int = 1) -> list[torch.Tensor]:
    return resolve("partition", text)(data, num_clients, generator(seed, "partition"))


@pytest.mark.parametrize("text", PARTITIONS)
def test_every_client_gets_samples_of_its_own(text: str, data: Dataset) -> None:
    parts = _split(text, data, 8)
    assert len(parts) == 8
    together = torch.cat(parts)
    assert together.dtype == torch.int64
    assert len(together.unique()) == len(together)
    assert together.min() >= 0
    assert together.max() < 1003


@pytest.mark.parametrize("text", PARTITIONS)
def test_the_generator_alone_decides(text: str, data: Dataset) -> None:
    before = torch.get_rng_state()
    one, same, other = _split(text, data, 8), _split(text, data, 8), _split(text, data, 8, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, one, same))
    if text != "by_group":  # the largest groups are the largest groups
        assert not all(len(a) == len(b) and torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("text", COMPLETE)
def test_complete_partitions_leave_no_sample_out(text: str, data: Dataset) -> None:
    assert torch.cat(_split(text, data, 8)).sort().values.equal(torch.arange(1003))


@pytest.mark.parametrize("num_clients", [1, 8, 1003])
def test_iid_shares_differ_by_at_most_one(data: Dataset, num_clients: int) -> None:
    sizes = {len(part) for part in _split("iid", data, num_clients)}
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("min_samples", [1, 10, 40])
def test_dirichlet_gives_every_client_enough(data: Dataset, min_samples: int) -> None:
    parts = _split(f"dirichlet(alpha=0.5, min_samples={min_samples})", data, 8)
    assert min(map(len, parts)) >= min_samples


def test_dirichlet_skew_grows_as_alpha_falls(data: Dataset) -> None:
    def skew(alpha: float) -> float:
        parts = _split(f"dirichlet(alpha={alpha})", data, 8)
        tables = torch.stack([data.train_labels[part].bincount(minlength=7) / len(part) for part in parts])
        return tables.std(0).mean().item()

    assert skew(0.05) > 1.5 * skew(1.0) > 3 * skew(1000.0)


def test_balanced_dirichlet_sizes_stay_closer_together(data: Dataset) -> None:
    def spread(text: str) -> float:
        sizes = [torch.tensor([float(len(p)) for p in _split(text, data, 8, seed)]).std() for seed in range(20)]
        return torch.stack(sizes).mean().item()

    assert spread("dirichlet(balanced=True)") < 0.8 * spread("dirichlet")


def test_dirichlet_that_cannot_be_drawn_says_so(data: Dataset) -> None:
    with pytest.raises(ConfigError, match="raise alpha"):
        _split("dirichlet(alpha=0.01, min_samples=125)", data, 8)


def test_shards_hold_few_classes_and_equal_sizes() -> None:
    labels = torch.arange(10).repeat(60)
    data = Dataset("even", torch.zeros(600, 1), labels, torch.zeros(1, 1), labels[:1], num_classes=10)
    parts = _split("shards", data, 10)
    assert {len(part) for part in parts} == {60}
    assert max(len(labels[part].unique()) for part in parts) == 2
    assert torch.cat([labels[part].bincount(minlength=10)[None] for part in parts]).sum(0).tolist() == [60] * 10


def test_by_group_gives_whole_groups(data: Dataset) -> None:
    assert data.train_groups is not None
    parts = _split("by_group", data, 12)
    for number, part in enumerate(parts):
        assert torch.equal(part, torch.nonzero(data.train_groups == number * 10).squeeze(1))
    sizes = data.train_groups.bincount()
    few = _split("by_group", data, 3)
    assert sorted(map(len, few)) == sorted(sizes[sizes > 0].tolist())[-3:]
    for part in _split("by_group(choose='random')", data, 5):
        assert len(data.train_groups[part].unique()) == 1


def test_by_group_takes_named_groups_before_the_largest(data: Dataset) -> None:
    assert data.train_groups is not None
    groups = data.train_groups
    sizes = groups.bincount()
    least = int(torch.where(sizes > 0, sizes, 10**6).argmin())
    named = _split(f"by_group(always=({least},))", data, 3)
    largest = sorted(sizes[sizes > 0].tolist())[-2:]
    assert sorted(map(len, named)) == sorted([int(sizes[least]), *largest])
    assert least in {int(groups[part].unique()) for part in named}
    order = [int(groups[part][0]) for part in named]
    assert order == sorted(order)
    for always, num_clients in (((least, least), 3), ((7,), 3), ((least, 0, 10, 20), 3)):
        with pytest.raises(ConfigError, match="wants always to be different groups"):
            _split(f"by_group(always={always})", data, num_clients)


@pytest.mark.parametrize(
    ("text", "num_clients", "message"),
    [
        ("iid", 0, "at least 1 client"),
        ("iid", 1004, "1004 clients"),
        ("dirichlet(alpha=0.0)", 8, "alpha must be above 0"),
        ("dirichlet(min_samples=-1)", 8, "min_samples"),
        ("dirichlet(min_samples=126)", 8, "at least 126 samples"),
        ("dirichlet_dba(alpha=-1)", 8, "alpha must be above 0"),
        ("dirichlet_dba(seed=-1)", 8, "seed"),
        ("dirichlet_dba", -3, "at least 1 client"),
        ("shards(shards_per_client=0)", 8, "shards_per_client"),
        ("shards(shards_per_client=200)", 8, "at least 200 samples"),
        ("by_group", 13, "12 groups"),
        ("by_group", 0, "12 groups"),
    ],
)
def test_bad_arguments_are_refused(data: Dataset, text: str, num_clients: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _split(text, data, num_clients)


def test_a_data_set_without_groups_is_refused_by_group() -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    data = Dataset("plain", torch.zeros(4, 1), labels, torch.zeros(1, 1), labels[:1], num_classes=2)
    with pytest.raises(ConfigError, match="plain has no natural groups"):
        _split("by_group", data, 2)


# --- the papers' numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("mnist", {41: 606, 73: 591, 51: 568, 74: 557, 95: 602}),
        ("cifar10", {17: 526, 33: 527, 77: 496, 11: 546, 45: 529}),
        ("fashion_mnist", {41: 614, 73: 599, 51: 576, 74: 563}),
    ],
)
def test_dba_client_sizes_are_the_authors(name: str, sizes: dict[int, int], real: Load) -> None:
    parts = _split("dirichlet_dba(seed=1)", real(name), 100)
    assert {client: len(parts[client]) for client in sizes} == sizes


def test_dba_on_mnist_leaves_the_samples_out_that_the_authors_do(real: Load) -> None:
    data = real("mnist")
    parts = _split("dirichlet_dba(seed=1)", data, 100)
    sizes = torch.tensor([len(part) for part in parts]).float()
    assert (sizes.min(), sizes.quantile(0.5), sizes.max()) == (78, 555.5, 1384)
    assert min(len(data.train_labels[part].unique()) for part in parts) == 5
    left = data.train_labels.bincount() - data.train_labels[torch.cat(parts)].bincount()
    assert left.sum() == 1431
    assert {label: left[label].item() for label in (1, 7, 3, 2, 9)} == {1: 818, 7: 342, 3: 205, 2: 38, 9: 28}
