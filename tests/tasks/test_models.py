"""Models: the papers' sizes, initialisation from a generator alone, dropout, and a released model's accuracy."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tasks.dataset import Dataset
from tasks.errors import ConfigError, HawthornError
from tasks.model import build, initialise, set_dropout_generator
from tasks.models._layers import Normalise, SeededDropout
from tasks.params import Layout, model_vector
from tasks.rng import generator
from tasks.source import DataSource
from tasks.spec import names, resolve

GREY, COLOUR = (1, 28, 28), (3, 32, 32)
SIZES = [
    ("logistic_regression", GREY, 7_850),
    ("mnist_net", GREY, 431_080),
    ("cfat_mnist", GREY, 16 * 17 + 32 * (16 * 16 + 1) + 1000 * (800 + 1) + 10 * 1001),
    ("cfat_mnist(padding=1)", GREY, 16 * 17 + 32 * (16 * 16 + 1) + 1000 * (1568 + 1) + 10 * 1001),
    ("cfat_cifar", COLOUR, 896 + 32_832 + 36_928 + 131_200 + 512 * (3200 + 1) + 512 * 513 + 5_130),
    ("cfat_cifar(padding=1)", COLOUR, 896 + 32_832 + 36_928 + 131_200 + 512 * (8192 + 1) + 512 * 513 + 5_130),
    ("edge_lenet", GREY, 1_199_882),
    ("vgg9", COLOUR, 9_225_610),
    ("vgg11", COLOUR, 9_750_922),
    ("vgg13", COLOUR, 9_935_434),
    ("vgg16", COLOUR, 15_245_130),
    # two layers of 4 gates of 200 each, with two biases; embedding; decision
    ("lstm(vocabulary=5000)", (32,), 2 * 4 * 200 * (200 + 200 + 2) + 5000 * 200 + 201 * 10),
    ("resnet18_half", COLOUR, 2_797_610),
    ("small_cnn", GREY, 11_978),
    ("mlp", GREY, 785 * 128 + 129 * 10),
    ("mlp(hidden=(64, 32))", COLOUR, 3073 * 64 + 65 * 32 + 33 * 10),
]
SHAPES = {text.split("(")[0]: shape for text, shape, _ in SIZES}


def _build(text: str, shape: tuple[int, ...], seed: int = 1) -> nn.Module:
    return build(resolve("model", text), shape, 10, generator(seed, "model"))


def test_every_model_is_in_the_table() -> None:
    assert set(names("model")) <= {*SHAPES}, "add the new model with its number of parameters to SIZES"


@pytest.mark.parametrize(("text", "shape", "size"), SIZES, ids=[text for text, _, _ in SIZES])
def test_number_of_parameters_and_shape_of_logits(text: str, shape: tuple[int, ...], size: int) -> None:
    model = _build(text, shape)
    assert sum(p.numel() for p in model.parameters()) == size
    logits = model.eval()(torch.rand(2, *shape, generator=generator(1, "inputs")))
    assert logits.shape == (2, 10)
    assert not torch.allclose(logits.exp().sum(1), torch.ones(2))  # logits, not log-probabilities


@pytest.mark.parametrize("name", SHAPES)
def test_build_neither_uses_nor_moves_the_global_generator(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        one = model_vector(_build(name, SHAPES[name]))
        assert torch.equal(torch.get_rng_state(), before)
        torch.manual_seed(4)
        assert torch.equal(model_vector(_build(name, SHAPES[name])), one)
    assert not torch.equal(model_vector(_build(name, SHAPES[name], seed=2)), one)


@pytest.mark.parametrize("name", SHAPES)
def test_initial_values_are_those_of_pytorchs_constructors(name: str) -> None:
    component = resolve("model", name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = component(SHAPES[name], 10)
    ours = build(component, SHAPES[name], 10, torch.Generator().manual_seed(7))
    assert Layout.of(ours) == Layout.of(theirs)
    assert torch.equal(model_vector(ours), model_vector(theirs))


def test_initialise_knows_the_layers_of_text_and_table_models() -> None:
    def make() -> nn.ModuleDict:
        layers = {
            "e": nn.Embedding(9, 4, padding_idx=0),
            "l": nn.LSTM(4, 5, 2),
            "n": nn.LayerNorm(5),
            "o": nn.Linear(5, 2),
        }
        return nn.ModuleDict(layers)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        theirs = make()
        ours = make()
    initialise(ours, torch.Generator().manual_seed(7))
    assert torch.equal(model_vector(ours), model_vector(theirs))
    assert not ours["e"].weight[0].any()  # type: ignore[union-attr]


def test_initialise_resets_batch_norm_statistics() -> None:
    model = _build("resnet18_half", COLOUR)
    fresh = copy.deepcopy(model.state_dict())
    model.train()(torch.rand(4, *COLOUR, generator=generator(1, "inputs")))
    assert not torch.equal(model.state_dict()["bn1.running_mean"], fresh["bn1.running_mean"])
    initialise(model, generator(1, "model"))
    assert all(torch.equal(value, fresh[key]) for key, value in model.state_dict().items())


def test_tied_weights_are_drawn_once() -> None:
    tied = nn.ModuleDict({"a": nn.Embedding(6, 3), "b": nn.Linear(3, 6)})
    tied["b"].weight = tied["a"].weight
    initialise(tied, generator(1, "tied"))
    alone = nn.Embedding(6, 3)
    initialise(alone, generator(1, "tied"))
    assert torch.equal(tied["b"].weight, alone.weight)  # type: ignore[arg-type]


class _Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.randn(3))


class _OwnScale(_Scale):
    def initialise(self, generator: torch.Generator) -> None:
        nn.init.normal_(self.factor, generator=generator)


def test_layers_of_ones_own_must_say_how_they_start() -> None:
    with pytest.raises(ConfigError, match=r"1 \(_Scale\).*initialise\(generator\)"):
        initialise(nn.Sequential(nn.Linear(2, 3), _Scale()), generator(1, "own"))
    one, same = _OwnScale(), _OwnScale()
    initialise(one, generator(1, "own"))
    initialise(same, generator(1, "own"))
    assert torch.equal(one.factor, same.factor)


# --- normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in SHAPES if len(SHAPES[name]) > 1])  # word ids are not normalised
def test_normalisation_is_the_first_layer_and_adds_nothing_to_the_state(name: str) -> None:
    shape = SHAPES[name]
    mean, std = (0.2, 0.3, 0.4)[: shape[0]], (0.5, 0.6, 0.7)[: shape[0]]
    with_it = _build(f"{name}(mean={mean}, std={std})", shape).eval()
    without = _build(f"{name}(mean=None, std=None)", shape).eval()
    assert next(iter(with_it.children())).__class__ is Normalise
    assert not any(isinstance(module, Normalise) for module in without.modules())
    assert with_it.state_dict().keys() == without.state_dict().keys()
    assert Layout.of(with_it) == Layout.of(without)
    inputs = torch.rand(2, *shape, generator=generator(1, "inputs"))
    by_hand = torch.stack([(inputs[:, c] - mean[c]) / std[c] for c in range(shape[0])], 1)
    assert torch.allclose(with_it(inputs), without(by_hand), atol=1e-5)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("mnist_net(mean=(0.1, 0.2), std=(1.0, 1.0))", GREY),
        ("mnist_net(mean=(0.1,))", GREY),
        ("mnist_net(mean=(0.1,), std=(0.0,))", GREY),
        ("mnist_net", (1, 8, 8)),
        ("mnist_net", (784,)),
        ("vgg9", (3, 16, 16)),
        ("cfat_mnist(padding=-1)", GREY),
        ("cfat_cifar(padding=-1)", COLOUR),
        ("logistic_regression", ()),
        ("resnet18_half", (3, 0, 32)),
    ],
)
def test_bad_arguments_are_refused(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError):
        _build(text, shape)


def test_one_class_is_refused() -> None:
    for name in ("mnist_net", "logistic_regression"):
        with pytest.raises(ConfigError, match="2 classes"):
            build(resolve("model", name), GREY, 1, generator(1, "model"))


# --- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_draws_from_its_generator_alone() -> None:
    model = _build("edge_lenet", GREY)
    inputs = torch.rand(4, *GREY, generator=generator(1, "inputs"))
    before = torch.get_rng_state()

    def run(seed: int) -> torch.Tensor:
        set_dropout_generator(model, generator(seed, "dropout"))
        return model.train()(inputs)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model.eval()(inputs), model.eval()(inputs))


def test_dropout_without_a_generator_is_refused_in_training_only() -> None:
    model = _build("edge_lenet", GREY)
    inputs = torch.zeros(1, *GREY)
    with pytest.raises(HawthornError, match="set_dropout_generator"):
        model.train()(inputs)
    assert model.eval()(inputs).shape == (1, 10)
    set_dropout_generator(model, generator(1, "dropout"))
    with pytest.raises(HawthornError, match="set_dropout_generator"):
        copy.deepcopy(model).train()(inputs)  # a copy does not share the draws


@pytest.mark.parametrize("whole_channels", [False, True])
def test_dropout_keeps_the_mean_and_drops_the_stated_share(whole_channels: bool) -> None:
    layer = SeededDropout(0.25, whole_channels=whole_channels)
    set_dropout_generator(layer, generator(1, "dropout"))
    out = layer(torch.ones(200, 50, 4, 4))
    assert out.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    assert (out == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert ((out == 0).flatten(2).float().mean(2) % 1 == 0).all() == whole_channels


def test_dropout_wants_a_probability() -> None:
    for p in (-0.1, 1.0):
        with pytest.raises(ConfigError):
            SeededDropout(p)


# --- a released model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "name", "accuracy"),
    [("mnist_epoch10.safetensors", "mnist", 97.26), ("fashion_mnist_epoch200.safetensors", "fashion_mnist", 80.52)],
)
def test_flips_released_model_has_its_accuracy(
    file: str, name: str, accuracy: float, real: Callable[[str], Dataset], real_source: DataSource
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    weights = real_source.file(f"FLIP-weights/{file}")
    if weights is None:
        pytest.skip(f"FLIP-weights/{file} is in no data folder")
    model = _build("mnist_net", GREY).eval()
    model.load_state_dict(safetensors.load_file(weights))  # strict: the very same names
    data = real(name)
    inputs, labels = data.batch("test", slice(0, None))
    with torch.no_grad():
        right = sum((model(part).argmax(1) == own).sum() for part, own in zip(inputs.split(500), labels.split(500)))
    assert right / len(labels) * 100 == pytest.approx(accuracy, abs=0.005)
