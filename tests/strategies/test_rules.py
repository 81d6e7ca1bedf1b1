"""The laws of aggregation, on every rule there is: a new rule's file is found and tried by itself.

A rule that breaks a law names it, with the reason, in `LAWS_NOT_KEPT` of its own file; then the law has to
fail here, so that an exemption cannot outlive its cause. A rule whose arguments cannot be guessed from
`num_byzantine` says what to try in `LAW_ARGUMENTS`.

A law gives a rule a `Round`: the updates together with what a rule may want besides them. Whatever a law does to
the updates, it does to all of it, as a federation would: a shift moves the server's own update as well.
"""

import copy
import importlib
import inspect
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from strategies.context import PER_CLIENT, RoundContext, needs, supply
from strategies.rule import CoordinateRule, Stack, StackRule, WeightRule, weighted_sum
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


@dataclass(frozen=True)
class Round:
    """The updates of a round and all that a rule may want besides; values alike in every call, generators included."""

    updates: Tensor  # [clients, params]
    clients: tuple[int, ...]
    previous: Tensor  # [params], float32
    root_update: Tensor  # [params], float32
    matrix: Tensor | None = None  # the updates come mixed by it

    @staticmethod
    def of(updates: Tensor, root_update: Tensor | None = None) -> "Round":
        """Return a first round: its history is its updates, and the server's own update is in the middle of them."""
        root_update = updates.median(0).values if root_update is None else root_update
        clients = tuple(range(len(updates)))
        return Round(updates, clients, torch.zeros(updates.shape[1]), root_update.float())

    def ordered(self, order: Tensor) -> "Round":
        return replace(self, updates=self.updates[order], clients=tuple(self.clients[i] for i in order.tolist()))

    def rearranged(self, order: Tensor) -> "Round":
        moved = [one[..., order] for one in (self.updates, self.previous, self.root_update)]
        return replace(self, updates=moved[0], previous=moved[1], root_update=moved[2])

    def shifted(self, offset: Tensor) -> "Round":
        moved = [one + offset.to(one) for one in (self.updates, self.previous, self.root_update)]
        return replace(self, updates=moved[0], previous=moved[1], root_update=moved[2])

    def scaled(self, factor: float) -> "Round":
        scaled = [factor * one for one in (self.updates, self.previous, self.root_update)]
        return replace(self, updates=scaled[0], previous=scaled[1], root_update=scaled[2])


@dataclass(frozen=True)
class Rule:
    """A rule with its hyper-parameters, to be called with a `Round`."""

    component: spec.Component

    def __call__(self, given: Round) -> Tensor:
        return self.component(self._updates(given), *self._besides(given))

    def weights(self, given: Round) -> Tensor | None:
        """Return the weights of the updates, None for a rule that has none."""
        if not isinstance(self.component.function, WeightRule):
            return None
        function, arguments = self.component.function, self.component.arguments
        return function.weights(self._updates(given), *self._besides(given), **arguments)

    def wants(self, *names: str) -> bool:
        return bool(set(names) & set(needs(self.component.function)))

    def set(self, **arguments: object) -> "Rule":
        """Return the rule with other arguments, as far as it has them."""
        known = spec.hyper_parameters(self.component.function)
        own = {key: value for key, value in arguments.items() if key in known}
        return Rule(replace(self.component, arguments={**self.component.arguments, **own}))

    def _updates(self, given: Round) -> Tensor | Stack:
        return given.updates if given.matrix is None else Stack.of(given.updates).mixed(given.matrix)

    def _besides(self, given: Round) -> tuple[object, ...]:
        memory = {"previous": given.previous}
        context = RoundContext(given.clients, seed=9, root=lambda: given.root_update, memory=memory)
        return supply(self.component, context, given.updates)


