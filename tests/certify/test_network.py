"""A network as data: the same function as the module, a stable hash, and no trust in what comes from outside."""

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from certify.network import Network
from certify.zonotope.graph import Graph, build_graph
from tasks.errors import CertificationError
from tasks.model import build
from tasks.params import Layout, model_vector
from tasks.rng import generator
from tasks.spec import resolve

MODELS = [
    ("cfat_mnist()", (1, 28, 28)),
    ("cfat_mnist(padding=1, mean=(0.1307,), std=(0.3081,))", (1, 28, 28)),
    ("cfat_cifar()", (3, 32, 32)),
    ("vgg9()", (3, 32, 32)),
    ("mnist_net()", (1, 28, 28)),
    ("logistic_regression()", (91,)),
    ("logistic_regression(bias=False)", (1, 28, 28)),
    ("small_cnn()", (1, 28, 28)),
    ("edge_lenet()", (1, 28, 28)),
    ("resnet18_half()", (3, 32, 32)),
]


def random_statistics(module: nn.Module, seed: int) -> None:
    """Give batch normalisation running statistics that are not 0 and 1."""
    draws = generator(seed, "statistics")
    for part in module.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            assert part.running_mean is not None
            assert part.running_var is not None
            part.running_mean.normal_(0, 0.3, generator=draws)
            part.running_var.uniform_(0.3, 2, generator=draws)
            if part.affine:
                part.weight.data.uniform_(-1.5, 1.5, generator=draws)
                part.bias.data.normal_(generator=draws)


def follow(graph: Graph, inputs: Tensor) -> Tensor:
    """Return the last node's values, normalisations folded."""
    values = [inputs]
    for node in graph.nodes[1:]:
        before = [values[parent] for parent in node.parents]
        if node.map is not None:
            values.append(node.map.values(before[0]))
        else:
            values.append(before[0].relu() if node.kind == "relu" else before[0] + before[1])
    return values[-1]


@pytest.mark.parametrize(("spec", "shape"), MODELS)
def test_every_model_is_the_same_function(spec: str, shape: tuple[int, ...]) -> None:
    module = build(resolve("model", spec), shape, 10, generator(1, spec))
    random_statistics(module, 2)
    network = Network.from_module(module, shape)
    inputs = torch.rand(3, *shape, generator=generator(3))
    with torch.no_grad():
        expected = module.eval()(inputs)
        torch.testing.assert_close(network.forward(inputs), expected, rtol=1e-5, atol=1e-5)
        folded = follow(build_graph(network.to(dtype=torch.float64)), inputs.double())
        torch.testing.assert_close(folded, network.forward(inputs, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert network.num_classes == 10
    assert network.parameter_layout() == Layout.of(module)
    assert torch.equal(network.vector(), model_vector(module))


def test_architecture_survives_json_and_keeps_the_hash() -> None:
    module = build(resolve("model", "resnet18_half()"), (3, 32, 32), 10, generator(1))
    network = Network.from_module(module, (3, 32, 32))
    text = json.dumps(network.architecture(), allow_nan=False)
    again = Network.from_parts(json.loads(text), network.tensors(), [3, 32, 32])
    assert again.sha256() == network.sha256() == network.to(dtype=torch.float64).sha256()
    assert again.architecture() == network.architecture()


def test_hash_sees_every_part() -> None:
    network = Network.from_module(nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2)), (3,))
    other = network.vector().clone()
    other[0] = torch.nextafter(other[0], other[0] + 1)
    assert network.with_vector(other).sha256() != network.sha256()
    fewer = [layer for layer in network.architecture() if layer["kind"] != "relu"]
    assert Network.from_parts(fewer, network.tensors(), (3,)).sha256() != network.sha256()


def test_order_of_tensors_does_not_matter() -> None:
    network = Network.from_module(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), (3,))
    shuffled = dict(reversed(network.tensors().items()))
    again = Network.from_parts(network.architecture(), shuffled, (3,))
    assert list(again.tensors()) == list(network.tensors())
    assert again.sha256() == network.sha256()


def test_with_vector_is_differentiable_and_maps_every_number() -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 2))
    random_statistics(module, 1)
    network = Network.from_module(module, (1, 4, 4))
    vector = network.vector().detach().requires_grad_()
    network.with_vector(vector).forward(torch.rand(2, 1, 4, 4, generator=generator(1))).square().sum().backward()
    assert vector.grad is not None
    assert (vector.grad[-4:] != 0).any()  # the running statistics come last
    noisy = network.with_vector(network.vector() + 1)
    assert all(torch.allclose(noisy.tensors()[name], tensor + 1) for name, tensor in network.tensors().items())
    with pytest.raises(CertificationError, match="must have shape"):
        network.with_vector(torch.zeros(3))


def test_own_tensors_carry_gradients_to_the_module() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    Network.from_module(module, (3,), copy=False).forward(torch.ones(1, 3)).sum().backward()
    assert module[0].weight.grad is not None
    copied = Network.from_module(module, (3,))
    assert not copied.tensors()["0.weight"].requires_grad


