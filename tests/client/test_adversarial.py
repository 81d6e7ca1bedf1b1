"""Adversarial training: the ascent, what it leaves as it was, and that it makes a model robust."""

import dataclasses

import pytest
import torch
from torch import nn

from certify.pgd import perturb, pgd
from client.trainer import LocalJob
from client.training.adversarial import adversarial
from client.training.sgd import sgd
from tasks.datasets.digits import digits
from tasks.errors import CertificationError, SpecError
from tasks.model import initialise
from tasks.params import Layout, bind, model_vector
from tasks.rng import generator
from tasks.source import DataSource
from tasks.spec import hyper_parameters

DATA = digits(DataSource.default(None))


def mlp(*middle: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), *middle, nn.ReLU(), nn.Linear(32, 10))


def job(model: nn.Module | None = None, **changes) -> LocalJob:
    model = mlp() if model is None else model
    initialise(model, generator(1, "model"))
    layout, start = Layout.of(model), model_vector(model)
    vector = start.clone()
    bind(model, layout, vector)
    made = LocalJob(DATA, torch.arange(400), model, layout, start, vector, client=3, round=2, seed=1)
    return dataclasses.replace(made, **changes)


def slow_ascent(model, inputs, labels, eps, steps, size, noise):
    """One sample at a time, one step at a time."""
    found = []
    for x, y, u in zip(inputs, labels, noise):
        low, high = (x - eps).clamp(0, 1), (x + eps).clamp(0, 1)
        current = low + u * (high - low)
        for _ in range(steps):
            current = current.detach().requires_grad_(True)
            nn.functional.cross_entropy(model(current[None]), y[None]).backward()
            assert current.grad is not None
            current = (current + size * current.grad.sign()).detach().clamp(low, high)
        found.append(current)
    return torch.stack(found)


def test_the_ascent_is_that_of_a_slow_one():
    work = job()
    inputs, labels = DATA.batch("train", slice(0, 20))
    found = perturb(work.model, inputs, labels, eps=0.2, generator=generator(5), steps=4)
    noise = torch.rand(inputs.shape, generator=generator(5))
    assert torch.allclose(found, slow_ascent(work.model, inputs, labels, 0.2, 4, 2.5 * 0.2 / 4, noise), atol=1e-6)


@pytest.mark.parametrize("half_steps", [0, 3, 5])
def test_the_ball_and_the_range_hold_whatever_the_precision(half_steps):
    work = job()
    inputs, labels = DATA.batch("train", slice(0, 100))
    found = perturb(
        work.model, inputs, labels, eps=0.15, generator=generator(1), steps=5, step_size=0.4, half_steps=half_steps
    )
    assert found.dtype == torch.float32
    assert float((found - inputs).abs().max()) <= 0.15 + 1e-7
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    loss = nn.functional.cross_entropy
    assert loss(work.model(found), labels) > loss(work.model(inputs), labels) + 0.1


def test_no_steps_and_no_random_start_change_nothing():
    work, (inputs, labels) = job(), DATA.batch("train", slice(0, 9))
    still = perturb(work.model, inputs, labels, eps=0.3, generator=generator(1), steps=0, random_start=False)
    assert torch.equal(still, inputs)
    moved = perturb(work.model, inputs, labels, eps=0.3, generator=generator(1), steps=0)
    assert not torch.equal(moved, inputs)
    with pytest.raises(CertificationError, match="half_steps from 0 to steps = 2, got 3"):
        perturb(work.model, inputs, labels, eps=0.3, generator=generator(1), steps=2, half_steps=3)


def test_half_precision_finds_about_what_full_precision_finds():
    work = job()
    sgd(work, lr=0.5, epochs=20)
    inputs, labels = DATA.batch("train", slice(400, 900))
    attacked = [
        perturb(work.model, inputs, labels, eps=0.1, generator=generator(1), steps=10, half_steps=half)
        for half in (0, 7)
    ]
    rights = [float((work.model(x).argmax(1) == labels).float().mean()) for x in attacked]
    assert rights[0] < 0.7
    assert abs(rights[0] - rights[1]) < 0.03


@pytest.mark.parametrize("middle", [nn.Identity, lambda: nn.BatchNorm1d(32)])
def test_in_a_ball_of_radius_0_it_is_sgd_to_the_bit(middle):
    """Also the statistics of batch normalisation: the attack's own passes leave no trace."""
    plain, attacked = job(mlp(middle())), job(mlp(middle()))
    sgd(plain, lr=0.1, momentum=0.9, epochs=2)
    adversarial(attacked, eps=0.0, attack_steps=3, lr=0.1, momentum=0.9, epochs=2)
    assert torch.equal(plain.vector, attacked.vector)
    assert attacked.model.training
    assert not torch.equal(plain.vector, plain.start)


def test_it_makes_a_model_robust():
    plain, robust = (job(indices=torch.arange(1000)) for _ in range(2))
    sgd(plain, lr=0.1, momentum=0.9, epochs=12)
    result = adversarial(robust, eps=0.15, attack_steps=4, lr=0.1, momentum=0.9, epochs=12)
    assert result.num_examples == 1000
    inputs, labels = DATA.batch("test", slice(None))
    found = [pgd(work.model, inputs, labels, eps=0.15, generator=generator(1)) for work in (plain, robust)]
    assert found[1].accuracy > found[0].accuracy + 0.2
    assert found[1].clean_accuracy > 0.85


def test_draws_depend_on_client_and_round_alone():
    def trained(**changes):
        work = job(**changes)
        adversarial(work, attack_steps=2, epochs=1)
        return work.vector

    assert torch.equal(trained(), trained())
    assert not torch.equal(trained(), trained(round=3))
    assert not torch.equal(trained(), trained(client=4))


def test_the_radius_grows_over_the_first_rounds():
    seen = []

    class Watch(nn.Module):
        def forward(self, inputs):
            if self.training:
                seen.append(inputs.detach().clone())
            return inputs

    for number in (1, 2, 4, 9):
        work = job(nn.Sequential(Watch(), mlp()), round=number, indices=torch.arange(32))
        adversarial(work, eps=0.2, attack_steps=2, step_size=0.5, eps_rounds=4, batch_size=32)
        order = torch.randperm(32, generator=work.generator("shuffle"))
        assert float((seen[-1] - DATA.batch("train", order)[0]).abs().max()) == pytest.approx(min(0.2, 0.05 * number))


def test_what_attackers_do_to_a_batch_comes_before_or_after_the_attack():
    order = []

    def told(name):
        def change(inputs, labels, _, __):
            order.append((name, float(inputs.max()) > 1))
            return (inputs * 0 if name == "early" else inputs + 5), labels

        return change

    work = job(indices=torch.arange(32), batch_transforms=(told("early"),), late_transforms=(told("late"),))
    adversarial(work, eps=0.1, attack_steps=1, batch_size=32)
    assert order == [("early", False), ("late", False)]


def test_every_hyper_parameter_of_sgd_is_there_with_the_same_default():
    ours, theirs = hyper_parameters(adversarial), hyper_parameters(sgd)
    assert {name: ours[name].default for name in theirs} == {name: p.default for name, p in theirs.items()}


@pytest.mark.parametrize(
    "wrong",
    [
        {"eps": -0.1},
        {"attack_steps": -1},
        {"half_steps": 11},
        {"half_steps": -1},
        {"eps_rounds": -1},
        {"input_range": (1.0, 0.0)},
        {"step_size": 0.0},
    ],
)
def test_what_makes_no_sense_is_refused(wrong):
    with pytest.raises(SpecError, match="adversarial wants"):
        adversarial(job(), **wrong)
