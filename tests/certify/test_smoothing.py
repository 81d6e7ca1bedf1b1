"""Votes under parameter noise: exact against numbers and sampling, the same counts however the work is cut."""

import math
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, special, stats

from certify.bounds import ABSTAINED, simultaneous, two_stage
from certify.linear import LinearModel
from certify.network import Network
from certify.smoothing.exact import argmax_probabilities, exact_bounds, exact_votes, quadrature_error_upper
from certify.smoothing.logits import sample_linear_votes
from certify.smoothing.sampled import count_votes
from certify.smoothing.votes import Votes, inputs_sha256
from tasks.errors import CertificationError, RecordError
from tasks.model import build
from tasks.models.logistic_regression import logistic_regression
from tasks.models.mnist_net import mnist_net
from tasks.models.small_cnn import small_cnn
from tasks.rng import generator


def linear(features: int = 12, classes: int = 5, bias: bool = True, seed: int = 1) -> Network:
    module = build(partial(logistic_regression, bias=bias), (features,), classes, generator(seed, "model"))
    return Network.from_module(module, (features,))


def points(number: int, *shape: int, seed: int = 2) -> torch.Tensor:
    return torch.rand(number, *shape, generator=generator(seed, "points"))


# ---- exact votes


@pytest.mark.parametrize(
    ("logits", "scale", "expected"),
    [
        ((1, 0, -1), 1.0, (0.728751015300, 0.224098304780, 0.047150679919)),
        ((2, 1.5, 1, 0), 0.5, (0.728502198858, 0.223957487696, 0.047089722059, 0.000450591387)),
        ((1, 0), 1.0, (0.760249938907, 0.239750061093)),
    ],
)
def test_exact_votes(logits: tuple[float, ...], scale: float, expected: tuple[float, ...]) -> None:
    found = argmax_probabilities(np.array([logits], float), np.array([scale]))[0]
    assert found == pytest.approx(expected, abs=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=47), st.floats(0.05, 5))
def test_exact_votes_are_within_their_error_of_adaptive_quadrature(logits: list[float], scale: float) -> None:
    z = np.array(logits)
    found = argmax_probabilities(z[None], np.array([scale]))[0]
    bound = sum(quadrature_error_upper(len(z)))
    assert bound < 3e-12
    assert found.sum() == pytest.approx(1, abs=len(z) * bound)
    top = int(z.argmax())
    gaps = np.delete((z[top] - z) / scale, top)
    exact, error = integrate.quad(
        lambda u: stats.norm.pdf(u) * special.ndtr(gaps + u).prod(), -12, 12, epsabs=1e-13, epsrel=1e-13, limit=400
    )
    assert abs(found[top] - exact) <= bound + error


def test_two_classes_have_a_closed_form() -> None:
    for gap in (0.0, 1e-6, 0.5, 3.0, 10.0, 40.0):
        found = argmax_probabilities(np.array([[gap, 0.0]]), np.array([1.0]))[0, 1]
        assert abs(found - special.ndtr(-gap / math.sqrt(2))) <= sum(quadrature_error_upper(2))


def test_special_functions_are_as_precise_as_the_error_bound_says() -> None:
    with mpmath.workdps(40):
        for v in np.concatenate([np.linspace(-9, 26, 351), np.linspace(-9.001, -8.9, 20)]):
            assert abs(mpmath.mpf(float(special.ndtr(v))) / mpmath.ncdf(float(v)) - 1) < 3e-14
            assert (
                abs(mpmath.mpf(float(np.exp(-0.5 * v * v))) / mpmath.exp(-(mpmath.mpf(float(v)) ** 2) / 2) - 1) < 4e-14
            )


def test_bounds_of_exact_votes_lie_outside_the_truth() -> None:
    """In two classes the truth is a normal probability, here with 40 digits."""
    network, inputs = linear(6, 2), points(20, 6)
    model = LinearModel.from_network(network)
    bounds = exact_bounds(exact_votes(model, inputs, 0.3))
    assert bounds.alpha == 0.0
    with mpmath.workdps(40):
        for i, x in enumerate(inputs.double().numpy()):
            gap = mpmath.fdot(model.weight[0] - model.weight[1], x)
            assert model.bias is not None
            gap = abs(gap + mpmath.mpf(model.bias[0]) - mpmath.mpf(model.bias[1]))
            truth = mpmath.ncdf(gap / (0.3 * mpmath.sqrt(2 * (mpmath.fdot(x, x) + 1))))
            assert truth - mpmath.mpf("1e-12") < bounds.pa_lower[i] <= truth
            assert 1 - truth <= bounds.pb_upper[i] < 1 - truth + mpmath.mpf("1e-12")