def test_shared_layers_come_once() -> None:
    shared = nn.Linear(3, 3)
    network = Network.from_module(nn.Sequential(shared, nn.ReLU(), shared), (3,))
    assert network.num_params == 12


@pytest.mark.parametrize(
    ("module", "shape", "text"),
    [
        (nn.Sequential(nn.Linear(3, 3), nn.Sigmoid()), (3,), r"1 is a Sigmoid.*supported: .*Conv2d"),
        (nn.Sequential(nn.Conv2d(1, 2, 3, padding_mode="circular"), nn.Flatten()), (1, 4, 4), "pad with zeros"),
        (nn.Sequential(nn.Conv2d(1, 2, 2, padding="same"), nn.Flatten()), (1, 4, 4), "even kernel"),
        (nn.Sequential(nn.MaxPool2d(2, ceil_mode=True), nn.Flatten()), (1, 5, 5), "plain"),
        (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten()), (1, 4, 4), "running statistics"),
        (nn.Sequential(nn.Linear(3, 1)), (3,), "at least 2 logits"),
        (nn.Sequential(nn.Conv2d(1, 2, 3)), (1, 4, 4), "at least 2 logits"),
        (nn.Sequential(nn.Linear(4, 2)), (1, 2, 2), "flatten"),
        (nn.Sequential(nn.Conv2d(1, 2, 5), nn.Flatten()), (1, 4, 4), "too small"),
        (nn.Sequential(nn.Linear(3, 2)), (4,), r"\(outputs, 4\)"),
    ],
)
def test_unsupported_modules_are_named(module: nn.Module, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(CertificationError, match=text):
        Network.from_module(module, shape)


def test_hooks_and_subclasses_are_refused() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    with pytest.raises(CertificationError, match="Doubling"):
        Network.from_module(nn.Sequential(Doubling(3, 2)), (3,))
    hooked = nn.Sequential(nn.Linear(3, 2))
    hooked[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    with pytest.raises(CertificationError, match="hooks"):
        Network.from_module(hooked, (3,))


LINEAR = {"kind": "linear", "weight": "w", "bias": "b"}
TENSORS = {"w": torch.ones(2, 3), "b": torch.zeros(2)}


@pytest.mark.parametrize(
    ("architecture", "tensors", "shape", "text"),
    [
        ([{"kind": "exec"}], {}, (3,), "unknown kind 'exec'"),
        ([{}], {}, (3,), "unknown kind"),
        ("linear", {}, (3,), "list of layers"),
        ([["linear"]], {}, (3,), "a layer is a dict"),
        ([LINEAR], {"w": torch.ones(2, 3)}, (3,), "must name a tensor"),
        ([LINEAR], {**TENSORS, "x": torch.ones(1)}, (3,), "no layer uses: x"),
        ([LINEAR], {**TENSORS, "b": torch.zeros(3)}, (3,), "must have shape"),
        ([LINEAR], {**TENSORS, "w": torch.full((2, 3), torch.nan)}, (3,), "NaN or infinity"),
        ([LINEAR], {**TENSORS, "w": torch.ones(2, 3, dtype=torch.int64)}, (3,), "floating-point"),
        ([LINEAR], {**TENSORS, "w": [[1.0] * 3] * 2}, (3,), "floating-point"),
        ([LINEAR], {**TENSORS, "w": torch.ones(2, 3).to_sparse()}, (3,), "dense"),
        ([LINEAR], [torch.ones(2, 3)], (3,), "mapping"),
        ([LINEAR], TENSORS, (-3,), "input_shape"),
        ([LINEAR], TENSORS, (2**40, 2**40), "input_shape"),
        ([LINEAR], TENSORS, "3", "input_shape"),
        ([{**LINEAR, "code": "1"}], TENSORS, (3,), "unknown entries code"),
        ([], {}, (3, 2, 2), "at least 2 logits"),
        ([{"kind": "relu"}] * 3000, {}, (3,), "2000 layers"),
        ([{"kind": "normalise", "mean": [0.0], "std": [0.0]}], {}, (1,), "above 0"),
        ([{"kind": "normalise", "mean": [float("nan")], "std": [1.0]}], {}, (1,), "finite"),
        ([{"kind": "max_pool2d", "kernel": [0, 1]}], {}, (1, 4, 4), "whole numbers from 1"),
        ([{"kind": "max_pool2d", "kernel": 2, "stride": 10**30}], {}, (1, 4, 4), "whole numbers"),
        ([{"kind": "avg_pool2d", "kernel": 2, "padding": 2}], {}, (1, 4, 4), "half the kernel"),
        ([{"kind": "adaptive_avg_pool2d", "output": 3}], {}, (1, 4, 4), "divide"),
        ([{"kind": "residual", "body": [{"kind": "flatten"}], "shortcut": []}], {}, (1, 4, 4), "one shape"),
        ([{"kind": "residual", "body": None, "shortcut": []}], {}, (1, 4, 4), "list of layers"),
    ],
)
def test_foreign_parts_are_checked(architecture: Any, tensors: Any, shape: Any, text: str) -> None:
    with pytest.raises(CertificationError, match=text):
        Network.from_parts(architecture, tensors, shape)


def test_absurd_sizes_are_refused_before_memory_is_taken() -> None:
    conv = {"kind": "conv2d", "weight": "w", "bias": None, "padding": 2**19}
    with pytest.raises(CertificationError, match=r"multiplications|numbers"):
        Network.from_parts([conv], {"w": torch.ones(64, 1, 3, 3)}, (1, 4, 4))
    nested: dict[str, Any] = {"kind": "relu"}
    for _ in range(40):
        nested = {"kind": "residual", "body": [nested], "shortcut": []}
    with pytest.raises(CertificationError, match="deep"):
        Network.from_parts([nested], {}, (3,))
    statistics = {name: torch.ones(2) for name in ("m", "v")}
    norm = {"kind": "batch_norm", "running_mean": "m", "running_var": "v"}
    with pytest.raises(CertificationError, match="variances"):
        Network.from_parts([norm], {**statistics, "v": -torch.ones(2)}, (2,))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["w", "b"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
KEYS = "kind weight bias stride padding dilation groups kernel output mean std eps body shortcut scale"
KINDS = "linear conv2d relu flatten avg_pool2d max_pool2d adaptive_avg_pool2d normalise batch_norm residual affine"
layer_like = st.builds(
    lambda kind, rest: {**rest, "kind": kind},
    st.sampled_from(KINDS.split()),
    st.dictionaries(st.sampled_from(KEYS.split()), json_values),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(layer_like, max_size=3) | json_values)
def test_nothing_foreign_crashes(architecture: Any) -> None:
    tensors = {"w": torch.ones(2, 2), "b": torch.ones(2)}
    try:
        network = Network.from_parts(architecture, tensors, (2, 4, 4))
    except CertificationError:
        return
    assert network.forward(torch.ones(1, 2, 4, 4)).shape[0] == 1


def test_a_conv_with_everything_matches_pytorch() -> None:
    draws = generator(5)
    conv = nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=2, bias=False)
    pools = (nn.AvgPool2d(2, 1, 1), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1))
    module = nn.Sequential(
        conv, nn.BatchNorm2d(6, affine=False), nn.ReLU(), *pools, nn.Flatten(), nn.Dropout(0.5)
    ).eval()
    random_statistics(module, 6)
    inputs = torch.randn(2, 4, 9, 8, generator=draws)
    network = Network.from_module(module, (4, 9, 8))
    torch.testing.assert_close(network.forward(inputs), module(inputs))
    torch.testing.assert_close(follow(build_graph(network), inputs), module(inputs), rtol=1e-4, atol=1e-5)


ONE: dict[str, Any] = {"w": torch.ones(1, 1, 1, 1), "v": torch.ones(2, 1)}


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        (  # 3 parameters and one pixel, 67 million numbers in between
            [{"kind": "conv2d", "weight": "w", "padding": 4095}, {"kind": "avg_pool2d", "kernel": 4096}],
            "a padded image may have",
        ),
        ([{"kind": "conv2d", "weight": "w", "padding": 2000, "stride": 4000}], "a padded image may have"),
        ([{"kind": "conv2d", "weight": "w", "padding": 900}] * 3, "a padded image may have"),
        ([{"kind": "conv2d", "weight": "w", "padding": 1000}] + [{"kind": "relu"}] * 50, "all outputs together"),
        ([{"kind": "conv2d", "weight": "w", "padding": 4097}], "whole numbers from 0 to 4096"),
        (
            [
                {"kind": "conv2d", "weight": "w", "padding": 900},
                {"kind": "avg_pool2d", "kernel": 701, "stride": 1},
            ],
            "multiplications per sample",
        ),
    ],
)
def test_a_few_parameters_cannot_ask_for_much_memory_or_work(layers: Any, text: str) -> None:
    with pytest.raises(CertificationError, match=text):
        Network.from_parts([*layers, {"kind": "flatten"}, {"kind": "linear", "weight": "v"}], ONE, (1, 1, 1))


def test_what_a_network_takes_is_counted() -> None:
    module = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    network = Network.from_module(module, (1, 4, 4))
    assert network.operations == 64 * 9 + 64 + 64 + 3 * 64
    assert network.widest == 64
    assert network.num_kept == 16 + 64 + 64 + 64 + 3


@pytest.mark.parametrize("number", [10**400, -(10**400), 10**5000], ids=["long", "negative", "too long to print"])
def test_integers_that_no_float_holds_are_refused(number: int) -> None:
    for layer, text in (
        ({"kind": "normalise", "mean": [number], "std": [1.0]}, "finite numbers"),
        ({"kind": "avg_pool2d", "kernel": number}, "whole numbers"),
        ({"kind": number}, "unknown kind"),
    ):
        with pytest.raises(CertificationError, match=text):
            Network.from_parts([layer], {}, (1, 1, 1))
