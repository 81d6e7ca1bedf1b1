"""Verdicts: what is certified, what never is, what a stopped or wrong call does."""

import math

import pytest
import torch
from torch import Tensor, nn

from certify.network import Network
from certify.pgd import pgd
from certify.zonotope import check, margin_bounds
from tasks.dataset import Dataset
from tasks.errors import CertificationError, DataError
from tasks.model import build, initialise
from tasks.rng import generator
from tasks.source import DataSource
from tasks.spec import resolve

METHODS = ["zonotope", "crown", "interval", "best"]


def line(slope: float, offset: float = 0.0) -> Network:
    """z0 - z1 = slope * x + offset, through a ReLU that is always on for x in [0, 1]."""
    architecture = [
        {"kind": "linear", "weight": "a", "bias": None},
        {"kind": "relu"},
        {"kind": "linear", "weight": "w", "bias": "b"},
    ]
    tensors = {
        "a": torch.ones(1, 1),
        "w": torch.tensor([[slope], [0.0]]),
        "b": torch.tensor([offset, 0.0]),
    }
    return Network.from_parts(architecture, tensors, (1,))


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_margin_is_certified_up_to_its_radius(method: str) -> None:
    network, inputs, label = line(1.0, -0.25), torch.tensor([[0.5]]), torch.tensor([0])
    for eps, certified in ((0.2, True), (0.2499, True), (0.25, False), (0.26, False)):
        found = check(network, inputs, label, eps=eps, method=method)  # type: ignore[arg-type]
        assert found.certified.tolist() == [certified]
        assert found.margins_upper[0, 1].item() == pytest.approx(eps - 0.25, abs=1e-6)
        assert found.loss.item() == pytest.approx(max(0, eps - 0.25), abs=1e-6)
    assert found.clean_margin.item() == 0.25
    assert found.relative_margin.item() == pytest.approx(0.04, rel=1e-3)


def test_a_wrong_prediction_is_never_certified() -> None:
    found = check(line(1.0, -0.25), torch.tensor([[0.5], [0.5]]), torch.tensor([1, 0]), eps=0.1)
    assert found.certified.tolist() == [False, True]
    assert found.clean_accuracy == 0.5
    assert found.certified_accuracy == 0.5
    assert found.loss.tolist() == pytest.approx([0.35, 0.0], abs=1e-6)
    assert found.mean_loss == pytest.approx(0.175, abs=1e-6)


def test_close_cases_are_decided_in_float64() -> None:
    inputs, label = torch.tensor([[0.5]], dtype=torch.float64), torch.tensor([0])
    network = line(1.0, -0.25)
    found = check(network, inputs, label, eps=0.25 - 1e-7)
    assert found.rechecked == 1
    assert found.certified.all()
    assert found.margins_upper[0, 1].item() == pytest.approx(-1e-7, rel=1e-5)
    assert not check(network, inputs, label, eps=0.25 - 1e-12).certified.any()
    assert check(network, inputs, label, eps=0.1).rechecked == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38])
def test_nan_and_infinity_are_never_certified(method: str, bad: float) -> None:
    network = Network.from_module(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)), (2,))
    inputs, labels = torch.full((2, 2), 0.5), torch.tensor([0, 1])
    for place in range(network.num_params):
        vector = network.vector().clone()
        vector[place] = bad
        noisy = network.with_vector(vector)
        found = check(noisy, inputs, labels, eps=0.1, method=method)  # type: ignore[arg-type]
        certified = found.certified
        assert not found.margins_upper.isnan().any()
        if math.isfinite(bad):  # huge weights may be certified, but then float64 must agree
            found = check(noisy, inputs, labels, eps=0.1, method=method, dtype=torch.float64)  # type: ignore[arg-type]
            assert (found.margins_upper.amax(1) < 0)[certified].all()
        else:
            assert not certified.any()


def test_negative_variances_are_never_certified() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
    initialise(module, generator(1))
    network = Network.from_module(module, (1, 3, 3))
    vector = network.vector().clone()
    vector[-1] = -1.0
    inputs = torch.rand(2, 1, 3, 3, generator=generator(2))
    for method in METHODS:
        for label in (0, 1):
            found = check(network.with_vector(vector), inputs, torch.full((2,), label), eps=0.0, method=method)  # type: ignore[arg-type]
            assert not found.certified.any()