def test_certain_votes_are_known_to_the_last_digit() -> None:
    """Two classes, the gap s in deviations of a vote: 1 - pA within a factor of 2 of Phi(-gap / sqrt 2) or of 1e-15."""
    for gap in (5.0, 8.0, 10.0, 11.0, 40.0):
        model = LinearModel(np.array([[gap / 2], [-gap / 2]]) * math.sqrt(2) * 1e-2, np.zeros(2))
        bounds = exact_bounds(exact_votes(model, np.ones((1, 1)), 1e-2))
        with mpmath.workdps(40):
            truth = mpmath.ncdf(-mpmath.mpf(gap) / mpmath.sqrt(2) * mpmath.sqrt(1))
            assert truth * (1 - mpmath.mpf(10) ** -9) <= bounds.pb_upper[0] <= truth * (1 + 1e-9) + 1e-18
            assert truth <= 1 - mpmath.mpf(bounds.pa_lower[0]) + mpmath.mpf(10) ** -9 * truth
            assert 1 - mpmath.mpf(bounds.pa_lower[0]) <= 2 * truth + mpmath.mpf("1e-15")


def test_a_tie_abstains() -> None:
    model = LinearModel(np.zeros((3, 4)), np.zeros(3))
    bounds = exact_bounds(exact_votes(model, np.ones((2, 4)), 0.1))
    assert bounds.label.tolist() == [ABSTAINED, ABSTAINED]
    label, shift = model.shifts_lower(np.ones((2, 4)))
    assert label.tolist() == [ABSTAINED] * 2
    assert shift.tolist() == [0.0] * 2


# ---- margins


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans())
def test_margins_are_the_exact_distance_to_another_label(seed: int, classes: int, bias: bool) -> None:
    """The change along (e_c - e_A) x~ turns the label just beyond the distance; no random change does inside it."""
    rng = np.random.default_rng(seed)
    model = LinearModel(rng.normal(size=(classes, 7)), rng.normal(size=classes) if bias else None)
    inputs = rng.normal(size=(4, 7))
    labels, shifts = model.shifts_lower(inputs)
    for x, label, shift in zip(inputs, labels, shifts, strict=True):
        lifted = np.append(x, 1.0) if bias else x
        parameters = model.weight if model.bias is None else np.column_stack([model.weight, model.bias])
        reached = []
        for other in set(range(classes)) - {int(label)}:
            direction = np.zeros_like(parameters)
            direction[other], direction[label] = lifted, -lifted
            direction /= np.linalg.norm(direction)
            inside, outside = (parameters + f * shift * direction for f in (1 - 1e-9, 1 + 1e-9))
            assert (inside @ lifted).argmax() == label
            reached.append((outside @ lifted).argmax() != label)
        assert any(reached)
        noise = rng.normal(size=(50, *parameters.shape))
        noise *= shift / np.linalg.norm(noise, axis=(1, 2), keepdims=True)
        assert (((parameters + noise) @ lifted).argmax(axis=1) == label).all()


def test_a_linear_model_is_one_linear_layer() -> None:
    image = build(logistic_regression, (1, 4, 4), 3, generator(1))
    network = Network.from_module(image, (1, 4, 4))
    model, inputs = LinearModel.from_network(network), points(9, 1, 4, 4)
    logits, errors = model.logits(model.design(inputs))
    assert np.abs(logits - network.forward(inputs, dtype=torch.float64).detach().numpy()).max() <= errors.min()
    with pytest.raises(CertificationError, match="conv2d"):
        LinearModel.from_network(Network.from_module(build(small_cnn, (1, 28, 28), 10, generator(1)), (1, 28, 28)))
    with pytest.raises(CertificationError, match="16 numbers each"):
        model.design(points(3, 15))


# ---- sampled votes


def test_votes_follow_the_exact_probabilities() -> None:
    """Chi-square of counts of noisy weights and of logits against the exact law, over 40 points."""
    network, inputs = linear(), points(40, 12)
    exact = exact_votes(LinearModel.from_network(network), inputs, 0.2).probabilities
    weights = count_votes(network, inputs[:1], sigma=0.2, num_draws=4000, seed=3)
    assert stats.chisquare(weights.counts[0], 4000 * exact[0] / exact[0].sum()).pvalue > 1e-3
    independent = sample_linear_votes(network, inputs, sigma=0.2, num_draws=4000, seed=3)
    pvalues = [stats.chisquare(c, 4000 * p / p.sum()).pvalue for c, p in zip(independent.counts, exact, strict=True)]
    assert stats.kstest(pvalues, "uniform").pvalue > 1e-3


