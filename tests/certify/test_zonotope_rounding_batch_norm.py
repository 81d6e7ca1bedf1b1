"""Batch normalisation whose statistics cancel: bounds against exact arithmetic of 80 digits, and what a map sums up."""

import itertools
from decimal import Decimal, localcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from certify.layers import Layer
from certify.network import Network
from certify.zonotope import check
from certify.zonotope.graph import Node, build_graph
from certify.zonotope.ops import Conv
from certify.zonotope.relaxation import input_box
from certify.zonotope.robustness import Method, _Run
from certify.zonotope.rounding import _terms
from tasks.rng import generator

METHODS = get_args(Method)
DTYPES = (torch.float32, torch.float64)
EPS = 1e-5  # of a batch normalisation, as stored: no decimal number


def exact(layers: tuple[Layer, ...], tensors: dict[str, Tensor], values: list[Decimal]) -> list[Decimal]:
    """Return what the layers make of one flat input (images have one pixel) in the current decimal context."""

    def numbers(layer: Layer, role: str, otherwise: float) -> list[Decimal]:
        tensor = layer.tensor(tensors, role)
        chosen = [otherwise] * layer.output_shape[0] if tensor is None else tensor.tolist()
        return [Decimal(number) for number in chosen]

    for layer in layers:
        if layer.kind in ("linear", "conv2d"):
            weight = tensors[layer.names["weight"]].flatten(1).tolist()
            products = [sum(Decimal(w) * v for w, v in zip(row, values, strict=True)) for row in weight]
            values = [p + b for p, b in zip(products, numbers(layer, "bias", 0.0), strict=True)]
        elif layer.kind == "batch_norm":
            roles = (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 0.0))
            each = zip(values, *(numbers(layer, role, otherwise) for role, otherwise in roles), strict=True)
            eps = Decimal(layer.options["eps"])
            values = [(v - mean) * weight / (var + eps).sqrt() + bias for v, weight, bias, mean, var in each]
        elif layer.kind == "normalise":
            each = zip(values, layer.options["mean"], layer.options["std"], strict=True)
            values = [(v - Decimal(mean)) / Decimal(std) for v, mean, std in each]
        elif layer.kind == "relu":
            values = [max(v, Decimal(0)) for v in values]
        elif layer.kind == "residual":
            branches = (exact(layer.body, tensors, values), exact(layer.shortcut, tensors, values))
            values = [a + b for a, b in zip(*branches, strict=True)]
        else:
            assert layer.kind == "flatten"
    return values


def norm(name: str, **options: Any) -> dict[str, Any]:
    roles = {"weight": "g", "bias": "h", "running_mean": "m", "running_var": "v"}
    return {"kind": "batch_norm", **{role: f"{name}.{short}" for role, short in roles.items()}, **options}


def cancelling(mean: float, var: float, bias: float, dtype: torch.dtype) -> Network:
    """z0 = (-10 x - mean) / sqrt(var + eps) + bias, z1 = 0."""
    named = {"w": [[-10.0], [0.0]], "n.g": [1.0, 1.0], "n.h": [bias, 0.0], "n.m": [mean, 0.0], "n.v": [var, 1.0]}
    tensors = {name: torch.tensor(numbers, dtype=dtype) for name, numbers in named.items()}
    return Network.from_parts([{"kind": "linear", "weight": "w"}, norm("n")], tensors, (1,))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_shift_that_cancels_is_not_certified_over_a_sign_change(method: Method, dtype: torch.dtype) -> None:
    """z0 - z1 is 0.078 at x = 0.5 and -0.882 at x = 1, behind a mean of 1e9; float64 tells it, float32 is 15 off."""
    network = cancelling(1183000064.0, 27.142857142857142, 227068512.0, torch.float32)
    inputs, labels = torch.tensor([[0.5]]), torch.tensor([0])
    assert not check(network, inputs, labels, eps=0.5, method=method, dtype=dtype).certified[0]
    assert check(network, inputs, labels, eps=0.01, method=method, dtype=dtype).certified[0]


@pytest.mark.parametrize("method", METHODS)
def test_float64_does_not_certify_what_only_more_digits_tell(method: Method) -> None:
    wrong = 0
    for k in range(1, 60):
        mean, var = 1e18 * (1 + k * 1e-3), 1 + k / 7
        with localcontext(prec=80):
            root = (Decimal(var) + Decimal(EPS)).sqrt()
            bias = float(Decimal(mean) / root)
            margins = [(Decimal(-10) * x - Decimal(mean)) / root + Decimal(bias) for x in (Decimal("0.5"), Decimal(1))]
        network = cancelling(mean, var, bias, torch.float64)
        assert not check(network, torch.tensor([[0.5]]), torch.tensor([0]), eps=0.5, method=method).certified[0]
        wrong += margins[0] > 0 > margins[1]
    assert wrong > 0


