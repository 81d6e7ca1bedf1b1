"""Local training against a plain PyTorch loop, to the bit."""

import math

import pytest
import torch
from torch import nn

from client.trainer import LocalJob
from client.training.sgd import sgd
from tasks.dataset import Dataset
from tasks.params import Layout, bind, model_vector
from tasks.rng import generator


def dataset(num: int = 37) -> Dataset:
    g = generator(5, "data")
    inputs, labels = (
        torch.randint(0, 256, (num, 1, 6, 6), generator=g, dtype=torch.uint8),
        torch.randint(0, 3, (num,), generator=g),
    )
    return Dataset("made", inputs, labels, inputs, labels, 3, scale=1 / 255)


def job(data: Dataset, **changes) -> tuple[LocalJob, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
        twin = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    twin.load_state_dict(model.state_dict())
    layout, vector = Layout.of(model), model_vector(model)
    bind(model, layout, vector)
    fields = {
        "dataset": data,
        "indices": torch.arange(len(data.train_labels)),
        "model": model,
        "layout": layout,
        "start": vector.clone(),
        "vector": vector,
        "client": 3,
        "round": 2,
        "seed": 9,
    }
    return LocalJob(**{**fields, **changes}), twin


@pytest.mark.parametrize(
    "arguments",
    [
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "epochs": 3},
        {"lr": 0.05, "weight_decay": 1e-2, "batch_size": 7, "epochs": 5, "decay_at": (0.2, 0.8)},
        {"lr": 0.05, "steps": 5, "batch_size": 10, "round_decay": 0.9},
    ],
)
def test_equals_a_plain_pytorch_loop(arguments):
    work, twin = job(dataset())
    result = sgd(work, **arguments)
    assert result.num_examples == 37
    reference = plain_loop(work, twin, **arguments)
    assert torch.equal(result.vector, model_vector(reference))
    assert not torch.equal(result.vector, work.start)


def plain_loop(
    work,
    model,
    *,
    lr,
    momentum=0.0,
    weight_decay=0.0,
    epochs=1,
    steps=None,
    batch_size=32,
    decay_at=(),
    round_decay=1.0,
):
    rate = lr * round_decay ** (work.round - 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=weight_decay)
    milestones = [math.ceil(share * epochs) for share in decay_at]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, milestones, gamma=0.1)
    shuffle, done = work.generator("shuffle"), 0
    per_epoch = math.ceil(len(work.indices) / batch_size)
    limit = epochs * per_epoch if steps is None else steps
    model.train()
    while done < limit:
        order = work.indices[torch.randperm(len(work.indices), generator=shuffle)]
        for index in order.split(batch_size):
            if done == limit:
                break
            optimiser.zero_grad()
            inputs = work.dataset.train_inputs[index].float() * work.dataset.scale
            inputs = inputs.to(memory_format=torch.channels_last)  # as batches come: the order of sums follows it
            nn.functional.cross_entropy(model(inputs), work.dataset.train_labels[index]).backward()
            optimiser.step()
            done += 1
        schedule.step()
    return model


def test_same_job_same_result_and_no_global_randomness():
    before = torch.random.get_rng_state()
    results = [sgd(job(dataset())[0], lr=0.1, epochs=2).vector for _ in range(2)]
    assert torch.equal(*results)
    assert torch.equal(before, torch.random.get_rng_state())
    other = sgd(job(dataset(), client=4)[0], lr=0.1, epochs=2, batch_size=8).vector
    assert not torch.equal(results[0], other)


def test_a_client_without_data_sends_the_model_back():
    work, _ = job(dataset(), indices=torch.empty(0, dtype=torch.int64))
    result = sgd(work, lr=0.1, steps=5)
    assert torch.equal(result.vector, work.start)
    assert result.num_examples == 0
