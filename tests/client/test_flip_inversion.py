"""Batched trigger inversion: against a slow loop with autograd and torch's Adam, and against what it must find."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from client.flip._convolution import fast_input_gradients
from client.flip.inspect import inspect
from client.flip.inversion import invert
from client.flip.techniques import stimulate
from client.flip.triggers import DEFAULTS, InversionSettings, Search, random_start
from tasks.errors import SpecError
from tasks.rng import generator

SHAPE = (2, 7, 7)


def network(dtype=torch.float64) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(54, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)  # so that inputs matter more than biases
    return model


def linear(weight: float, features: int = 4, classes: int = 3) -> tuple[nn.Sequential, nn.Linear]:
    layer = nn.Linear(features, classes).requires_grad_(False)
    layer.weight.fill_(weight)
    return nn.Sequential(nn.Flatten(), layer), layer


def searches(dtype=torch.float64) -> list[Search]:
    g = generator(1, "searches")
    counts = {(0, 1): 5, (1, 0): 3, (2, 1): 8, (0, 2): 1, (1, 2): 0}
    made = []
    for number, ((_, target), count) in enumerate(counts.items()):
        inputs = torch.rand(count, *SHAPE, generator=g, dtype=torch.float64).to(dtype)
        made.append(Search(inputs, target, alpha=1e-3 if number % 2 else 1e-2, summed=number > 2))
    return made


def start(num: int, dtype=torch.float64):
    masks, patterns = random_start(num, SHAPE, generator(1, "start"))
    return masks.to(dtype), patterns.to(dtype)


def slow(model, search, mask, pattern, steps, g, s=DEFAULTS):
    """One search on its own, as one would write it: autograd through the stamping, torch's Adam, plain counters."""
    half = 2 - 1e-7
    us = [torch.atanh((v - 0.5) * half).requires_grad_(True) for v in (mask, pattern)]
    optimizer = torch.optim.Adam(us, lr=s.lr, betas=s.betas)
    alpha, up, down, best, kept = search.alpha, 0, 0, math.inf, (torch.zeros_like(mask), pattern)
    model.eval()
    for _ in range(steps):
        m, p = (torch.tanh(u) / half + 0.5 for u in us)
        logits = model((1 - m) * search.inputs + m * p)
        targets = torch.full((len(search.inputs),), search.target)
        loss = functional.cross_entropy(logits, targets, reduction="sum" if search.summed else "mean")
        optimizer.zero_grad()
        (loss + alpha * m.abs().sum()).backward()
        optimizer.step()
        success = (logits.argmax(1) == targets).double().mean() >= s.threshold
        size, noise = (
            m.detach().sum().item(),
            torch.rand(math.prod(SHAPE[1:]), 1 + SHAPE[0], generator=g, dtype=m.dtype),
        )
        up, down = (up + 1, 0) if success else (0, down + 1)
        if up == s.patience:
            alpha, up = alpha * s.factor, 0
        if down == s.patience:
            alpha, down = alpha / s.factor**1.5, 0
        if success and size < best:
            best, kept = size, (m.detach(), p.detach())
            field = ((2 * noise - 1) * 0.01).T.view(1 + SHAPE[0], *SHAPE[1:])
            with torch.no_grad():
                for u, v, n in zip(us, (m, p), (field[:1], field[1:]), strict=True):
                    u.copy_(torch.atanh(((v + n).clamp(0, 1) - 0.5) * half))
    return kept, 0.0 if best == math.inf else best


def test_equals_a_slow_loop_over_the_searches():
    model, todo, (masks, patterns) = network(), searches(), start(5)
    fast = invert(model, todo, (masks, patterns), 60, generator(1, "noise"))
    for i, search in enumerate(todo[:4]):
        (mask, pattern), size = slow(model, search, masks[i], patterns[i], 60, generator(1, "noise"))
        assert float(fast.sizes[i]) == pytest.approx(size, rel=1e-7)
        torch.testing.assert_close(fast.masks[i], mask.clamp(0, 1), rtol=0, atol=1e-6)
        torch.testing.assert_close(fast.patterns[i], pattern.clamp(0, 1), rtol=0, atol=1e-6)
    assert int(fast.found[:4].sum()) >= 3
    assert not fast.found[4]
    assert not fast.masks[4].any()


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_a_search_does_not_depend_on_what_else_is_in_the_batch(dtype, close):
    model, todo, (masks, patterns) = network(dtype), searches(dtype), start(5, dtype)
    together = invert(model, todo, (masks, patterns), 50, generator(1, "noise"))
    for pick in ([2], [3, 0], [4, 2, 1]):
        alone = invert(model, [todo[i] for i in pick], (masks[pick], patterns[pick]), 50, generator(1, "noise"))
        torch.testing.assert_close(alone.sizes, together.sizes[pick], rtol=close, atol=0)
        torch.testing.assert_close(alone.masks, together.masks[pick], rtol=0, atol=close)