KINDS = ("linear", "conv", "bias", "alone", "twice", "normalise", "residual", "bare", "hidden")


def randomised(kind: str, seed: int, dtype: torch.dtype) -> Network:
    """A network of 2 inputs and 2 logits whose means, scaled, and biases are large and all but cancel."""
    draws = generator(seed, kind)
    large = 10 ** float(torch.rand((), generator=draws) * (9 if dtype == torch.float32 else 18))
    tensors: dict[str, Tensor] = {}

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws, dtype=torch.float64)

    def statistics(name: str, before: Tensor | float = 0.0) -> dict[str, Any]:
        """Return a layer whose shift cancels, also with the bias of the layer before."""
        weight, var = normal(2), normal(2).abs() * 10 ** normal(2)
        mean = large * normal(2)
        tensors[f"{name}.g"], tensors[f"{name}.m"], tensors[f"{name}.v"] = weight, mean, var
        tensors[f"{name}.h"] = (mean - before) * weight / (var + EPS).sqrt() + normal(2)
        return norm(name)

    tensors["w"], linear = 3 * normal(2, 2), {"kind": "linear", "weight": "w"}
    shape: tuple[int, ...] = (2,)
    if kind == "conv":
        tensors["w"], shape = tensors["w"][:, :, None, None], (2, 1, 1)
        layers = [{"kind": "conv2d", "weight": "w"}, statistics("n"), {"kind": "flatten"}]
    elif kind == "bias":
        tensors["b"] = large * normal(2)
        layers = [linear | {"bias": "b"}, statistics("n", tensors["b"])]
    elif kind == "alone":
        del tensors["w"]
        layers = [statistics("n")]
    elif kind == "twice":
        layers = [linear, statistics("n"), statistics("o"), statistics("p")]
    elif kind == "normalise":
        mean, std = (large * normal(2)).tolist(), (normal(2).abs() + 0.01).tolist()
        tensors["b"] = tensors["w"] @ (torch.tensor(mean) / torch.tensor(std)).double()
        layers = [{"kind": "normalise", "mean": mean, "std": std}, linear | {"bias": "b"}]
    elif kind == "residual":
        layers = [{"kind": "residual", "body": [linear, statistics("n")], "shortcut": [statistics("o")]}]
    elif kind == "bare":
        tensors["b"] = large * normal(2)
        tensors["n.m"], tensors["n.v"] = tensors["b"] + normal(2), normal(2).abs()
        bare = {key: value for key, value in norm("n").items() if key not in ("weight", "bias")}
        layers = [linear | {"bias": "b"}, bare]
    else:
        layers = [linear, statistics("n")]
    if kind == "hidden":
        tensors["x"] = normal(2, 2)
        layers += [{"kind": "relu"}, {"kind": "linear", "weight": "x"}, statistics("o")]
    return Network.from_parts(layers, {name: tensor.to(dtype) for name, tensor in tensors.items()}, shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), (torch.float64, torch.float32)],
)
def test_bounds_and_their_error_contain_exact_values(kind: str, stored: torch.dtype, dtype: torch.dtype) -> None:
    """Every method's bound plus its rounding error is at least the exact margin at the corners of the ball."""
    for seed in range(12):
        network = randomised(kind, seed, stored)
        center = torch.tensor([[0.5, 0.25]]).view(1, *network.input_shape)
        with localcontext(prec=80):
            corners = [
                exact(network.layers, network.tensors(), [Decimal("0.5") + a, Decimal("0.25") + b])
                for a, b in itertools.product((Decimal("-0.25"), Decimal("0.25")), repeat=2)
            ]
            true = max(second - first for first, second in corners)
        for method in METHODS:
            for direction in ("backward", "forward") if method == "zonotope" else ("backward",):
                run = _Run(network, 0.25, method, (0.0, 1.0), direction, None, None)
                with torch.inference_mode():
                    cast = network.to("cpu", dtype)
                    box = input_box(center, 0.25, (0.0, 1.0), dtype)
                    margins, _, error, _, _ = run.bounds(build_graph(cast), cast, box, torch.tensor([0]))
                upper = Decimal(margins[0, 1].item()) + Decimal(error[0, 1].item())
                assert upper >= true, (seed, method, float(true), float(upper))


