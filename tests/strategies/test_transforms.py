"""Transforms of the new global model: clip and noise."""

import math

import pytest
import torch

from strategies.context import BROADCAST, RoundContext, needs, supply
from strategies.pipeline import ServerStep
from strategies.transforms.clip_model import clip_model
from strategies.transforms.crfl import clip_norm, crfl
from strategies.transforms.gaussian_noise import gaussian_noise
from tasks import spec
from tasks.errors import ConfigError
from tasks.rng import generator


def norm(model: torch.Tensor) -> float:
    return float(model.double().norm())


def test_clip_model_never_leaves_more_than_its_bound() -> None:
    """In float64, to the last bit: certificates count on it."""
    for seed in range(200):
        model = torch.randn(1 + 37 * seed, generator=generator(seed)) * 3
        for bound in (1e-3, 0.1, 1.0, math.pi, 7.3):
            clipped = clip_model(model, max_norm=bound)
            assert norm(clipped) <= bound
            assert norm(clipped) >= min(norm(model), bound * (1 - 1e-6))
            assert torch.equal(clip_model(clipped, max_norm=bound), clipped)


def test_clip_model_keeps_the_direction_and_short_models() -> None:
    model = torch.tensor([3.0, -4.0])
    torch.testing.assert_close(clip_model(model, max_norm=1.0), torch.tensor([0.6, -0.8]))
    assert clip_model(model, max_norm=5.0) is model
    assert torch.equal(clip_model(torch.zeros(4), max_norm=1.0), torch.zeros(4))
    assert torch.equal(model, torch.tensor([3.0, -4.0]))


@pytest.mark.parametrize("size", [1e25, 3e38])
def test_clip_model_of_a_model_whose_squares_leave_float32(size: float) -> None:
    clipped = clip_model(torch.full((100,), size), max_norm=2.0)
    assert norm(clipped) == pytest.approx(2.0, rel=1e-6)


def test_gaussian_noise_is_normal_and_repeatable() -> None:
    model = torch.linspace(-1, 1, 40_000)
    noisy = gaussian_noise(model, generator(1), std=0.25)
    assert torch.equal(noisy, gaussian_noise(model, generator(1), std=0.25))
    assert not torch.equal(noisy, gaussian_noise(model, generator(2), std=0.25))
    noise = (noisy - model).double() / 0.25
    assert abs(float(noise.mean())) < 4 / 200
    assert abs(float(noise.var()) - 1) < 4 * math.sqrt(2 / 40_000)
    for cut, share in ((0.0, 0.5), (1.0, 0.8413), (2.0, 0.9772)):
        assert float((noise < cut).double().mean()) == pytest.approx(share, abs=0.01)
    assert abs(float((noise[1:] * noise[:-1]).mean())) < 4 / 200


def test_gaussian_noise_of_no_size_is_none() -> None:
    assert torch.equal(gaussian_noise(torch.ones(3), generator(1), std=0.0), torch.ones(3))


def test_transforms_refuse() -> None:
    with pytest.raises(ConfigError, match="max_norm > 0, got 0"):
        clip_model(torch.ones(2), max_norm=0.0)
    with pytest.raises(ConfigError, match="std >= 0, got -1"):
        gaussian_noise(torch.ones(2), generator(1), std=-1.0)


@pytest.mark.parametrize("name", spec.names("transform"))
def test_transform_reads_as_a_component_and_leaves_the_model_alone(name: str) -> None:
    arguments = {"clip_model": "max_norm=1.0", "gaussian_noise": "std=0.5", "crfl": "rho=1.0"}
    component = spec.resolve("transform", f"{name}({arguments[name]})")
    assert component.function.__doc__
    assert set(needs(component.function)) <= {"generator", "memory", "round"}
    model = torch.full((9,), 2.0)
    result = component(model, *supply(component, RoundContext([0], round=1, seed=1), model))
    assert torch.equal(model, torch.full((9,), 2.0))
    assert result.shape == model.shape
    assert result.dtype == model.dtype
    assert not torch.equal(result, model)


def test_transforms_apply_in_order_with_noise_of_the_round() -> None:
    chain = spec.resolve_chain("transform", "clip_model(max_norm=1.0) | gaussian_noise(std=0.1)")
    server_step = ServerStep(spec.resolve("optimizer", "step"), chain)
    models = []
    for number in (1, 1, 2):
        models.append(server_step(torch.full((500,), 3.0), torch.ones(500), RoundContext([0], round=number, seed=5)))
    assert torch.equal(models[0], models[1])
    assert not torch.equal(models[0], models[2])
    clipped = clip_model(torch.full((500,), 4.0), max_norm=1.0)
    noise = RoundContext([0], round=1, seed=5).generator("transform 1 gaussian_noise")
    assert torch.equal(models[0], gaussian_noise(clipped, noise, std=0.1))
    assert norm(models[0]) > 1.5  # the noise comes after the clip


def test_crfl_releases_the_clipped_model_and_sends_a_noisy_one() -> None:
    chain = spec.resolve_chain("transform", "crfl(rho=2.0, slope=0.5, sigma=0.1)")
    context = RoundContext([0], round=3, seed=5)
    released = ServerStep(spec.resolve("optimizer", "step"), chain)(torch.zeros(500), torch.ones(500), context)
    assert torch.equal(released, clip_model(torch.ones(500), max_norm=3.5))
    assert norm(released) <= 3.5
    noise = torch.randn(500, generator=context.generator("transform 0 crfl"))
    assert torch.equal(context.memory[BROADCAST], released + 0.1 * noise)
    assert norm(context.memory[BROADCAST]) != norm(released)


def test_crfl_without_noise_sends_what_it_releases() -> None:
    memory: dict[str, torch.Tensor] = {}
    released = crfl(torch.full((4,), 3.0), 1, generator(1), memory, rho=2.0, sigma=0.0)
    assert torch.equal(memory[BROADCAST], released)


def test_schedules_of_the_clip() -> None:
    """The papers' MNIST, EMNIST and LOAN schedules at the rounds that the text gives."""
    assert clip_norm(10, rho=2.0, slope=0.1, cap=15.0) == pytest.approx(3.0)
    assert clip_norm(1000, rho=2.0, slope=0.1, cap=15.0) == 15.0
    assert clip_norm(10, rho=4.0, slope=0.25, cap=100.0) == 6.5
    assert clip_norm(6, rho=2.0, slope=0.025, cap=5.0) == pytest.approx(2.15)
    assert clip_norm(1, rho=4.0) == clip_norm(99, rho=4.0) == 4.0
    with pytest.raises(ConfigError, match="> 0, got 0 in round 2"):
        clip_norm(2, rho=2.0, slope=-1.0)
    with pytest.raises(ConfigError, match="sigma >= 0, got -1"):
        crfl(torch.ones(2), 1, generator(1), {}, rho=1.0, sigma=-1.0)