def test_the_model_is_left_as_it_was():
    model = network().train()
    next(model[5].parameters()).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    invert(model, searches(), start(5), 3, generator(1, "noise"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert "forward" not in model[0].__dict__


def test_triggers_are_found_where_they_are_planted():
    model, layer = linear(0.0, 64, 4)
    layer.weight.normal_(0, 0.01, generator=generator(1, "weights"))
    layer.weight[2, [9, 10]] = 8.0  # two pixels that turn anything into class 2
    inputs, labels = torch.rand(24, 1, 8, 8, generator=generator(1, "x")) * 0.1, torch.arange(24) % 4
    seen = inspect(model, inputs, labels, 4, steps=150)
    assert float(seen.distances[[0, 1, 3], 2].max()) < 2.5
    assert int(seen.to_target().argmin()) == 2
    mask, pattern = seen.trigger(0, 2)
    assert {9, 10} & set((mask * pattern).flatten().topk(2).indices.tolist())
    assert len(seen.pairs) == 12
    assert torch.isnan(seen.distances.diagonal()).all()


def test_what_cannot_be_found_has_size_zero():
    model, layer = linear(0.0)
    layer.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    seen = inspect(model, torch.rand(6, 1, 2, 2), torch.arange(6) % 3, 3, steps=12, pairs=[(0, 1), (1, 0)])
    assert seen.triggers.found.tolist() == [False, True]
    assert seen.triggers.sizes[0] == 0
    assert seen.distances[0, 1] == torch.inf
    assert torch.isnan(seen.distances[2, 1])
    with pytest.raises(SpecError, match="0 -> 2 was not inverted"):
        seen.trigger(0, 2)


def test_a_model_that_is_not_finite_gives_no_trigger():
    model, _ = linear(torch.nan)
    found = invert(
        model, [Search(torch.rand(3, 1, 2, 2), 1)], random_start(1, (1, 2, 2), generator(1)), 5, generator(2)
    )
    assert not found.found.any()
    assert torch.isfinite(found.masks).all()


def test_tokens_are_refused():
    searches = [Search(torch.zeros(4, 8, dtype=torch.int64), 1)]
    with pytest.raises(SpecError, match=r"not on torch\.int64"):
        invert(nn.Linear(8, 2), searches, random_start(1, (8,), generator(1)), 5, generator(1))


def test_tables_have_masks_of_their_own_shape():
    model = nn.Linear(5, 3)
    found = invert(model, [Search(torch.rand(4, 5), 2)], random_start(1, (5,), generator(1)), 30, generator(2))
    assert found.masks.shape == found.patterns.shape == (1, 5)


def test_early_exit_stops_when_nothing_improves():
    (model, layer), calls = linear(0.0), []
    layer.bias.copy_(torch.tensor([1.0, 0.0, 0.0]))
    layer.register_forward_hook(lambda *_: calls.append(1))
    todo, begin = [Search(torch.rand(3, 1, 2, 2), 1)], random_start(1, (1, 2, 2), generator(1))
    invert(model, todo, begin, 50, generator(2), InversionSettings(early_exit=7))
    assert len(calls) == 7


def test_a_rounded_search_leaves_the_model_exact_and_its_triggers_hold_on_it():
    model, todo = network(torch.float32), searches(torch.float32)
    before = {name: (value.data_ptr(), value.clone()) for name, value in model.state_dict().items()}
    rough = InversionSettings(threshold=0.6, precision="bfloat16")
    found = invert(model, todo, start(5, torch.float32), 80, generator(3), rough)
    after = model.state_dict()
    assert all(after[n].data_ptr() == at and torch.equal(after[n], value) for n, (at, value) in before.items())
    assert int(found.found.sum()) >= 2
    model.eval()
    for i in found.found.nonzero().flatten().tolist():
        predicted = model(found.stamp(todo[i].inputs, i)).argmax(1)
        assert float((predicted == todo[i].target).float().mean()) >= 0.6
    exact = invert(model, todo, start(5, torch.float32), 80, generator(3), InversionSettings(threshold=0.6))
    assert not torch.equal(exact.masks, found.masks)


def test_a_trigger_that_holds_on_the_rounded_model_alone_does_not_count():
    model, layer = linear(0.0)
    layer.bias.copy_(torch.tensor([1.0 + 2**-12, 1.0, 0.0]))  # equal in bfloat16, where the first of equals wins
    todo, begin = [Search(torch.rand(3, 1, 2, 2), 0)], random_start(1, (1, 2, 2), generator(1))
    rough = InversionSettings(precision="bfloat16")
    assert invert(model, todo, begin, 5, generator(2), rough).found.all()
    layer.bias.copy_(torch.tensor([1.0, 1.0 + 2**-12, 0.0]))
    spoilt = invert(model, todo, begin, 5, generator(2), rough)
    assert not spoilt.found.any()
    assert not spoilt.masks.any()
    assert spoilt.sizes.tolist() == [0.0]


def test_neuron_stimulation_finds_triggers_too():
    model, todo = network(), searches()
    found = stimulate(model, todo[:4], start(4), 80, generator(3), InversionSettings(threshold=0.6))
    assert int(found.found.sum()) >= 2
    which = int(found.found.nonzero()[0])
    model.eval()
    hits = model(found.stamp(todo[which].inputs, which)).argmax(1) == todo[which].target
    assert float(hits.double().mean()) >= 0.6
    with pytest.raises(SpecError, match="linear layer"):
        stimulate(nn.Flatten(), todo[:1], start(1), 2, generator(3), InversionSettings())


@pytest.mark.parametrize("channels", [1, 3, 7])
@pytest.mark.parametrize(
    ("kernel", "padding"), [((5, 5), 0), ((3, 3), 1), ((1, 1), 0), ((4, 2), (3, 1)), ((3, 5), (0, 2))]
)
def test_fast_input_gradients_are_the_gradients(channels, kernel, padding):
    g = generator(1, "conv")
    convolution = nn.Conv2d(channels, 4, kernel, padding=padding).double().requires_grad_(False)
    inputs = torch.randn(2, channels, 11, 9, generator=g, dtype=torch.float64, requires_grad=True)
    expected = convolution(inputs)
    weight = torch.randn(expected.shape, generator=g, dtype=torch.float64)
    (true,) = torch.autograd.grad(expected, inputs, weight)
    with fast_input_gradients(convolution):
        output = convolution(inputs)
        (found,) = torch.autograd.grad(output, inputs, weight)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(found, true)