def test_bias_gets_noise_too() -> None:
    """With an input of zeros the bias alone decides, so its noise decides the votes."""
    network = linear(4, 2)
    network = network.with_vector(torch.zeros_like(network.vector()))
    votes = count_votes(network, torch.zeros(1, 4), sigma=0.1, num_draws=1000, seed=1)
    assert 430 < votes.counts[0, 0] < 570
    assert votes.counts.sum() == 1000


@pytest.mark.parametrize("classes", [2, 255, 256, 257])
def test_a_draw_has_one_vote_even_where_all_logits_tie(classes: int) -> None:
    network = linear(3, classes, bias=False)
    counts = count_votes(network, torch.zeros(2, 3), sigma=0.1, num_draws=30, seed=1).counts
    assert counts[:, 0].tolist() == [30, 30]
    assert counts.sum() == 60


@pytest.mark.parametrize("bias", [True, False])
def test_the_same_counts_on_every_cut(bias: bool) -> None:
    network, inputs = linear(40, 10, bias), points(20, 40)
    network = network.with_vector(network.vector() * 0.02)  # logits close together, so that rounding would show
    whole = count_votes(network, inputs, sigma=1e-3, num_draws=131, seed=5)
    slow = _one_by_one(network, inputs, 1e-3, 131, 5)
    assert np.array_equal(whole.counts, slow)
    for memory in (1, 5_000, 100_000, 3_000_000):
        cut = count_votes(network, inputs, sigma=1e-3, num_draws=131, seed=5, memory_bytes=memory)
        assert np.array_equal(cut.counts, whole.counts), memory


def _one_by_one(network: Network, inputs: torch.Tensor, sigma: float, num_draws: int, seed: int) -> np.ndarray:
    """Count votes the obvious way: one noisy model after the other, in float64."""
    counts = np.zeros((len(inputs), network.num_classes), dtype=np.int64)
    vector = network.vector()
    for draw in range(num_draws):
        noise = torch.randn(vector.numel(), generator=generator(seed, "smoothing", "votes", draw))
        labels = network.with_vector(noise.double() * sigma + vector.double()).forward(inputs.double()).argmax(1)
        counts[np.arange(len(inputs)), labels.numpy()] += 1
    return counts


@pytest.mark.parametrize("model", [small_cnn, mnist_net])
def test_any_network_votes_and_cuts_alike(model: partial) -> None:
    network = Network.from_module(build(model, (1, 28, 28), 10, generator(1)).eval(), (1, 28, 28))
    inputs = points(7, 1, 28, 28)
    whole = count_votes(network, inputs, sigma=0.02, num_draws=12, seed=5)
    assert np.array_equal(whole.counts, _one_by_one(network, inputs, 0.02, 12, 5))
    for memory in (1, 10_000_000):
        cut = count_votes(network, inputs, sigma=0.02, num_draws=12, seed=5, memory_bytes=memory)
        assert np.array_equal(cut.counts, whole.counts)


def test_a_draw_without_finite_logits_votes_for_nothing() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2)).eval()
    votes = count_votes(Network.from_module(module, (3,)), points(5, 3), sigma=3.0, num_draws=64, seed=1)
    assert votes.complete
    assert 0 < votes.counts.sum() < 5 * 64, "noise makes some variances negative"


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    network, inputs = linear(), points(9, 12)
    whole = count_votes(network, inputs, sigma=0.1, num_draws=300, seed=2, memory_bytes=20_000)
    seen: list[int] = []
    stopped = count_votes(
        network, inputs, sigma=0.1, num_draws=300, seed=2, memory_bytes=20_000,
        on_progress=lambda votes: seen.append(votes.num_draws), should_stop=lambda: len(seen) == 3,
    )  # fmt: skip
    assert not stopped.complete
    assert seen == sorted(seen)
    assert stopped.num_draws == seen[2] < 300
    stopped.save(tmp_path / "votes.safetensors")
    loaded = Votes.load(tmp_path / "votes.safetensors")
    assert (loaded.plan, loaded.num_draws) == (stopped.plan, stopped.num_draws)
    resumed = count_votes(network, inputs, sigma=0.1, num_draws=300, seed=2, start=loaded)
    assert np.array_equal(resumed.counts, whole.counts)
    assert resumed.complete
    more = count_votes(network, inputs, sigma=0.1, num_draws=400, seed=2, start=resumed)
    assert np.array_equal(more.counts, count_votes(network, inputs, sigma=0.1, num_draws=400, seed=2).counts)


