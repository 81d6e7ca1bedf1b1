"""The attack: stays in the ball and the range, finds what is there, is the same for the same generator."""

import pytest
import torch
from torch import Tensor, nn

from certify.network import Network
from certify.pgd import pgd
from tasks.errors import CertificationError
from tasks.rng import generator


def classifier(seed: int = 1) -> nn.Module:
    module = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))
    draws = generator(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0, 1, generator=draws)
    return module


def data(samples: int = 64) -> tuple[Tensor, Tensor]:
    inputs = torch.rand(samples, 6, generator=generator(2))
    return inputs, classifier()(inputs).argmax(1)


@pytest.mark.parametrize("loss", ["cross_entropy", "margin"])
@pytest.mark.parametrize("random_start", [True, False])
def test_inputs_stay_in_the_ball_and_the_range(loss: str, random_start: bool) -> None:
    inputs, labels = data()
    found = pgd(
        classifier(), inputs, labels, eps=0.2, steps=7, step_size=0.3, restarts=2, loss=loss, random_start=random_start,  # type: ignore[arg-type]
        generator=generator(3),
    )  # fmt: skip
    assert (found.inputs - inputs).abs().max() <= 0.2 + 1e-6
    assert found.inputs.min() >= 0
    assert found.inputs.max() <= 1
    assert torch.equal(classifier()(found.inputs).argmax(1) == labels, found.correct)
    assert found.clean_accuracy == 1
    assert found.accuracy < 1


def test_a_linear_model_is_attacked_exactly() -> None:
    """The worst input of a linear model is a corner, which one large step finds."""
    weight = torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]])
    network = Network.from_parts([{"kind": "linear", "weight": "w", "bias": None}], {"w": weight}, (3,))
    inputs = torch.rand(200, 3, generator=generator(1))
    labels = network(inputs).argmax(1)
    margin = (inputs @ weight[0]).abs()
    for loss in ("cross_entropy", "margin"):
        found = pgd(network, inputs, labels, eps=0.1, generator=generator(2), loss=loss, steps=10, input_range=(-1, 2))  # type: ignore[arg-type]
        assert torch.equal(found.correct, margin > 0.35 + 1e-6)


def test_eps_zero_is_the_clean_accuracy() -> None:
    inputs, labels = data()
    found = pgd(classifier(), inputs, (labels + (torch.arange(64) < 16)) % 3, eps=0.0, generator=generator(1))
    assert torch.equal(found.inputs, inputs)
    assert found.accuracy == found.clean_accuracy == 0.75


def test_the_same_generator_gives_the_same_attack() -> None:
    inputs, labels = data()
    first, second, other = (
        pgd(classifier(), inputs, labels, eps=0.1, steps=3, generator=generator(seed)).inputs for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_early_stop_breaks_as_many() -> None:
    inputs, labels = data(200)
    early, late = (
        pgd(classifier(), inputs, labels, eps=0.08, generator=generator(1), early_stop=stop) for stop in (True, False)
    )
    assert torch.equal(early.correct, late.correct)
    assert 0 < early.accuracy < 1


def test_more_restarts_break_no_fewer() -> None:
    inputs, labels = data(200)
    one, many = (
        pgd(classifier(), inputs, labels, eps=0.05, steps=2, restarts=r, generator=generator(1)) for r in (1, 8)
    )
    assert not (many.correct & ~one.correct).any()


def test_huge_logits_hide_from_cross_entropy_alone() -> None:
    """Distilled models have such logits: float32 cross-entropy has no gradient, temperature and margin have one."""
    module = classifier()
    loud = nn.Sequential(module, Scale(1e5))
    inputs, labels = data(100)
    options = {"eps": 0.2, "random_start": False, "generator": generator(1)}
    hidden = pgd(loud, inputs, labels, **options)  # type: ignore[arg-type]
    cooled = pgd(loud, inputs, labels, temperature=1e5, **options)  # type: ignore[arg-type]
    margin = pgd(loud, inputs, labels, loss="margin", **options)  # type: ignore[arg-type]
    assert hidden.accuracy > 0.9
    assert cooled.accuracy < 0.5
    assert margin.accuracy < 0.5


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, values: Tensor) -> Tensor:
        return values * self.factor


def test_nan_is_wrong_and_parameters_get_no_gradient() -> None:
    inputs, labels = data()
    found = pgd(lambda x: x[:, :3] * torch.nan, inputs, labels, eps=0.1, generator=generator(1))
    assert found.accuracy == 0
    module = classifier()
    pgd(module, inputs, labels, eps=0.1, generator=generator(1))
    assert all(parameter.grad is None for parameter in module.parameters())
    with torch.no_grad():
        assert pgd(module, inputs, labels, eps=0.2, generator=generator(1)).accuracy < 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"eps": -1.0}, "from 0"),
        ({"restarts": 0}, "from 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"loss": "other"}, "unknown loss 'other'; there are"),
        ({"input_range": (0.0, 0.5)}, "inside input_range"),
    ],
)
def test_wrong_calls_say_what_was_wanted(change: dict[str, object], text: str) -> None:
    inputs, labels = data()
    with pytest.raises(CertificationError, match=text):
        pgd(classifier(), inputs, labels, **{"eps": 0.1, "generator": generator(1), **change})  # type: ignore[arg-type]
    with pytest.raises(CertificationError, match="one label each"):
        pgd(classifier(), inputs, labels[:3], eps=0.1, generator=generator(1))
