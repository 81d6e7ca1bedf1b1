"""The edge-case attack: what is trained, where projected gradient descent may go, what replacement does to the mean."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from client.attack import read_attack
from client.attacks.pgd_projection import project
from client.attacks.replace_model import boost
from client.trainer import LocalJob, LocalResult, honest
from tasks.config import RunConfig
from tasks.dataset import Dataset
from tasks.errors import SpecError
from tasks.model import build, set_dropout_generator
from tasks.params import Layout, bind, model_vector
from tasks.rng import generator
from tasks.source import DataSource
from tasks.spec import resolve

PGD = "pgd_projection(radius=0.2, frequency=3)"


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return resolve("dataset", "digits()")(DataSource.default())


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> str:
    """The text of an edge set of 30 + 10 noise images whose true label is 7; the attacker wants 1."""
    draw = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("edge") / "own.npz"
    np.savez(path, inputs=draw.integers(0, 17, (40, 1, 8, 8), dtype=np.uint8), labels=np.full(40, 7))
    return f"from_file(path='{path}', target=1)"


def job(data: Dataset, model_text: str = "logistic_regression()", **changes) -> LocalJob:
    model = build(resolve("model", model_text), data.input_shape, data.num_classes, generator(1, "model"))
    layout, start = Layout.of(model), model_vector(model)
    vector = start.clone()
    bind(model, layout, vector)
    given = {"client": 3, "round": 4, "seed": 1, "num_attackers": 1, "indices": torch.arange(100), **changes}
    return LocalJob(data, model=model, layout=layout, start=start, vector=vector, **given)


def trained(
    text: str, work: LocalJob, training: str = "sgd(lr=0.5, momentum=0.9, batch_size=16, epochs=2)"
) -> LocalResult:
    return read_attack(text)(honest(resolve("training", training)))(work)


def given_to_the_trainer(text: str, work: LocalJob) -> LocalJob:
    seen = []

    def trainer(inner: LocalJob) -> LocalResult:
        seen.append(inner)
        return LocalResult(inner.start + 1, len(inner.indices), 0.0)

    read_attack(text)(trainer)(work)
    return seen[0]


def test_the_poisoned_set_is_edge_cases_with_the_target_and_clean_data(digits, own):
    text = f'edge_case(edge="{own}", num_edge=20, num_clean=50)'
    inner = given_to_the_trainer(text, job(digits))
    inputs, labels = inner.dataset.batch("train", inner.indices)
    assert len(labels) == 70
    assert labels[50:].tolist() == [1] * 20
    rows = {(row.numpy().tobytes(), int(label)) for row, label in zip(digits.train_inputs, digits.train_labels)}
    clean = zip(inner.dataset.train_inputs[:50], inner.dataset.train_labels[:50])
    assert all((row.numpy().tobytes(), int(label)) in rows for row, label in clean)
    assert inputs.max() == 1.0
    assert torch.equal(inner.dataset.test_inputs, digits.test_inputs)
    other = given_to_the_trainer(text, job(digits, client=5, round=9))  # all attackers of a run share one set
    assert torch.equal(other.dataset.train_inputs, inner.dataset.train_inputs)
    assert trained(text, job(digits)).num_examples == 70
    aside = given_to_the_trainer(f'edge_case(edge="{own}", num_edge=1, num_clean=30, clean="own")', job(digits))
    mine = {row.numpy().tobytes() for row in digits.train_inputs[:100]}
    assert all(row.numpy().tobytes() in mine for row in aside.dataset.train_inputs[:30])


def test_success_is_measured_on_the_edge_sets_own_test_samples(digits, own):
    attack = read_attack(f'edge_case(edge="{own}", num_edge=20) | {PGD} | replace_model()')
    assert attack.triggered is None
    found = attack.target_set(digits, "")
    assert found.inputs.shape == (10, 1, 8, 8)
    assert found.inputs.dtype == torch.float32
    assert found.inputs.max() <= 1
    assert found.wanted.tolist() == [1] * 10
    assert found.labels.tolist() == [7] * 10
    changed = read_attack(f'edge_case(edge="{own}", num_edge=20, target=4)').target_set(digits, "")
    assert changed.wanted.tolist() == [4] * 10


def test_honest_holders_edge_cases_are_no_clean_data_of_the_attacker(digits, own):
    marked = dataclasses.replace(digits, train_labels=digits.train_labels.clone(), num_edge=400)
    marked.train_labels[-400:] = 9
    marked.train_labels[:-400] = 3
    inner = given_to_the_trainer(f'edge_case(edge="{own}", num_edge=5, num_clean=500)', job(marked))
    assert inner.dataset.train_labels[:500].unique().tolist() == [3]
    assert inner.dataset.num_edge == 0


def test_what_cannot_be_is_refused(digits, own):
    for text, says in (
        (f'edge_case(edge="{own}", num_edge=31)', "has 30 training samples, not 31"),
        (f'edge_case(edge="{own}", num_edge=5, target=12)', "target 12 is no class"),
        (f'edge_case(edge="{own}", num_edge=5, num_clean=9999)', "digits has [0-9]+ clean training samples, not 9999"),
        (f'edge_case(edge="{own}", num_edge=5, num_clean=101, clean="own")', "client 3 has 100 samples of its own"),
    ):
        with pytest.raises(SpecError, match=says):
            trained(text, job(digits))
    for text in (
        "edge_case(edge='x', num_edge=0)",
        "pgd_projection(radius=0)",
        "pgd_projection(decay=1.5)",
        "replace_model(max_factor=0)",
    ):
        with pytest.raises(SpecError, match="wants"):
            read_attack(text)


def test_as_many_clean_samples_as_there_are_can_be_asked_for(digits, own):
    size = len(digits.train_labels)
    for number, clean in ((size, "all"), (100, "own")):
        text = f'edge_case(edge="{own}", num_edge=30, num_clean={number}, clean="{clean}")'
        assert len(given_to_the_trainer(text, job(digits)).indices) == number + 30
    text = f'edge_case(edge="{own}", num_edge=30, num_clean=100, clean="own")'
    trial = job(digits, indices=torch.arange(4), trial=True)  # a trial has four of the client's samples
    assert len(given_to_the_trainer(text, trial).indices) == 34


@pytest.mark.parametrize("frequency", [1, 3, 7, 1000])
@pytest.mark.parametrize("radius", [1e-3, 0.2, 1.0])
def test_what_pgd_sends_is_never_outside_of_the_ball(digits, own, frequency, radius):
    work = job(digits)
    base = f'edge_case(edge="{own}", num_edge=20, num_clean=50)'
    result = trained(f"{base} | pgd_projection(radius={radius}, frequency={frequency})", work)
    norm = float(torch.linalg.vector_norm(result.vector.double() - work.start.double()))
    assert 0.9 * radius < norm <= radius
    free = trained(base, job(digits)).vector - work.start
    assert free.norm() > 1.0


def test_the_radius_shrinks_with_the_rounds(digits, own):
    base = f'edge_case(edge="{own}", num_edge=20, num_clean=50) | pgd_projection(radius=0.5, decay=0.5)'
    norms = [float((trained(base, job(digits, round=r)).vector - job(digits).start).norm()) for r in (1, 2, 3)]
    assert norms == pytest.approx([0.5, 0.25, 0.125], rel=1e-3)


def test_pgd_is_plain_descent_with_projections_after_the_steps_it_names(digits):
    """Beside a slow version on `torch.optim.SGD`: the same rounding, the same momentum, which is not projected."""
    work = job(digits, indices=torch.arange(80))
    result = trained(PGD, work)
    model = build(resolve("model", "logistic_regression()"), digits.input_shape, 10, generator(1, "model"))
    layout, start = Layout.of(model), model_vector(model)
    vector = start.clone()
    bind(model, layout, vector)
    optimiser = torch.optim.SGD(model.parameters(), 0.5, 0.9)
    shuffle = work.generator("shuffle")
    for _ in range(2):
        order = torch.randperm(80, generator=shuffle)
        for number, part in enumerate(order.split(16)):
            inputs, labels = digits.batch("train", part)
            optimiser.zero_grad()
            functional.cross_entropy(model(inputs), labels).backward()
            optimiser.step()
            length = (vector - start).norm()
            if number in (0, 3, 4) and length > 0.2:
                vector.copy_(start + (vector - start) * (0.2 / length))
    assert torch.allclose(result.vector, vector, atol=1e-6)


def test_a_trainer_that_knows_nothing_of_steps_is_projected_all_the_same():
    work = job(resolve("dataset", "digits()")(DataSource.default()))
    result = read_attack(PGD)(lambda inner: LocalResult(inner.start + 1, 1, 0.0))(work)
    assert float((result.vector.double() - work.start.double()).norm()) <= 0.2


def test_projection_over_many_magnitudes():
    draw = generator(1, "project")
    for scale in (1e-6, 1.0, 1e4):
        for radius in (1e-8, 1e-3, 0.7, 50.0):
            centre = scale * torch.randn(500, generator=draw)
            moved = project(centre + radius * torch.randn(500, generator=draw), centre, radius)
            assert float((moved.double() - centre.double()).norm()) <= radius
    inside = torch.tensor([0.3, 0.4])
    assert project(inside, torch.zeros(2), 0.5001) is inside
    assert torch.allclose(project(torch.tensor([3.0, 4.0]), torch.zeros(2), 1.0), torch.tensor([0.6, 0.8]))


def settings(**changes) -> RunConfig:
    return RunConfig.read({"num-clients": 20, "clients-per-round": 8, **changes})


def test_replacement_makes_the_mean_the_attackers_model(digits, own):
    base = f'edge_case(edge="{own}", num_edge=20, num_clean=50) | {PGD}'
    plain = trained(base, job(digits)).vector
    for config, weights in (
        (settings(), [1 / 8] * 8),
        (settings(**{"server-lr": 0.1}), [0.1 / 8] * 8),
        (settings(**{"client-weights": "claimed"}), [70 / (70 + 700), *[100 / 770] * 7]),
    ):
        work = job(digits, settings=config)
        sent = trained(f"{base} | replace_model()", work)
        updates = [sent.vector - work.start, *[torch.zeros_like(work.start)] * 7]  # honest clients do not move
        new = work.start + sum(w * u for w, u in zip(weights, updates))
        assert torch.allclose(new, plain, atol=1e-5)


def test_boosting_is_capped_and_shared(digits):
    work = job(digits, settings=settings())
    assert boost(work, 70, None, 1) == 8
    assert boost(work, 70, 30, 1) == 30
    assert boost(work, 70, None, 2) == 4
    assert boost(dataclasses.replace(work, settings=None), 70, None, 1) == 1
    update = read_attack("replace_model(max_factor=3.0)")(lambda j: LocalResult(j.start + 1, 9, 0.0))(work).vector
    assert torch.allclose(update - work.start, torch.full_like(update, 3.0), atol=1e-5)


def test_gradients_are_shortened_as_torch_does(digits):
    training = "sgd(lr=0.5, batch_size=16, max_gradient_norm=0.3)"
    work = job(digits, indices=torch.arange(48))
    ours = honest(resolve("training", training))(work).vector
    model = build(resolve("model", "logistic_regression()"), digits.input_shape, 10, generator(1, "model"))
    shuffle = work.generator("shuffle")
    for part in torch.randperm(48, generator=shuffle).split(16):
        inputs, labels = digits.batch("train", part)
        model.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    assert torch.allclose(ours, model_vector(model), atol=1e-6)
    with pytest.raises(SpecError, match="max_gradient_norm"):
        honest(resolve("training", "sgd(max_gradient_norm=0.0)"))(work)


def test_a_text_model_learns_and_repeats_itself():
    draw = generator(1, "texts")
    rows = torch.randint(2, 20, (200, 6), generator=draw, dtype=torch.int32)
    rows[:, :2] = 0
    labels = (rows[:, -1] < 11).long()
    from tasks.vocabulary import Vocabulary

    vocabulary = Vocabulary(tuple(f"w{i}" for i in range(18)))
    data = Dataset("texts", rows, labels, rows, labels, 2, vocabulary=vocabulary)
    text = "lstm(vocabulary=20, embedding=8, hidden=16, dropout=0.1)"
    training = "sgd(lr=0.3, momentum=0.9, batch_size=20, epochs=15, max_gradient_norm=5.0)"
    results = [trained("", job(data, text, indices=torch.arange(200)), training) for _ in range(2)]
    assert torch.equal(results[0].vector, results[1].vector)
    work = job(data, text)
    work.vector.copy_(results[0].vector)
    set_dropout_generator(work.model, None)
    work.model.eval()
    inputs, wanted = data.batch("test", slice(None))
    assert (work.model(inputs).argmax(1) == wanted).float().mean() > 0.95
