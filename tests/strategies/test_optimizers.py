"""Server optimisers against torch's own and slow loops; what they keep, and what hostile aggregates do to them."""

import math

import pytest
import torch
from torch import Tensor

from strategies.context import RoundContext, needs
from strategies.optimizers.adagrad import adagrad
from strategies.optimizers.adam import adam
from strategies.optimizers.momentum import momentum
from strategies.optimizers.step import step
from strategies.optimizers.yogi import yogi
from strategies.pipeline import ServerStep
from tasks import spec
from tasks.errors import ConfigError
from tasks.rng import generator

ADAPTIVE = {"adam": adam, "yogi": yogi, "adagrad": adagrad}


def aggregates(rounds: int = 6, num_params: int = 5) -> Tensor:
    return torch.randn(rounds, num_params, generator=generator(1, "aggregates"))


@pytest.mark.parametrize("name", spec.names("optimizer"))
def test_optimizer_reads_as_a_component_and_leaves_the_aggregate_alone(name: str) -> None:
    component = spec.resolve("optimizer", name)
    assert component.function.__doc__
    assert set(needs(component.function)) <= {"memory"}
    aggregate, memory = aggregates()[0], {}
    before = aggregate.clone()
    besides = (memory,) if needs(component.function) else ()
    direction = component(aggregate, *besides)
    assert torch.equal(aggregate, before)
    assert direction.shape == aggregate.shape
    assert direction.dtype == torch.float32
    assert bool((direction * aggregate >= 0).all()), "the first step goes where the aggregate points"
    zero = component(torch.zeros(5), *(({},) if besides else ()))
    assert torch.equal(zero, torch.zeros(5))


@pytest.mark.parametrize("name", spec.names("optimizer"))
def test_what_is_kept_is_a_tensor_per_name_and_enough_to_go_on_from(name: str) -> None:
    """A run that resumes from a checkpoint, a copy of the memory, goes on as one that never stopped."""
    component = spec.resolve("optimizer", name)
    if not needs(component.function):
        return
    memory: dict[str, Tensor] = {}
    for aggregate in aggregates()[:3]:
        component(aggregate, memory)
    assert all(key.split(".")[0] == name and isinstance(value, Tensor) for key, value in memory.items())
    copy = {key: value.clone() for key, value in memory.items()}
    component(aggregates()[3], memory).zero_()  # what a caller does with a direction must not reach the memory
    component(aggregates()[3], copy)
    direction, again = (component(aggregates()[4], kept) for kept in (memory, copy))
    assert torch.equal(direction, again)


def test_step_is_the_aggregate() -> None:
    assert step(aggregates()[0]) is not None
    assert torch.equal(step(aggregates()[0]), aggregates()[0])


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("beta", [0.5, 0.9])
def test_momentum_is_sgd_with_momentum_on_minus_the_aggregate(nesterov: bool, beta: float) -> None:
    model = torch.nn.Parameter(torch.zeros(5))
    sgd = torch.optim.SGD([model], lr=0.3, momentum=beta, nesterov=nesterov)
    ours, memory = torch.zeros(5), {}
    for aggregate in aggregates():
        model.grad = -aggregate
        sgd.step()
        ours = ours + 0.3 * momentum(aggregate, memory, beta=beta, nesterov=nesterov)
        torch.testing.assert_close(ours, model.detach())


def test_momentum_without_beta_is_step() -> None:
    memory: dict[str, Tensor] = {}
    for aggregate in aggregates():
        assert torch.equal(momentum(aggregate, memory, beta=0.0), aggregate)


def slow_direction(name: str, rows: Tensor, beta1: float, beta2: float, tau: float) -> list[float]:
    """Algorithm 2 of Reddi et al., number by number."""
    directions = []
    for values in rows.t().tolist():
        m, v = 0.0, tau**2
        for x in values:
            m = beta1 * m + (1 - beta1) * x
            if name == "adam":
                v = beta2 * v + (1 - beta2) * x**2
            elif name == "yogi":
                v = v - (1 - beta2) * x**2 * math.copysign(1, v - x**2) * (v != x**2)
            else:
                v = v + x**2
        directions.append(m / (math.sqrt(v) + tau))
    return directions


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("tau", [1e-3, 0.1])
def test_adaptive_optimizers_follow_algorithm_2(name: str, beta1: float, tau: float) -> None:
    rows, memory = aggregates(), {}
    given = {"beta1": beta1, "tau": tau} | ({} if name == "adagrad" else {"beta2": 0.95})
    for aggregate in rows:
        direction = ADAPTIVE[name](aggregate, memory, **given)
    wanted = torch.tensor(slow_direction(name, rows, beta1, 0.95, tau))
    torch.testing.assert_close(direction, wanted, rtol=1e-5, atol=1e-6)


def test_adagrad_is_torchs_adagrad_without_momentum() -> None:
    model = torch.nn.Parameter(torch.zeros(5))
    theirs = torch.optim.Adagrad([model], lr=1.0, initial_accumulator_value=1e-6, eps=1e-3)
    ours, memory = torch.zeros(5), {}
    for aggregate in aggregates():
        model.grad = -aggregate
        theirs.step()
        ours = ours + adagrad(aggregate, memory)
        torch.testing.assert_close(ours, model.detach())


def test_yogi_forgets_a_huge_aggregate_by_bounded_steps_and_adam_by_shares() -> None:
    for optimizer in (adam, yogi):
        memory: dict[str, Tensor] = {}
        optimizer(torch.full((1,), 100.0), memory)
        after = memory[f"{optimizer.__name__}.second"].item()
        optimizer(torch.full((1,), 1.0), memory)
        lost = after - memory[f"{optimizer.__name__}.second"].item()
        assert lost == pytest.approx(0.01 if optimizer is yogi else 0.01 * (after - 1), rel=1e-2)


@pytest.mark.parametrize("name", ADAPTIVE)
@pytest.mark.parametrize("size", [1e18, 1e25, 3e38])
def test_huge_aggregates_leave_numbers_behind(name: str, size: float) -> None:
    """A square beyond float32 would be inf, and inf - inf NaN: the model would be lost for good."""
    memory: dict[str, Tensor] = {}
    for value in (1.0, size, -size, size, 1.0, 1.0):
        direction = ADAPTIVE[name](torch.tensor([value, 0.0]), memory)
        assert direction.isfinite().all()
        assert all(kept.isfinite().all() for kept in memory.values())


@pytest.mark.parametrize(
    "text",
    [
        "momentum(beta=1.0)",
        "momentum(beta=-0.1)",
        "adam(beta1=1.0)",
        "adam(beta2=-0.5)",
        "yogi(tau=0.0)",
        "adagrad(tau=-1.0)",
    ],
)
def test_optimizers_refuse(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"{text.split('(')[0]} wants"):
        spec.resolve("optimizer", text)(torch.ones(2), {})


def test_a_server_step_moves_by_the_learning_rate_and_keeps_state_in_the_round() -> None:
    server_step = ServerStep(spec.resolve("optimizer", "momentum(beta=0.5)"), server_lr=0.1)
    around = RoundContext([0, 1])
    model = server_step(torch.ones(3), torch.full((3,), 2.0), around)
    torch.testing.assert_close(model, torch.full((3,), 1.2))
    model = server_step(model, torch.full((3,), 2.0), around)
    torch.testing.assert_close(model, torch.full((3,), 1.5))
    assert list(around.memory) == ["momentum"]