def test_the_error_of_ordinary_statistics_is_small() -> None:
    for kind, seed in itertools.product(KINDS, range(5)):
        network = randomised(kind, seed, torch.float64)
        tame = {n: t.clamp(-3, 3) if n[-1] in "mhb" else t.clamp(min=0.3) for n, t in network.tensors().items()}
        if kind == "normalise":
            continue  # its means are not among the tensors
        network = network.with_tensors(tame).to(dtype=torch.float32)
        run = _Run(network, 0.25, "zonotope", (0.0, 1.0), "backward", None, None)
        with torch.inference_mode():
            box = input_box(torch.full((1, *network.input_shape), 0.5), 0.25, (0.0, 1.0), torch.float32)
            margins, _, error, _, _ = run.bounds(build_graph(network), network, box, torch.tensor([0]))
        assert float(error[0, 1]) < 2e-3 * (1 + float(margins.abs().max()))


@pytest.mark.parametrize("method", METHODS)
def test_a_variance_that_underflows_is_not_trusted_in_float32(method: Method) -> None:
    """eps = 2.2e-45 is 2.8e-45 in float32: a scale of 189 instead of 213, with which class 0 would be certain."""
    named = {"w": [[-1.0], [0.0]], "n.g": [1e-20, 1.0], "n.h": [20.0, 0.0], "n.m": [0.0, 0.0], "n.v": [0.0, 1.0]}
    tensors = {name: torch.tensor(numbers) for name, numbers in named.items()}
    network = Network.from_parts([{"kind": "linear", "weight": "w"}, norm("n", eps=2.2e-45)], tensors, (1,))
    for eps, certain in ((0.1, False), (0.09, True)):
        found = check(network, torch.zeros(1, 1), torch.tensor([0]), eps=eps, method=method)
        assert bool(found.certified[0]) == certain


@pytest.mark.parametrize("method", METHODS)
def test_a_scale_that_underflows_hides_nothing(method: Method) -> None:
    """z0 = 5 - 10 x, of a weight 1e38, a scale 1e-46 that is 0 in float32, and a weight 1e9."""
    named = {
        "w": [[-1e38], [0.0]], "n.g": [1e-46, 1.0], "n.h": [0.0, 0.0], "n.m": [0.0, 0.0], "n.v": [1.0, 1.0],
        "x": [[1e9, 0.0], [0.0, 0.0]], "b": [5.0, 0.0],
    }  # fmt: skip
    tensors = {name: torch.tensor(numbers, dtype=torch.float64) for name, numbers in named.items()}
    layers = [{"kind": "linear", "weight": "w"}, norm("n"), {"kind": "linear", "weight": "x", "bias": "b"}]
    network = Network.from_parts(layers, tensors, (1,))
    assert not check(network, torch.tensor([[0.2]]), torch.tensor([0]), eps=0.5, method=method).certified[0]


@pytest.mark.parametrize("method", METHODS)
def test_normalisations_that_share_names_stay_apart(method: Method) -> None:
    """One weight with two normalisations of the same statistics, and a tensor named as if it were folded."""
    one, two = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2)
    tensors = {"w": one, "mean": torch.zeros(2), "v": two, "g": 5 * two, "h": -3 * two, "w/meanfolded": one.flip(0)}
    shared = {"kind": "batch_norm", "running_mean": "mean", "running_var": "v"}
    layers = [
        {"kind": "linear", "weight": "w"}, shared | {"weight": "g"}, {"kind": "linear", "weight": "w"},
        shared | {"weight": "h"}, {"kind": "linear", "weight": "w/meanfolded"},
    ]  # fmt: skip
    network = Network.from_parts(layers, tensors, (2,))
    inputs = torch.tensor([[0.7, 0.2]])
    logits = network.forward(inputs)[0]
    for label in (0, 1):
        found = check(network, inputs, torch.tensor([label]), eps=1e-4, method=method)
        assert bool(found.certified[0]) == (int(logits.argmax()) == label)
        margin = float(logits[1 - label] - logits[label])
        assert margin <= float(found.margins_upper[0, 1 - label]) + float(found.tolerance[0]) <= margin + 0.02


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (2, 3), (4, 6)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (3, 2), (4, 3)])
@pytest.mark.parametrize("kernel", [(3, 3), (1, 4), (5, 2)])
def test_terms_are_the_products_that_are_added_up(
    stride: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, int]
) -> None:
    for groups, padding in itertools.product((1, 2), (0, 1)):
        weight = torch.ones(8, 4 // groups, *kernel)
        size = tuple(s * 20 + d * (k - 1) + 1 for s, d, k in zip(stride, dilation, kernel, strict=True))
        conv = Conv(weight, None, stride, (padding, padding), dilation, groups, (4, *size))
        forwards = conv.generators(torch.ones(1, 4, *size))
        backwards = conv.transposed(torch.ones_like(forwards))
        most = max(float(forwards.max()), float(backwards.max()))
        assert _terms(conv, Node("linear", tuple(forwards.shape[1:]))) == most + 2