def test_votes_of_another_plan_are_not_resumed(tmp_path: Path) -> None:
    network, inputs = linear(), points(4, 12)
    start = count_votes(network, inputs, sigma=0.1, num_draws=10, seed=2)
    for wrong, name in ((0.2, "sigma"), (0.1, "model_sha256"), (0.1, "inputs_sha256")):
        other = linear(seed=7) if name == "model_sha256" else network
        data = points(4, 12, seed=9) if name == "inputs_sha256" else inputs
        with pytest.raises(CertificationError, match=name):
            count_votes(other, data, sigma=wrong, num_draws=20, seed=2, start=start)
    with pytest.raises(CertificationError, match="num_draws"):
        count_votes(network, inputs, sigma=0.1, num_draws=9, seed=2, start=start)
    for content in (b"", b"not votes"):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(RecordError, match="holds no votes"):
            Votes.load(tmp_path / "file")
    with pytest.raises(RecordError, match="holds no votes"):
        Votes.load(tmp_path / "missing")


def test_streams_and_seeds_are_independent_draws() -> None:
    network, inputs = linear(), points(30, 12)
    kinds = (("votes", 1), ("selection", 1), ("votes", 2))
    for sample in (count_votes, sample_linear_votes):
        drawn = [sample(network, inputs, sigma=0.5, num_draws=200, seed=s, stream=name).counts for name, s in kinds]
        again = sample(network, inputs, sigma=0.5, num_draws=200, seed=1, stream="votes").counts
        assert np.array_equal(drawn[0], again)
        assert not any(np.array_equal(drawn[0], other) for other in drawn[1:])
        assert all((counts.sum(axis=1) == 200).all() for counts in drawn)


def test_logit_votes_of_a_point_do_not_depend_on_the_points_after_it() -> None:
    network, inputs = linear(), points(150, 12)
    whole = sample_linear_votes(network, inputs, sigma=0.5, num_draws=333, seed=1)
    part = sample_linear_votes(network, inputs[:70], sigma=0.5, num_draws=333, seed=1)
    assert np.array_equal(whole.counts[:70], part.counts)


@pytest.mark.parametrize("bound", ["two_stage", "simultaneous"])
def test_the_bounds_of_sampled_votes_cover_the_exact_probabilities(bound: str) -> None:
    """400 points with independent noise: the pair is wrong for at most a share alpha of them, up to chance."""
    network, inputs = linear(), points(400, 12)
    exact = exact_votes(LinearModel.from_network(network), inputs, 0.2).probabilities
    draw = partial(sample_linear_votes, network, inputs, sigma=0.2, seed=11)
    votes = draw(num_draws=200)
    if bound == "two_stage":
        found = two_stage(draw(num_draws=20, stream="selection").counts, votes.counts, 200, 0.05)
    else:
        found = simultaneous(votes.counts, 200, 0.05)
    top = votes.counts.argmax(1) if bound == "simultaneous" else draw(num_draws=20, stream="selection").counts.argmax(1)
    rows = np.arange(400)
    others = exact.copy()
    others[rows, top] = 0
    wrong = (exact[rows, top] < found.pa_lower) | (others.max(1) > found.pb_upper)
    assert wrong.sum() <= stats.binom.ppf(0.9999, 400, 0.05)
    assert (found.label != ABSTAINED).mean() > 0.2, "the bounds say something"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sigma": 0.0}, "sigma must be above 0"), ({"sigma": math.nan}, "sigma"), ({"num_draws": 0}, "num_draws"),
        ({"seed": -1}, "seed"), ({"stream": ""}, "stream"), ({"memory_bytes": 0}, "memory_bytes"),
    ],
)  # fmt: skip
def test_refusals(change: dict, message: str) -> None:
    with pytest.raises(CertificationError, match=message):
        count_votes(linear(), points(2, 12), **{"sigma": 0.1, "num_draws": 5, "seed": 1} | change)


