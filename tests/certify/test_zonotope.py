"""Bounds in the l_inf ball: oracles of the papers, an obvious slow version, exact maxima of tiny networks, samples."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor, nn

from certify.layers import Layer, run
from certify.network import Network
from certify.zonotope import check, margin_bounds
from certify.zonotope.backward import Propagation
from certify.zonotope.canvas import Geometry, Memory, image_of
from certify.zonotope.forward import forward_zonotope
from certify.zonotope.graph import build_graph
from certify.zonotope.grids import Grids, _linear_after, _window_sizes
from certify.zonotope.ops import Conv
from certify.zonotope.relaxation import input_box, relax
from certify.zonotope.windows import Windows
from tasks.model import build, initialise
from tasks.models.resnet18_half import BasicBlock
from tasks.rng import generator
from tasks.spec import resolve

METHODS = ["zonotope", "crown", "interval", "best"]


def draw(module: nn.Module, seed: int) -> nn.Module:
    """Give a module parameters and statistics of its own, larger than usual so that bounds are not all loose alike."""
    draws = generator(seed, "zonotope test")
    initialise(module, draws)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.2, generator=draws)
            part.running_var.uniform_(0.3, 2, generator=draws)
            part.weight.data.uniform_(-1.5, 1.5, generator=draws)
    return module.eval()


def block(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


SHAPE = (2, 6, 6)
NETS = {
    "mlp": lambda: block(nn.Flatten(), nn.Linear(72, 20), nn.ReLU(), nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 4)),
    "one linear": lambda: block(nn.Flatten(), nn.Linear(72, 3)),
    "cfat": lambda: block(
        nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(4, 5, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(45, 9),
        nn.ReLU(), nn.Linear(9, 3),
    ),
    "padded strides": lambda: block(
        nn.Conv2d(2, 3, 3, 2, 2), nn.ReLU(), nn.Conv2d(3, 4, 2, 2, 1), nn.ReLU(), nn.Conv2d(4, 3, 2, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(48, 3),
    ),
    "two convs in a row": lambda: block(
        nn.Conv2d(2, 3, 3, 1, 1), nn.Conv2d(3, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 2, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 3),
    ),
    "groups and dilation": lambda: block(
        nn.Conv2d(2, 4, 2, dilation=2, groups=2, bias=False), nn.ReLU(), nn.Conv2d(4, 4, (3, 2), (2, 1), groups=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(12, 3, bias=False),
    ),
    "batch norm": lambda: block(
        nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3),
        nn.Flatten(), nn.Linear(48, 3),
    ),
    "average pool": lambda: block(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2, 2, 1), nn.Conv2d(3, 4, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ),
    "residual": lambda: block(
        nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), BasicBlock(3, 4, 2), BasicBlock(4, 4, 1), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3),
    ),
}  # fmt: skip
POOLED = {
    "max pool": lambda: block(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3)
    ),
    "odd max pool": lambda: block(
        nn.MaxPool2d(3, 2, 1), nn.Conv2d(2, 3, 2), nn.ReLU(), nn.MaxPool2d(2, 1, 1), nn.Flatten(), nn.Linear(27, 3)
    ),
    "max pool of one": lambda: block(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.MaxPool2d(1, 2), nn.Flatten(), nn.Linear(8, 3)),
}
ALL = {**NETS, **POOLED}


def example(name: str, samples: int = 3, seed: int = 1) -> tuple[Network, Tensor, Tensor]:
    network = Network.from_module(draw(ALL[name](), seed), SHAPE)
    draws = generator(seed, "inputs", name)
    inputs = torch.rand(samples, *SHAPE, generator=draws)
    inputs[0, :, :3] = 0  # a corner of the range, as zero backgrounds are
    labels = torch.randint(network.num_classes, (samples,), generator=draws)
    return network, inputs, labels


# The obvious version: dense matrices, one sample, one neuron at a time


def slow_deepz(network: Network, sample: Tensor, label: int, eps: float) -> list[float]:
    exact = network.to(dtype=torch.float64)
    low = (sample.double() - eps).clamp(min=0).flatten()
    high = (sample.double() + eps).clamp(max=1).flatten()
    symbols: list[list[float]] = []
    start = ((low + high) / 2).tolist()
    for pixel, radius in enumerate(((high - low) / 2).tolist()):
        symbols.append([radius if other == pixel else 0.0 for other in range(len(start))])
    center, generators = _slow_layers(exact, exact.layers, start, symbols)
    result = []
    for other in range(len(center)):
        spread = sum(abs(symbol[other] - symbol[label]) for symbol in generators)
        result.append(center[other] - center[label] + spread)
    return result


def _slow_layers(
    network: Network, layers: tuple[Layer, ...], center: list[float], symbols: list[list[float]]
) -> tuple[list[float], list[list[float]]]:
    for layer in layers:
        if layer.kind == "relu":
            center, symbols = _slow_relu(center, symbols)
        elif layer.kind == "residual":
            known = len(symbols)
            body, from_body = _slow_layers(network, layer.body, center, symbols)
            other, from_other = _slow_layers(network, layer.shortcut, center, symbols)
            assert len(from_other) == known  # shortcuts here have no ReLU
            from_other = from_other + [[0.0] * len(other)] * (len(from_body) - known)
            center = [a + b for a, b in zip(body, other, strict=True)]
            symbols = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(from_body, from_other, strict=True)]
        else:
            size = math.prod(layer.input_shape)
            basis = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *layer.input_shape)
            images = run([layer], network.tensors(), basis).flatten(1)
            offset, matrix = images[0].numpy(), (images[1:] - images[0]).numpy()
            center = (np.array(center) @ matrix + offset).tolist()
            symbols = (np.array(symbols) @ matrix).tolist()
    return center, symbols


def _slow_relu(center: list[float], symbols: list[list[float]]) -> tuple[list[float], list[list[float]]]:
    center, symbols = list(center), [list(symbol) for symbol in symbols]
    for neuron in range(len(center)):
        radius = sum(abs(symbol[neuron]) for symbol in symbols)
        low, high = center[neuron] - radius, center[neuron] + radius
        if low >= 0:
            continue
        slope = 0.0 if high <= 0 else high / (high - low)
        mu = 0.0 if high <= 0 else -slope * low / 2
        center[neuron] = slope * center[neuron] + mu
        for symbol in symbols:
            symbol[neuron] *= slope
        if high > 0:
            symbols.append([mu if other == neuron else 0.0 for other in range(len(center))])
    return center, symbols


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("eps", [0.02, 0.2])
def test_backward_forward_and_the_obvious_version_agree(name: str, eps: float) -> None:
    network, inputs, labels = example(name)
    slow = torch.tensor([slow_deepz(network, x, int(y), eps) for x, y in zip(inputs, labels, strict=True)])
    own = torch.nn.functional.one_hot(labels, network.num_classes).bool()
    for direction in ("backward", "forward"):
        for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
            found = check(network, inputs, labels, eps=eps, direction=direction, dtype=dtype).margins_upper
            assert (found[own] == -torch.inf).all()
            torch.testing.assert_close(found[~own].float(), slow[~own], rtol=tolerance, atol=tolerance * 10)


def slow_crown(network: Network, sample: Tensor, label: int, eps: float) -> list[float]:
    """Return CROWN's margins of a chain of linear layers and ReLUs, each row on its own, in dense matrices."""
    exact = network.to(dtype=torch.float64)
    low, high = (sample.double() - eps).clamp(min=0).flatten(), (sample.double() + eps).clamp(max=1).flatten()
    stages: list[tuple[np.ndarray, np.ndarray]] = []  # (matrix, offset) of each linear stretch
    matrix, offset = np.eye(low.numel()), np.zeros(low.numel())
    for layer in exact.layers:
        if layer.kind == "relu":
            stages.append((matrix, offset))
            matrix, offset = np.eye(matrix.shape[0]), np.zeros(matrix.shape[0])
            continue
        size = math.prod(layer.input_shape)
        basis = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().view(-1, *layer.input_shape)
        images = run([layer], exact.tensors(), basis).flatten(1).numpy()
        step = (images[1:] - images[0]).T
        matrix, offset = step @ matrix, step @ offset + images[0]
    stages.append((matrix, offset))
    ends: list[list[tuple[float, float]]] = []

    def upper(row: np.ndarray, stage: int) -> float:
        constant = 0.0
        for number in range(stage, -1, -1):
            matrix, offset = stages[number]
            constant += row @ offset
            row = row @ matrix
            if number == 0:
                return constant + sum(c * (b if c > 0 else a) for c, a, b in zip(row, low.tolist(), high.tolist()))
            for neuron, (a, b) in enumerate(ends[number - 1]):
                if a >= 0:
                    continue
                if b <= 0:
                    row[neuron] = 0
                elif row[neuron] > 0:
                    constant += row[neuron] * -a * b / (b - a)
                    row[neuron] *= b / (b - a)
                else:
                    row[neuron] *= float(b > -a)
        raise AssertionError

    for stage, (matrix, _) in enumerate(stages[:-1]):
        rows = np.eye(matrix.shape[0])
        ends.append([(-upper(-row, stage), upper(row.copy(), stage)) for row in rows])
    classes = np.eye(network.num_classes)
    return [upper(classes[other] - classes[label], len(stages) - 1) for other in range(network.num_classes)]


