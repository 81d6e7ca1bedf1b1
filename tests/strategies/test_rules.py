"""The laws of aggregation, on every rule there is: a new rule's file is found and tried by itself.

A rule that breaks a law names it, with the reason, in `LAWS_NOT_KEPT` of its own file; then the law has to
fail here, so that an exemption cannot outlive its cause. A rule whose arguments cannot be guessed from
`num_byzantine` says what to try in `LAW_ARGUMENTS`.
"""

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from strategies.rule import WeightRule, weighted_sum
from tasks import spec
from tasks.errors import AggregationError
from tasks.rng import generator

NUM_CLIENTS, NUM_BYZANTINE, NUM_PARAMS = 11, 2, 257


def arguments_of(name: str) -> dict[str, object]:
    module = importlib.import_module(f"{spec.PACKAGES['rule']}.{name}")
    given = dict(getattr(module, "LAW_ARGUMENTS", {}))
    if "num_byzantine" in spec.hyper_parameters(spec.find("rule", name)):
        given.setdefault("num_byzantine", NUM_BYZANTINE)
    return given


def exemptions(name: str) -> dict[str, str]:
    return dict(getattr(importlib.import_module(f"{spec.PACKAGES['rule']}.{name}"), "LAWS_NOT_KEPT", {}))


def stack(seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Honest updates: a common direction, noise of their own, and norms that differ by a factor of three."""
    draw = generator(seed, "laws")
    noise = torch.randn(NUM_CLIENTS, NUM_PARAMS, generator=draw, dtype=torch.float64)
    common = torch.randn(NUM_PARAMS, generator=draw, dtype=torch.float64)
    lengths = torch.linspace(0.5, 1.5, NUM_CLIENTS, dtype=torch.float64)[torch.randperm(NUM_CLIENTS, generator=draw)]
    return ((common + noise) * lengths[:, None]).to(dtype)


def close(one: Tensor, other: Tensor, scale: float = 1.0) -> None:
    torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5 * scale)


Rule = Callable[[Tensor], Tensor]


def at_breakdown(rule: Rule, num_clients: int) -> tuple[Rule, int]:
    """Return the rule set for the largest number of outliers, below half, that it accepts, and that number."""
    assert isinstance(rule, spec.Component)
    for f in range((num_clients - 1) // 2, 0, -1):
        given = {"num_byzantine": f} if "num_byzantine" in rule.arguments else {}
        bearing = spec.Component(rule.name, rule.function, {**rule.arguments, **given})
        try:
            bearing(stack()[0].expand(num_clients, -1))
        except AggregationError:
            continue
        return bearing, f
    raise AssertionError(f"{rule} bears no outlier among {num_clients} clients")


def law_client_order(rule: Rule) -> None:
    updates = stack()
    order = torch.randperm(NUM_CLIENTS, generator=generator(2, "order"))
    close(rule(updates[order]), rule(updates))


def law_shift(rule: Rule) -> None:
    updates = stack()
    offset = torch.randn(NUM_PARAMS, generator=generator(3, "offset")) * 10
    close(rule(updates + offset) - offset, rule(updates))


def law_scale(rule: Rule) -> None:
    updates = stack()
    for factor in (1e-2, -3.0, 1e3):
        close(rule(updates * factor) / factor, rule(updates))


def law_unanimity(rule: Rule) -> None:
    update = stack()[0]
    close(rule(update.expand(NUM_CLIENTS, -1).clone()), update)


def law_input_untouched(rule: Rule) -> None:
    updates = stack()
    before = updates.clone()
    rule(updates)
    assert torch.equal(updates, before)


def law_bounded(rule: Rule) -> None:
    """With as many outliers as the rule bears, honest updates in a ball of radius R give a result in a wider ball.

    How much wider is what holds for the geometric median: 2 (n - f) / (n - 2f).
    """
    for num_clients in (10, NUM_CLIENTS, 51):
        bearing, f = at_breakdown(rule, num_clients)
        factor = 2 * (num_clients - f) / (num_clients - 2 * f)
        draw = generator(num_clients, "bounded")
        honest = torch.nn.functional.normalize(
            torch.randn(num_clients, NUM_PARAMS, generator=draw) + torch.randn(NUM_PARAMS, generator=draw)
        )
        directions = torch.nn.functional.normalize(torch.randn(num_clients, NUM_PARAMS, generator=draw))
        outliers = torch.randperm(num_clients, generator=draw)[:f]
        for radius in (1e-3, 1e-2, 1.0):
            for size in (1e2, 1e4, 1e6, 1e8, 1e10, 1e12, 1e30):
                for towards in (directions[0].expand(f, -1), directions[:f]):
                    updates = radius * honest
                    updates[outliers] = size * towards
                    result = float(bearing(updates).double().norm()) / radius
                    assert result <= factor, (
                        f"norm {result:.3g} R with f = {f} of {num_clients} at {size:g}, R = {radius}"
                    )


def law_finite(rule: Rule) -> None:
    for size in (0.0, 1e-30, 1e12, 1e30):
        updates = stack()
        updates[:NUM_BYZANTINE] *= size
        assert rule(updates).isfinite().all()
        assert rule(stack() * size).isfinite().all()


def law_float64(rule: Rule) -> None:
    updates = stack(dtype=torch.float64)
    result = rule(updates)
    assert result.dtype == torch.float64
    order = torch.randperm(NUM_CLIENTS, generator=generator(2, "order"))
    torch.testing.assert_close(rule(updates[order]), result, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(rule(updates.float()).double(), result, rtol=1e-3, atol=1e-4)


def law_shape(rule: Rule) -> None:
    result = rule(stack())
    assert result.shape == (NUM_PARAMS,)
    assert result.dtype == torch.float32


def law_repeatable(rule: Rule) -> None:
    assert torch.equal(rule(stack()), rule(stack()))


def law_weights_reproduce(rule: Rule) -> None:
    weights = weights_of(rule)
    if weights is None:
        return
    updates = stack()
    given = weights(updates)
    assert given.shape == (NUM_CLIENTS,)
    assert given.dtype == torch.float64
    assert bool((given >= 0).all())
    assert torch.equal(weighted_sum(given, updates), rule(updates))


def law_weights_sum_to_one(rule: Rule) -> None:
    weights = weights_of(rule)
    if weights is not None:
        assert abs(float(weights(stack()).sum()) - 1) < 1e-12


LAWS = {name.removeprefix("law_"): value for name, value in list(globals().items()) if name.startswith("law_")}


def weights_of(rule: Rule) -> Callable[[Tensor], Tensor] | None:
    component = rule
    assert isinstance(component, spec.Component)
    weights = getattr(component.function, "weights", None)
    return None if weights is None else lambda updates: weights(updates, **component.arguments)


CASES = [pytest.param(name, law, id=f"{name}-{law}") for name in spec.names("rule") for law in LAWS]


def component_of(name: str) -> spec.Component:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments_of(name).items())
    return spec.resolve("rule", f"{name}({given})")


@pytest.mark.parametrize(("name", "law"), CASES)
def test_rule_keeps_law(name: str, law: str) -> None:
    if law in exemptions(name):
        with pytest.raises(AssertionError):
            LAWS[law](component_of(name))
    else:
        LAWS[law](component_of(name))


@pytest.mark.parametrize("name", spec.names("rule"))
def test_exemptions_name_laws_and_give_reasons(name: str) -> None:
    for law, reason in exemptions(name).items():
        assert law in LAWS, f"{name} exempts itself from {law!r}, which is no law; there are {sorted(LAWS)}"
        assert len(reason) > 20


@pytest.mark.parametrize("name", spec.names("rule"))
def test_rule_reads_as_a_component(name: str) -> None:
    rule = spec.find("rule", name)
    assert rule.__name__ == name
    assert rule.__doc__
    assert rule.__doc__ != WeightRule.__doc__
    assert next(iter(inspect.signature(rule).parameters)) == "updates"
    assert pickle.loads(pickle.dumps(rule)) is rule  # noqa: S301
    assert copy.deepcopy(rule) is rule


@pytest.mark.parametrize("name", spec.names("rule"))
def test_laws_hold_for_views_and_many_blocks(name: str) -> None:
    """A stack that is a view with a stride, and wider than a block, gives what its contiguous copy gives."""
    wide = torch.randn(NUM_CLIENTS, 2 * 33_333, generator=generator(5, "wide"))[:, ::2]
    rule = component_of(name)
    close(rule(wide), rule(wide.contiguous()))