def at_breakdown(rule: Rule, num_clients: int) -> tuple[Rule, int]:
    """Return the rule set for the largest number of outliers, below half, that it accepts, and that number."""
    for f in range((num_clients - 1) // 2, 0, -1):
        bearing = rule.set(num_byzantine=f)
        try:
            bearing(Round.of(stack()[0].expand(num_clients, -1)))
        except AggregationError:
            continue
        return bearing, f
    raise AssertionError(f"{rule} bears no outlier among {num_clients} clients")


def law_client_order(rule: Rule) -> None:
    given = Round.of(stack())
    order = torch.randperm(NUM_CLIENTS, generator=generator(2, "order"))
    close(rule(given.ordered(order)), rule(given))


def law_shift(rule: Rule) -> None:
    given = Round.of(stack())
    offset = torch.randn(NUM_PARAMS, generator=generator(3, "offset")) * 10
    close(rule(given.shifted(offset)) - offset, rule(given))


def law_scale(rule: Rule) -> None:
    given = Round.of(stack())
    for factor in (1e-2, -3.0, 1e3):
        close(rule(given.scaled(factor)) / factor, rule(given))


def law_unanimity(rule: Rule) -> None:
    update = stack()[0]
    close(rule(Round.of(update.expand(NUM_CLIENTS, -1).clone())), update)


def law_input_untouched(rule: Rule) -> None:
    given = Round.of(stack())
    before = copy.deepcopy(given)
    rule(given)
    for name in ("updates", "previous", "root_update"):
        assert torch.equal(getattr(given, name), getattr(before, name)), name


def law_bounded(rule: Rule) -> None:
    """With as many outliers as the rule bears, honest updates in a ball of radius R give a result in a wider ball.

    How much wider is what holds for the geometric median: 2 (n - f) / (n - 2f). The server's own update is honest.
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
                    result = float(bearing(Round.of(updates, radius * honest[0])).double().norm()) / radius
                    assert result <= factor, (
                        f"norm {result:.3g} R with f = {f} of {num_clients} at {size:g}, R = {radius}"
                    )


def law_finite(rule: Rule) -> None:
    for size in (0.0, 1e-30, 1e12, 1e30):
        updates = stack()
        updates[:NUM_BYZANTINE] *= size
        assert rule(Round.of(updates)).isfinite().all()
        assert rule(Round.of(stack() * size)).isfinite().all()


def law_float64(rule: Rule) -> None:
    given = Round.of(stack(dtype=torch.float64))
    result = rule(given)
    assert result.dtype == torch.float64
    order = torch.randperm(NUM_PARAMS, generator=generator(2, "order"))
    torch.testing.assert_close(rule(given.rearranged(order)), result[order], rtol=1e-11, atol=1e-12)
    narrow = replace(given, updates=given.updates.float())
    torch.testing.assert_close(rule(narrow).double(), result, rtol=1e-3, atol=1e-4)


def law_shape(rule: Rule) -> None:
    result = rule(Round.of(stack()))
    assert result.shape == (NUM_PARAMS,)
    assert result.dtype == torch.float32


def law_repeatable(rule: Rule) -> None:
    assert torch.equal(rule(Round.of(stack())), rule(Round.of(stack())))


def law_mixed(rule: Rule) -> None:
    """A stack that is mixed in n x n space gives what the mixed rows give when they are written down.

    A rule that looks at single clients is never given mixtures.
    """
    if rule.wants(*PER_CLIENT):
        return
    given = Round.of(stack())
    near = torch.rand(NUM_CLIENTS, NUM_CLIENTS, generator=generator(4, "mixed"), dtype=torch.float64)
    averages = near.square() / near.square().sum(1, keepdim=True)
    shorter = torch.diag(torch.linspace(0.3, 1.0, NUM_CLIENTS, dtype=torch.float64))
    for matrix in (averages, shorter):
        written = replace(given, updates=matrix.float() @ given.updates)
        close(rule(replace(given, matrix=matrix)), rule(written))


def law_weights_reproduce(rule: Rule) -> None:
    given = Round.of(stack())
    weights = rule.weights(given)
    if weights is None:
        return
    assert weights.shape == (NUM_CLIENTS,)
    assert weights.dtype == torch.float64
    assert bool((weights >= 0).all())
    assert torch.equal(weighted_sum(weights, given.updates), rule(given))


def law_weights_sum_to_one(rule: Rule) -> None:
    weights = rule.weights(Round.of(stack()))
    if weights is not None:
        assert abs(float(weights.sum()) - 1) < 1e-12


LAWS: dict[str, Callable[[Rule], None]] = {
    name.removeprefix("law_"): value for name, value in list(globals().items()) if name.startswith("law_")
}


CASES = [pytest.param(name, law, id=f"{name}-{law}") for name in spec.names("rule") for law in LAWS]


def rule_of(name: str) -> Rule:
    given = ", ".join(f"{key}={value!r}" for key, value in arguments_of(name).items())
    return Rule(spec.resolve("rule", f"{name}({given})"))


@pytest.mark.parametrize(("name", "law"), CASES)
def test_rule_keeps_law(name: str, law: str) -> None:
    if law in exemptions(name):
        with pytest.raises(AssertionError):
            LAWS[law](rule_of(name))
    else:
        LAWS[law](rule_of(name))


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
    assert rule.__doc__ not in [kind.__doc__ for kind in (WeightRule, CoordinateRule, StackRule)]
    assert next(iter(inspect.signature(rule).parameters)) == "updates"
    assert pickle.loads(pickle.dumps(rule)) is rule  # noqa: S301
    assert copy.deepcopy(rule) is rule


@pytest.mark.parametrize("name", spec.names("rule"))
def test_laws_hold_for_views_and_many_blocks(name: str) -> None:
    """A stack that is a view with a stride, and wider than a block, gives what its contiguous copy gives."""
    wide = torch.randn(NUM_CLIENTS, 2 * 33_333, generator=generator(5, "wide"))[:, ::2]
    rule = rule_of(name)
    close(rule(Round.of(wide)), rule(Round.of(wide.contiguous())))


CLAIMABLE = [name for name in spec.names("rule") if getattr(spec.find("rule", name), "takes_claims", False)]


@pytest.mark.parametrize("name", CLAIMABLE)
def test_rules_that_take_claims_give_equal_weights_to_those_they_admit(name: str) -> None:
    """Then claims in units of their mean over these make a weighted mean, and no claim outweighs a rule's doubts."""
    updates = torch.nn.functional.normalize(torch.randn(NUM_CLIENTS, NUM_PARAMS, generator=generator(4)), dim=1)
    rule = spec.Component(name, spec.find("rule", name), arguments_of(name))
    offered = supply(rule, RoundContext(clients=range(NUM_CLIENTS)), updates)
    weights = rule.function.decide(updates, *offered, **rule.arguments).weights  # type: ignore[attr-defined]
    admitted = weights[weights > 0]
    torch.testing.assert_close(admitted, torch.full_like(admitted, 1 / len(admitted)))