@pytest.mark.parametrize("name", [name for name in NETS if name != "residual"])
@pytest.mark.parametrize("eps", [0.02, 0.2])
def test_adaptive_slopes_agree_with_the_obvious_version(name: str, eps: float) -> None:
    network, inputs, labels = example(name)
    slow = torch.tensor([slow_crown(network, x, int(y), eps) for x, y in zip(inputs, labels, strict=True)])
    own = torch.nn.functional.one_hot(labels, network.num_classes).bool()
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 2e-5)):
        found = check(network, inputs, labels, eps=eps, method="crown", dtype=dtype).margins_upper
        torch.testing.assert_close(found[~own].float(), slow[~own].float(), rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("name", POOLED)
def test_pooling_agrees_forwards_and_backwards(name: str) -> None:
    network, inputs, labels = example(name)
    ways = [check(network, inputs, labels, eps=0.1, direction=d, dtype=torch.float64) for d in ("backward", "forward")]
    torch.testing.assert_close(ways[0].margins_upper, ways[1].margins_upper, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("method", METHODS)
def test_no_sampled_input_exceeds_the_bounds(name: str, method: str) -> None:
    network, inputs, labels = example(name)
    exact = network.to(dtype=torch.float64)
    for eps in (0.03, 0.3):
        bounds = check(network, inputs, labels, eps=eps, method=method).margins_upper  # type: ignore[arg-type]
        low, high = (inputs.double() - eps).clamp(min=0), (inputs.double() + eps).clamp(max=1)
        draws = generator(3, name, method)
        for trial in range(40):
            share = torch.rand(inputs.shape, generator=draws, dtype=torch.float64)
            share = share.round() if trial % 2 else share
            logits = exact.forward(low + share * (high - low))
            margins = logits - logits.gather(1, labels[:, None])
            assert (margins <= bounds.clamp(min=-1e30) + 1e-9)[bounds > -torch.inf].all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("method", METHODS)
def test_without_a_ball_the_bound_is_the_margin(name: str, method: str) -> None:
    network, inputs, labels = example(name)
    found = check(network, inputs, labels, eps=0.0, method=method, dtype=torch.float64)  # type: ignore[arg-type]
    logits = network.forward(inputs, dtype=torch.float64)
    margins = logits - logits.gather(1, labels[:, None])
    other = found.margins_upper > -torch.inf
    torch.testing.assert_close(found.margins_upper[other], margins[other], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.clean_margin, -margins.scatter(1, labels[:, None], -torch.inf).amax(1))
    right = logits.argmax(1) == labels
    assert torch.equal(found.certified, right)


@pytest.mark.parametrize("name", ALL)
def test_a_batch_is_its_samples(name: str) -> None:
    network, inputs, labels = example(name, samples=4)
    for method in METHODS:
        whole = check(network, inputs, labels, eps=0.1, method=method, dtype=torch.float64)  # type: ignore[arg-type]
        for sample in range(4):
            one = slice(sample, sample + 1)
            single = check(network, inputs[one], labels[one], eps=0.1, method=method, dtype=torch.float64)  # type: ignore[arg-type]
            torch.testing.assert_close(single.margins_upper, whole.margins_upper[one], rtol=1e-10, atol=1e-10)
            assert single.unstable[0] == whole.unstable[sample]


@pytest.mark.parametrize("name", ["cfat", "padded strides", "max pool", "residual"])
@pytest.mark.parametrize("method", ["zonotope", "crown"])
def test_the_size_of_chunks_changes_nothing(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, inputs, labels = example(name)
    found = [check(network, inputs, labels, eps=0.1, method=method, dtype=torch.float64)]  # type: ignore[arg-type]
    for size in (1, 4000, 1 << 16):
        monkeypatch.setattr("certify.zonotope.robustness._CPU_WORKING_SET", size)
        monkeypatch.setattr("certify.zonotope.grids.ROWS_AT_ONCE", 4)
        found.append(check(network, inputs, labels, eps=0.1, method=method, dtype=torch.float64))  # type: ignore[arg-type]
        torch.testing.assert_close(found[-1].margins_upper, found[0].margins_upper, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("padding", [0, 1])
def test_grids_are_used_and_change_nothing(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = block(
        nn.Conv2d(2, 3, 3, 2, padding), nn.ReLU(), nn.Conv2d(3, 4, 2, 1, padding), nn.ReLU(), nn.Flatten(),
        nn.Linear(4 * (49 if padding else 16), 40), nn.ReLU(), nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 3),
    )  # fmt: skip
    network = Network.from_module(draw(module, 5), (2, 12, 12))
    inputs, labels = torch.rand(3, 2, 12, 12, generator=generator(6)), torch.tensor([0, 1, 2])
    monkeypatch.setattr("certify.zonotope.robustness._CPU_WORKING_SET", 1)  # one sample at a time
    used: list[bool] = []
    for decision in (True, False):

        def plan(self: Grids, run: Propagation, index: int, high: Tensor, decision: bool = decision) -> bool:
            after = _linear_after(run.graph, index)
            possible = after is not None and _window_sizes(run.graph, index, run.lines) is not None
            used.append(possible)
            return decision and possible

        monkeypatch.setattr(Grids, "plan", plan)
        for eps in (0.01, 0.05, 0.25):
            found = check(network, inputs, labels, eps=eps, dtype=torch.float64).margins_upper
            expected = check(network, inputs, labels, eps=eps, dtype=torch.float64, direction="forward").margins_upper
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert any(used)


@pytest.mark.parametrize("step", [(2, 1), (3, 4), (1, 2)])
@pytest.mark.parametrize("offset", [(0, 0), (2, 1)])
@pytest.mark.parametrize("share", [None, 0.3, 0.0])
def test_windows_add_up_as_whole_images_do(
    step: tuple[int, int], offset: tuple[int, int], share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws, (channels, height, width), (tall, wide), grid = generator(8), (2, 9, 8), (4, 3), (3, 4)
    none = torch.zeros(0, dtype=torch.int64)
    at = Windows(none, none, none, (2, 3), step, offset, (tall, wide))
    counts = [[3, 0, 2, 1], [0, 0, 0, 0], [1, 2, 0, 4]]
    neurons = sum(map(sum, counts))
    coefficients = torch.randn(neurons, channels, tall, wide, generator=draws, dtype=torch.float64)
    weights = torch.randn(neurons, 5, generator=draws, dtype=torch.float64)
    kept = None if share is None else torch.rand(channels, height, width, generator=draws) < share
    whole = torch.zeros(neurons, channels, 30, 30, dtype=torch.float64)  # images with margins of 10
    places = [(row, column) for row in range(3) for column in range(4) for _ in range(counts[row][column])]
    for neuron, (row, column) in enumerate(places):
        top, left = 10 + row * step[0] - offset[0], 10 + column * step[1] - offset[1]
        whole[neuron, :, top : top + tall, left : left + wide] = coefficients[neuron]
    whole = whole[:, :, 10 : 10 + height, 10 : 10 + width] * (1 if kept is None else kept)
    expected = torch.einsum("nchw,no->ochw", whole, weights).abs().flatten(1).sum(1)
    memory = Memory()
    geometry = Geometry.of(at, (channels, height, width), grid, torch.device("cpu"))
    assert geometry.shape == (channels, height, width)
    for small in (0, 1 << 16):  # a canvas for each stretch, and one for all
        monkeypatch.setattr("certify.zonotope.canvas._SMALL", small)
        found = image_of(coefficients, geometry, counts, kept).spread(weights, memory)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("eps", [0.01, 0.1])
def test_skipping_the_interval_before_rows_changes_nothing(eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network.from_module(build(resolve("model", "cfat_mnist()"), (1, 28, 28), 10, generator(1)), (1, 28, 28))
    inputs, labels, rows = torch.rand(1, 1, 28, 28, generator=generator(2)), torch.tensor([3]), []
    found = []
    for crowded in (0, 10**9):  # never, and wherever anything is unstable
        monkeypatch.setattr("certify.zonotope.grids._CROWDED", crowded)
        result = check(network, inputs, labels, eps=eps, dtype=torch.float64)
        found.append(result.margins_upper)
        rows.append(result.rows)
        assert result.unstable.item() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
    assert rows[0] <= rows[1]
    assert rows[1] >= 1010  # all rows of the linear layer, and the classes


def test_stable_neurons_have_exact_lines() -> None:
    low = torch.tensor([0.0, 0.1, 1e-40, -3.0, -1e-40, 0.0, math.nan, -1.0])
    high = torch.tensor([0.3, 0.7, 1e-39, -0.1, 0.0, 0.0, 1.0, math.nan])
    lines = relax(low, high, "equal")
    assert lines.lower[:6].tolist() == [1, 1, 1, 0, 0, 0]
    assert lines.mu[:6].tolist() == [0] * 6
    assert lines.unstable.tolist() == [False] * 6 + [True] * 2
    assert lines.lower[6:].isnan().all()
    assert lines.mu[6:].isnan().all()


@pytest.mark.parametrize("name", ["cfat", "mlp", "residual", "max pool"])
def test_bounds_grow_with_eps(name: str) -> None:
    network, inputs, labels = example(name)
    for method in ("zonotope", "interval", "best"):
        before = torch.full((3, network.num_classes), -torch.inf, dtype=torch.float64)
        for eps in (0.0, 0.01, 0.05, 0.1, 0.3):
            found = check(network, inputs, labels, eps=eps, method=method).margins_upper  # type: ignore[arg-type]
            assert (found >= before - 1e-5).all()
            before = found


def test_renaming_classes_renames_bounds() -> None:
    network, inputs, labels = example("cfat")
    order = torch.tensor([2, 0, 1])
    tensors = dict(network.tensors())
    tensors["7.weight"], tensors["7.bias"] = tensors["7.weight"][order], tensors["7.bias"][order]
    renamed = order.argsort()[labels]
    found = check(network, inputs, labels, eps=0.1, dtype=torch.float64)
    other = check(network.with_tensors(tensors), inputs, renamed, eps=0.1, dtype=torch.float64)
    torch.testing.assert_close(other.margins_upper, found.margins_upper[:, order])
    assert torch.equal(other.certified, found.certified)


def test_best_is_the_least_and_crown_differs() -> None:
    network, inputs, labels = example("cfat", samples=6)
    each = {m: check(network, inputs, labels, eps=0.2, method=m).margins_upper for m in METHODS}  # type: ignore[arg-type]
    least = torch.stack([each[m] for m in METHODS[:3]]).amin(0)
    assert torch.equal(each["best"], least)
    assert not torch.allclose(each["crown"], each["zonotope"])


# Numbers by hand


def by_hand(*layers: tuple[list[list[float]], list[float]]) -> Network:
    """Return linear layers with ReLUs between them."""
    described, tensors = [], {}
    for number, (weight, bias) in enumerate(layers):
        if number:
            described.append({"kind": "relu"})
        described.append({"kind": "linear", "weight": f"{number}.w", "bias": f"{number}.b"})
        tensors[f"{number}.w"], tensors[f"{number}.b"] = torch.tensor(weight), torch.tensor(bias)
    return Network.from_parts(described, tensors, (len(layers[0][0][0]),))


def test_the_paper_s_toy() -> None:
    """Appendix A of "Certified Federated Adversarial Training": x5 - x6 is in [-0.25, 1.5]."""
    network = by_hand(([[2.0, 1.0], [1.0, -1.0]], [0.0, 0.0]), ([[1.0, 0.0], [0.0, 1.0]], [0.0, 0.0]))
    inputs, label = torch.tensor([[0.25, 0.25]]), torch.tensor([1])
    for direction in ("backward", "forward"):
        found = check(network, inputs, label, eps=0.25, direction=direction)  # type: ignore[arg-type]
        assert found.margins_upper[0, 0].item() == pytest.approx(1.5, rel=1e-5)
        other = check(network, inputs, 1 - label, eps=0.25, direction=direction)  # type: ignore[arg-type]
        assert other.margins_upper[0, 1].item() == pytest.approx(0.25, rel=1e-5)
        assert found.unstable.tolist() == [2]  # x3's lower end is exactly 0, and widened bounds cross it
    zonotope = forward_zonotope(
        build_graph(network.to(dtype=torch.float64)), input_box(inputs, 0.25, (0, 1), torch.float64)
    )
    torch.testing.assert_close(zonotope.center, torch.tensor([0.75, 0.125]), check_dtype=False)
    expected = torch.tensor([[0.5, 0.125], [0.25, -0.125], [0.0, 0.125]])
    torch.testing.assert_close(zonotope.generators[[0, 1, 3]], expected, check_dtype=False, rtol=1e-9, atol=1e-9)
    assert zonotope.generators[2].abs().max() < 1e-13
    boxes = check(network, inputs, label, eps=0.25, method="interval").margins_upper[0, 0]
    assert boxes.item() == pytest.approx(1.5)  # [0, 1.5] - [0, 0.5]; the paper's 1.75 keeps the zonotope's [-0.25, 0.5]


def test_an_upper_end_of_zero_is_no_identity() -> None:
    """h = relu([x, -x]), z = [10 h1 + 10 h2 - 0.5, 0] at x = 0: at 0.125 z0 = 0.75, so nothing is certified."""
    network = by_hand(([[1.0], [-1.0]], [0.0, 0.0]), ([[10.0, 10.0], [0.0, 0.0]], [-0.5, 0.0]))
    for method in METHODS:
        for dtype in (torch.float32, torch.float64):
            found = check(
                network, torch.zeros(1, 1), torch.tensor([1]), eps=0.125, method=method, dtype=dtype  # type: ignore[arg-type]
            )  # fmt: skip
            assert found.margins_upper[0, 0] >= 0.75 - 1e-12
            assert not found.certified.any()
            assert found.clean_margin.item() == 0.5
    lines = relax(torch.tensor([-1.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, 0.0]), "equal")
    assert lines.lower.tolist() == [0, 0.5, 0]
    assert lines.mu.tolist() == [0, 0.25, 0]


def test_clipping_moves_the_centre() -> None:
    box = input_box(torch.tensor([[0.1, 0.5, 1.0]]), 0.25, (0.0, 1.0), torch.float64)
    torch.testing.assert_close(box.center, torch.tensor([[0.175, 0.5, 0.875]]).double())
    torch.testing.assert_close(box.radius, torch.tensor([[0.175, 0.25, 0.125]]).double())
    network = by_hand(
        ([[0.0], [-1.0]], [0.0, 0.0]),
    )
    found = check(network, torch.tensor([[0.1]]), torch.tensor([0]), eps=0.25)
    assert found.margins_upper[0, 1].item() == pytest.approx(0, abs=1e-7)  # -x is at most 0, not 0.15
    wider = check(network, torch.tensor([[0.1]]), torch.tensor([0]), eps=0.25, input_range=(-1.0, 1.0))
    assert wider.margins_upper[0, 1].item() == pytest.approx(0.15, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.floats(0, 1, width=32), st.floats(0, 2), st.sampled_from([torch.float32, torch.float64]))
def test_the_box_is_rounded_outwards(value: float, eps: float, dtype: torch.dtype) -> None:
    from fractions import Fraction

    box = input_box(torch.tensor([[value]]), eps, (0.0, 1.0), dtype)
    center, radius = Fraction(box.center.item()), Fraction(box.radius.item())
    assert center - radius <= max(Fraction(0), Fraction(value) - Fraction(eps))
    assert center + radius >= min(Fraction(1), Fraction(value) + Fraction(eps))


@settings(max_examples=300, deadline=None)
@given(
    st.floats(-1e6, 1e6), st.floats(0, 1e6), st.floats(0, 1), st.sampled_from(["equal", "adaptive"]),
    st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
def test_lines_enclose_the_relu(low: float, width: float, share: float, slopes: str, dtype: torch.dtype) -> None:
    ends = torch.tensor([low, low + width], dtype=dtype)
    lines = relax(ends[:1], ends[1:], slopes)  # type: ignore[arg-type]
    point = (ends[0] + share * (ends[1] - ends[0])).double().clamp(*ends.double().tolist())
    value = point.clamp(min=0)
    slack = 4 * torch.finfo(dtype).eps * ends.abs().max().double()  # of mu, which is rounded to nearest
    assert lines.lower[0].double() * point <= value + slack
    assert lines.upper[0].double() * point + 2 * lines.mu[0].double() >= value - slack


def exact_maximum(
    weights: list[tuple[np.ndarray, np.ndarray]], row: np.ndarray, low: np.ndarray, high: np.ndarray
) -> float:
    """Return the maximum of row . z over the box for z = W2 relu(W1 x + b1) + b2: one LP per activation pattern."""
    (first, bias), (second, offset) = weights
    best = -math.inf
    for pattern in itertools.product([0.0, 1.0], repeat=len(bias)):
        active = np.array(pattern)
        objective = row @ (second * active) @ first
        sign = 1 - 2 * active  # active: -(w x + b) <= 0, inactive: w x + b <= 0
        solved = linprog(-objective, sign[:, None] * first, -sign * bias, bounds=list(zip(low, high, strict=True)))
        if solved.status == 0:
            best = max(best, -solved.fun + row @ (second * active) @ bias + row @ offset)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_never_below_the_exact_maximum(seed: int) -> None:
    module = draw(block(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)), seed).double()
    network = Network.from_module(module, (3,))
    inputs, label = torch.rand(1, 3, generator=generator(seed), dtype=torch.float64), torch.tensor([seed % 3])
    weights = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in (module[0], module[2])]  # type: ignore[index]
    for eps in (0.001, 0.1, 0.5):
        low, high = (inputs[0] - eps).clamp(min=0).numpy(), (inputs[0] + eps).clamp(max=1).numpy()
        for method in METHODS:
            found = check(network, inputs, label, eps=eps, method=method, dtype=torch.float64)  # type: ignore[arg-type]
            for other in {0, 1, 2} - {seed % 3}:
                row = np.eye(3)[other] - np.eye(3)[seed % 3]
                exact = exact_maximum(weights, row, low, high)
                assert found.margins_upper[0, other].item() >= exact - 1e-9
                if found.unstable[0] == 0 and method in ("zonotope", "crown"):
                    assert found.margins_upper[0, other].item() == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("name", ["cfat", "residual", "batch norm", "max pool", "average pool"])
@pytest.mark.parametrize("method", METHODS)
def test_differentiable_bounds_are_the_bounds(name: str, method: str) -> None:
    network, inputs, labels = example(name)
    network = network.to(dtype=torch.float64)
    vector = network.vector().clone().requires_grad_()

    def bound(values: Tensor) -> Tensor:
        return margin_bounds(network.with_vector(values), inputs, labels, 0.1, method=method)  # type: ignore[arg-type]

    found = bound(vector)
    expected = check(network, inputs, labels, eps=0.1, method=method, dtype=torch.float64).margins_upper  # type: ignore[arg-type]
    other = expected > -torch.inf
    torch.testing.assert_close(found[other], expected[other], rtol=1e-10, atol=1e-10)
    assert (found[~other] == 0).all()
    (slope,) = torch.autograd.grad(found.sum(), vector)
    direction = torch.randn(vector.shape, generator=generator(4), dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        change = (bound(vector + step * direction).sum() - bound(vector - step * direction).sum()) / (2 * step)
    assert torch.dot(slope, direction).item() == pytest.approx(change.item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 3), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(stride: tuple[int, int], dtype: torch.dtype, groups: int) -> None:
    draws = generator(2)
    for kernel, padding, dilation, size in (
        ((4, 4), (0, 0), (1, 1), 9),
        ((3, 2), (1, 2), (1, 1), 8),
        ((2, 3), (0, 1), (2, 1), 7),
    ):
        weight = torch.randn(4, 4 // groups, *kernel, generator=draws, dtype=dtype)
        conv = Conv(weight, None, stride, padding, dilation, groups, (4, size, size))
        inputs = torch.randn(3, 4, size, size, generator=draws, dtype=dtype, requires_grad=True)
        output = conv.values(inputs)
        rows = torch.randn(output.shape, generator=draws, dtype=dtype)
        (expected,) = torch.autograd.grad(output, inputs, rows)
        torch.testing.assert_close(conv.transposed(rows), expected, rtol=1e-4, atol=1e-5)


def test_windows_go_back_through_a_convolution_as_a_dense_matrix() -> None:
    draws = generator(5)
    conv = Conv(torch.randn(3, 2, 4, 4, generator=draws), None, (2, 2), (0, 0), (1, 1), 1, (2, 20, 20))
    rows = torch.randn(60, 3, 4, 4, generator=draws)
    expected = conv.transposed_full(rows)[..., :10, :10]
    torch.testing.assert_close(conv.transposed_windows(rows, (10, 10)), expected, rtol=1e-4, atol=1e-5)
    assert list(conv._window_maps) == [(3, 4, 4)]  # it was used
    torch.testing.assert_close(conv.transposed_windows(rows[:2], (10, 10)), expected[:2], rtol=1e-4, atol=1e-5)


def test_models_of_the_product_are_followed() -> None:
    for spec, shape, eps in (("small_cnn()", (1, 28, 28), 0.002), ("cfat_mnist()", (1, 28, 28), 0.02)):
        network = Network.from_module(build(resolve("model", spec), shape, 10, generator(1, spec)), shape)
        inputs = torch.rand(1, *shape, generator=generator(2))
        labels = network.forward(inputs).argmax(1)
        found = {m: check(network, inputs, labels, eps=eps, method=m) for m in METHODS}  # type: ignore[arg-type]
        forward = check(network, inputs, labels, eps=eps, direction="forward")
        torch.testing.assert_close(found["zonotope"].margins_upper, forward.margins_upper, rtol=1e-4, atol=1e-4)
        assert (found["best"].margins_upper <= found["interval"].margins_upper).all()