def test_points_must_be_finite() -> None:
    for wrong in (torch.full((1, 12), math.nan), torch.zeros(0, 12), torch.zeros(12)):
        with pytest.raises(CertificationError, match="inputs must be finite"):
            count_votes(linear(), wrong, sigma=0.1, num_draws=5, seed=1)
    with pytest.raises(CertificationError, match="input of zeros"):
        exact_votes(LinearModel.from_network(linear(bias=False)), torch.zeros(1, 12), 0.1)
    assert inputs_sha256(torch.zeros(2, 3)) != inputs_sha256(torch.zeros(3, 2))


# ---- numbers at the ends of a type


@pytest.mark.parametrize("sigma", [3e-8, 1e-7, 1e-6, 1e-5])
def test_noise_finer_than_float32_weights_is_not_rounded_away(sigma: float) -> None:
    """Weights of 1 step by 1.2e-7 in float32, and the two logits differ by a few deviations of the noise."""
    gap = torch.tensor([200 * sigma, 0.0])
    described: list[dict] = [{"kind": "linear", "weight": "w", "bias": "b"}]
    tensors = {"w": torch.ones(2, 1), "b": gap}
    network = Network.from_parts(described, tensors, (1,))
    exact = exact_votes(LinearModel.from_network(network), torch.tensor([[100.0]]), sigma).probabilities[0]
    votes = count_votes(network, torch.tensor([[100.0]]), sigma=sigma, num_draws=2000, seed=1)
    assert stats.chisquare(votes.counts[0], 2000 * exact / exact.sum()).pvalue > 1e-3


def test_noise_that_float64_cannot_resolve_is_refused() -> None:
    network = Network.from_parts([{"kind": "linear", "weight": "w"}], {"w": torch.ones(2, 1)}, (1,))
    with pytest.raises(CertificationError, match=r"below 2\^-30 of the largest parameter"):
        count_votes(network, torch.ones(1, 1), sigma=9e-10, num_draws=5, seed=1)
    assert count_votes(network, torch.ones(1, 1), sigma=1e-9, num_draws=5, seed=1).complete


def test_points_have_one_identity_and_other_points_another() -> None:
    numbers = torch.tensor([[1 + 1e-9], [0.5]], dtype=torch.float64)
    others = torch.tensor([[1 - 1e-9], [0.5]], dtype=torch.float64)
    assert inputs_sha256(numbers) != inputs_sha256(others), "two points on two sides of a boundary"
    single = torch.rand(3, 4, generator=generator(1, "points"))
    assert inputs_sha256(single) == inputs_sha256(single.double())
    assert inputs_sha256(single.bfloat16()) == inputs_sha256(single.bfloat16().float())


def test_margins_of_numbers_whose_squares_underflow() -> None:
    tiny = LinearModel(np.array([[1.0], [-1.0]]), None)
    label, shift = tiny.shifts_lower(np.array([[1e-200], [1e-320], [0.0], [1e200]]))
    assert label.tolist() == [0, ABSTAINED, ABSTAINED, 0]
    assert shift[[0, 3]] == pytest.approx(math.sqrt(2))
    assert (shift[[0, 3]] <= math.sqrt(2)).all()
    assert shift[[1, 2]].tolist() == [0.0, 0.0], "errors near the smallest number, and no logits at all"


def test_labels_of_tiny_models_are_right_or_none() -> None:
    """Weights nearly orthogonal to the input, at sizes whose squares are 0 in float64: the sign by 50 digits."""
    rng = np.random.default_rng(0)
    sure = 0
    for size in (1e-170, 1e-100, 1.0, 1e-310):
        for _ in range(400):
            weight, x = rng.normal(size=(2, 3))
            weight[2] = -(weight[0] * x[0] + weight[1] * x[1]) / x[2] * rng.choice([1.0, 1.01])
            model = LinearModel(np.stack([weight * size, np.zeros(3)]), np.zeros(2))
            label, shift = model.shifts_lower(x[None])
            assert np.isfinite(shift).all()
            with mpmath.workdps(50):
                above = mpmath.fdot([mpmath.mpf(float(w)) for w in model.weight[0]], [mpmath.mpf(float(v)) for v in x])
                norm = mpmath.sqrt(mpmath.fsum(mpmath.mpf(float(v)) ** 2 for v in x) + 1)
                assert label[0] in (ABSTAINED, 0 if above > 0 else 1)
                assert shift[0] <= abs(above) / (mpmath.sqrt(2) * norm)
            sure += label[0] != ABSTAINED
    assert sure > 300
