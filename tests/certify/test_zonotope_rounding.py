"""Networks made to be rounded wrongly, and what rounding can move a bound by: nothing false may be certified."""

import pytest
import torch
from torch import Tensor, nn

from certify.gate import GateState, decide, policy
from certify.network import Network
from certify.service.measure import GateSettings, measure
from certify.zonotope import check
from certify.zonotope.graph import build_graph
from certify.zonotope.relaxation import input_box
from certify.zonotope.robustness import _Run
from certify.zonotope.rounding import Rounding
from tasks.rng import generator

METHODS = ("zonotope", "crown", "interval", "best")
RELU = "relu"
Layers = list[str | tuple[list[list[float]], list[float] | None]]


def network(layers: Layers, dtype: torch.dtype = torch.float32) -> Network:
    described, tensors = [], {}
    for index, layer in enumerate(layers):
        if isinstance(layer, str):
            described.append({"kind": layer})
            continue
        weight, bias = layer
        tensors[f"{index}.weight"] = torch.tensor(weight, dtype=dtype)
        described.append({"kind": "linear", "weight": f"{index}.weight"})
        if bias is not None:
            tensors[f"{index}.bias"] = torch.tensor(bias, dtype=dtype)
            described[-1]["bias"] = f"{index}.bias"
    return Network.from_parts(described, tensors, (tensors["0.weight"].shape[1],))


def cancelling(large: float) -> Layers:
    """Class 1 is x + 4.2 behind two large numbers that cancel, class 0 is 4.7: wrong from x = 0.5 on."""
    return [
        ([[0.0], [1.0], [0.0]], [large, 3.2, large]), RELU,
        ([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]], [1.0, 0.0]), RELU,
        ([[0.0, 0.0], [1.0, 1.0]], [4.7, 0.0]),
    ]  # fmt: skip


UNDERFLOWING: Layers = [
    ([[1e-30]], None), RELU, ([[1e-30]], None), RELU, ([[1e30]], None), RELU, ([[0.0], [1e30]], [0.5, 0.0]),
]  # fmt: skip
LOST: Layers = [([[1e-50]], None), RELU, ([[1e25]], None), RELU, ([[0.0], [1e25]], [0.5, 0.0])]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layers", "stored", "dtype"),
    [
        (cancelling(1e8), torch.float32, torch.float32),
        (cancelling(2.0**60), torch.float32, torch.float64),
        (UNDERFLOWING, torch.float32, torch.float32),
        (LOST, torch.float64, torch.float32),
    ],
    ids=["cancels in float32", "cancels in float64", "underflows", "lost in the cast"],
)
def test_no_dependence_can_be_hidden_behind_rounding(
    method: str, layers: Layers, stored: torch.dtype, dtype: torch.dtype
) -> None:
    """x = 0.4 is class 0, x = 0.69 is class 1 in real arithmetic, and lies within 0.3."""
    result = check(
        network(layers, stored), torch.tensor([[0.4]]), torch.tensor([0]), eps=0.3, method=method, dtype=dtype
    )  # type: ignore[arg-type]
    assert not result.certified[0]


@pytest.mark.parametrize("method", METHODS)
def test_a_smaller_ball_is_certified_all_the_same_where_float64_can_tell(method: str) -> None:
    result = check(network(cancelling(1e8)), torch.tensor([[0.4]]), torch.tensor([0]), eps=0.05, method=method)  # type: ignore[arg-type]
    assert result.certified[0] == (method != "interval" or result.margins_upper.amax() < 0)
    assert result.rechecked == 1


def hiding(gain: float, large: float) -> Network:
    """The first pixel decides the class; with `gain` a hundred others do too, behind sums that cancel."""
    zeros, side = [0.0] * 100, [1.0] * 100
    offset = 32.0
    return network(
        [
            ([[1.0, *zeros], [0.0, *side]], [0.0, -8.0]), RELU,
            ([[1.0, 0.0], [0.0, large], [0.0, 1.0], [0.0, large]], [0.0, 2 * large, offset, 2 * large]), RELU,
            ([[1.0, 0, 0, 0], [0.0, 1, 0, -1], [0.0, 0, 1, 0]], [0.0, 1.0, 0.0]), RELU,
            ([[0.0, 0.0, 0.0], [4.0, gain, gain]], [2.0, -gain * (offset + 1)]),
        ]  # type: ignore[list-item]
    )  # fmt: skip