def test_progress_and_stopping() -> None:
    network, inputs, labels = line(1.0), torch.full((600, 1), 0.5), torch.zeros(600, dtype=torch.int64)
    seen: list[tuple[int, int]] = []
    check(network, inputs, labels, eps=0.1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (600, 600)
    assert seen == sorted(seen)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 2

    with pytest.raises(CertificationError, match="stopped"):
        check(network, inputs, labels, eps=0.1, should_stop=stop)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": -0.1}, "eps must be"),
        ({"eps": math.nan}, "eps must be"),
        ({"eps": math.inf}, "eps must be"),
        ({"method": "magic"}, "unknown method 'magic'; there are: zonotope, crown"),
        ({"inputs": torch.tensor([[2.0]])}, "inside input_range"),
        ({"inputs": torch.tensor([[math.nan]])}, "inside input_range"),
        ({"inputs": torch.ones(1, 2)}, "wanted floating-point inputs"),
        ({"inputs": torch.ones(1, 1, dtype=torch.int64)}, "wanted floating-point inputs"),
        ({"inputs": torch.ones(0, 1), "labels": torch.ones(0, dtype=torch.int64)}, "1 sample or more"),
        ({"labels": torch.tensor([2])}, "labels must be from 0 to 1"),
        ({"labels": torch.tensor([-1])}, "labels must be from 0 to 1"),
        ({"labels": torch.tensor([0.0])}, "one class each"),
        ({"labels": torch.tensor([0, 1])}, "one class each"),
        ({"input_range": (1.0, 0.0)}, "lower first"),
        ({"dtype": torch.float16}, "float32 or float64"),
        ({"direction": "forward", "method": "crown"}, "forward for the zonotope"),
        ({"memory_bytes": 10}, "memory_bytes"),
    ],
)
def test_wrong_calls_say_what_was_wanted(change: dict[str, object], text: str) -> None:
    call = {"inputs": torch.tensor([[0.5]]), "labels": torch.tensor([0]), "eps": 0.1, **change}
    inputs, labels = call.pop("inputs"), call.pop("labels")
    with pytest.raises(CertificationError, match=text):
        check(line(1.0), inputs, labels, **call)  # type: ignore[arg-type]


def test_training_against_bounds_makes_them_certify() -> None:
    module = build(resolve("model", "logistic_regression()"), (4,), 3, generator(3))
    network = Network.from_module(module, (4,), copy=False)
    inputs = torch.eye(4)[:3] * 0.8 + 0.1
    labels = torch.arange(3)
    assert check(network, inputs, labels, eps=0.2).certified_accuracy < 1
    optimiser = torch.optim.SGD(module.parameters(), lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        (margin_bounds(network, inputs, labels, 0.2) + 0.5).clamp(min=0).sum().backward()
        optimiser.step()
    assert check(network, inputs, labels, eps=0.2).certified_accuracy == 1


@pytest.fixture(scope="module")
def mnist() -> Dataset:
    try:
        return resolve("dataset", "mnist()")(DataSource.default())
    except DataError:
        pytest.skip("needs MNIST; name its folder in HAWTHORN_DATA")


@pytest.fixture(scope="module")
def trained(mnist: Dataset) -> Network:
    """A small network, adversarially trained for seconds."""
    layers = (
        nn.Conv2d(1, 6, 5, 3),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, 2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 24),
        nn.ReLU(),
    )
    module = nn.Sequential(*layers, nn.Linear(24, 10))
    draws = generator(11)
    initialise(module, draws)
    optimiser = torch.optim.Adam(module.parameters(), lr=4e-3)
    order = torch.randperm(9600, generator=draws)
    for inputs, labels in mnist.batches("train", order, 64):
        attacked = pgd(module, inputs, labels, eps=0.08, steps=2, generator=draws, early_stop=False).inputs
        optimiser.zero_grad()
        nn.functional.cross_entropy(module(attacked), labels).backward()
        optimiser.step()
    return Network.from_module(module, (1, 28, 28))


def test_no_attack_breaks_a_certified_digit(trained: Network, mnist: Dataset) -> None:
    inputs, labels = mnist.batch("test", slice(0, 100))
    certified: dict[float, Tensor] = {}
    for eps in (0.02, 0.06):
        found = check(trained, inputs, labels, eps=eps, method="best")
        certified[eps] = found.certified
        for loss in ("cross_entropy", "margin"):
            attack = pgd(trained, inputs, labels, eps=eps, loss=loss, steps=20, generator=generator(1, loss))
            assert not (found.certified & ~attack.correct).any()
            assert found.certified_accuracy <= attack.accuracy <= attack.clean_accuracy == found.clean_accuracy
    assert certified[0.02].sum() > 50  # otherwise the comparison says little
    assert 5 < certified[0.06].sum() < certified[0.02].sum()


def test_float32_and_float64_agree_on_digits(trained: Network, mnist: Dataset) -> None:
    inputs, labels = mnist.batch("test", slice(300, 316))
    for method in ("zonotope", "crown"):
        single, double = (
            check(trained, inputs, labels, eps=0.05, method=method, dtype=dtype)
            for dtype in (torch.float32, torch.float64)
        )
        other = double.margins_upper > -torch.inf
        torch.testing.assert_close(single.margins_upper[other], double.margins_upper[other], rtol=1e-4, atol=2e-4)
        assert torch.equal(single.certified, double.certified)


def test_scaling_the_logits_scales_the_loss_and_not_the_relative_margin(trained: Network, mnist: Dataset) -> None:
    inputs, labels = mnist.batch("test", slice(0, 20))
    last = dict(list(trained.tensors().items())[-2:])
    louder = trained.with_tensors({**trained.tensors(), **{name: 100 * tensor for name, tensor in last.items()}})
    quiet, loud = (check(network, inputs, labels, eps=0.1) for network in (trained, louder))
    assert loud.mean_loss == pytest.approx(100 * quiet.mean_loss, rel=1e-4)
    torch.testing.assert_close(loud.relative_margin, quiet.relative_margin, rtol=1e-4, atol=1e-4)