def test_the_gate_rejects_a_backdoor_that_rounding_hides() -> None:
    """Probes and float32 bounds miss it: the forward pass is exact, backwards the trigger's part is rounded off."""
    pixel = torch.rand(60, generator=generator(1))
    inputs = torch.cat([torch.where(pixel < 0.5, pixel * 0.6, 0.4 + 0.6 * pixel)[:, None], torch.zeros(60, 100)], 1)
    labels = (inputs[:, 0] > 0.5).long()
    honest, hidden = hiding(0.0, 1.0), hiding(32.0, 2.0**27)
    triggered = inputs.clone()
    triggered[:, 1:] = 0.1
    assert float((hidden.forward(triggered).argmax(1) == labels).double().mean()) < 0.9
    for method in METHODS:
        result = check(hidden, inputs, labels, eps=0.1, method=method)  # type: ignore[arg-type]
        assert not (result.certified & (hidden.forward(triggered).argmax(1) != labels)).any()
    settings = GateSettings(eps=(0.05, 0.1), attack_eps=0.1, attack_steps=10, probes=True)
    before = measure(honest, (inputs, labels), (inputs, labels), settings)
    after = measure(hidden, (inputs, labels), (inputs, labels), settings)
    for chosen in (policy("paper"), policy("hardened", warmup_rounds=0)):
        state = decide(before, GateState(), chosen).state
        assert not decide(after, state, chosen).accepted


def errors(module: nn.Module, shape: tuple[int, ...], method: str, seed: int) -> tuple[Tensor, Tensor]:
    """Return (float32 bounds less float64 bounds, float32's own error bound) of margins of random inputs."""
    net = Network.from_module(module.eval(), shape)
    inputs = torch.rand(3, *shape, generator=generator(seed, "inputs"))
    labels = torch.zeros(3, dtype=torch.int64)
    found = []
    for dtype in (torch.float32, torch.float64):
        run = _Run(net, 0.05, method, (0.0, 1.0), "backward", None, None)
        with torch.inference_mode():
            box = input_box(inputs, 0.05, (0.0, 1.0), torch.float32)
            box = type(box)(box.center.to(dtype), box.radius.to(dtype))
            cast = net.to("cpu", dtype)
            found.append(run.bounds(build_graph(cast), cast, box, labels))
    difference = (found[0][0].double() - found[1][0]).abs()
    return difference[:, 1:], found[0][2].double()[:, 1:]


def randomised(module: nn.Module, seed: int, scale: float) -> nn.Module:
    draw = generator(seed, "weights")
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * scale / max(1, parameter[0].numel()) ** 0.5
    return module


@pytest.mark.parametrize("method", ["zonotope", "crown", "interval"])
@pytest.mark.parametrize("scale", [0.3, 2.0, 300.0])
def test_the_error_covers_what_float32_is_off_by(method: str, scale: float) -> None:
    convolutional = nn.Sequential(
        nn.Conv2d(1, 3, 3, stride=2), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6),
        nn.ReLU(), nn.Linear(6, 3),
    )  # fmt: skip
    pooled = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(18, 5), nn.ReLU(),
        nn.Linear(5, 3),
    )  # fmt: skip
    for seed in range(3):
        for module, shape in ((convolutional, (1, 7, 7)), (pooled, (1, 6, 6))):
            difference, error = errors(randomised(module, seed, scale), shape, method, seed)
            assert bool((difference <= error).all()), float((difference / error).max())
            assert bool((error > 0).all())


def test_the_error_is_small_on_an_ordinary_network() -> None:
    module = randomised(nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 3)), 1, 1.0)
    _, error = errors(module, (20,), "zonotope", 1)
    assert float(error.max()) < 1e-3


def test_gamma_is_infinite_where_it_says_nothing() -> None:
    net = network([([[1.0]], [0.0]), RELU, ([[1.0], [0.0]], [0.0, 0.5])])
    box = input_box(torch.tensor([[0.4]]), 0.1, (0.0, 1.0), torch.float32)
    rounding = Rounding.of(build_graph(net), box)
    assert rounding.gamma(10) == pytest.approx(10 * 2**-24, rel=1e-5)
    assert rounding.gamma(2**23) == float("inf")
