"""Mixing, rule, optimiser and transforms in a row, and what a round offers to them."""

import pytest
import torch
from torch import Tensor

from strategies.context import RoundContext, feature_columns, needs, supply
from strategies.pipeline import Pipeline, ServerStep
from strategies.rule import Decision, WeightRule, mixing, uniform_weights, weight_rule
from strategies.rules.mean import mean
from strategies.stack import Stack
from tasks.errors import AggregationError, ConfigError
from tasks.params import Layout
from tasks.rng import generator
from tasks.spec import Component, resolve, resolve_chain

UPDATES = torch.randn(6, 40, generator=generator(1))


@mixing
def halves(updates: Stack) -> Tensor:
    """Mean of the first half, mean of the second."""
    matrix = torch.zeros(2, len(updates), dtype=torch.float64)
    matrix[0, : len(updates) // 2] = matrix[1, len(updates) // 2 :] = 2 / len(updates)
    return matrix


@weight_rule
def recall(updates: Stack, previous: Tensor, history: Tensor, clients: list[int]) -> Tensor:
    """Weigh by client id, and by how much was sent before."""
    assert previous.shape == (updates.num_params,)
    return torch.tensor(clients).double() + history.double().norm(dim=1)


@weight_rule
def noisy(updates: Stack, generator: torch.Generator, *, std: float = 0.5) -> Decision:
    """The mean, and noise."""
    return Decision(uniform_weights(updates), std, generator)


def component(rule: WeightRule, **arguments: object) -> Component:
    return Component(rule.__name__, rule, dict(arguments))


def context(number: int = 1, **changes: object) -> RoundContext:
    return RoundContext(clients=range(len(UPDATES)), round=number, seed=5, **changes)  # type: ignore[arg-type]


def test_a_chain_of_mixings_ends_in_weights_of_clients() -> None:
    chain = Pipeline(component(mean), [Component("halves", halves), Component("halves", halves)])
    result = chain.aggregate(UPDATES, context())
    assert result.weights is not None
    torch.testing.assert_close(result.weights, torch.full((6,), 1 / 6, dtype=torch.float64))
    torch.testing.assert_close(result.vector, UPDATES.mean(0))


def test_a_coordinate_rule_sees_the_mixed_rows() -> None:
    wide = torch.randn(6, 70_000, generator=generator(2))
    result = Pipeline(resolve("rule", "median()"), [Component("halves", halves)]).aggregate(wide, context())
    assert result.weights is None
    torch.testing.assert_close(result.vector, torch.stack([wide[:3].mean(0), wide[3:].mean(0)]).mean(0))


def test_claims_scale_the_weights_and_keep_their_sum() -> None:
    claims = [1.0, 1, 1, 1, 1, 5]
    weights = Pipeline(component(mean)).aggregate(UPDATES, context(), claims).weights
    assert weights is not None
    torch.testing.assert_close(weights, torch.tensor(claims, dtype=torch.float64) / 10)


def test_claims_of_nothing_change_nothing() -> None:
    weights = Pipeline(component(mean)).aggregate(UPDATES, context(), [0.0] * 6).weights
    assert weights is not None
    torch.testing.assert_close(weights, torch.full((6,), 1 / 6, dtype=torch.float64))


def test_exposed_attackers_use_up_what_a_rule_assumes() -> None:
    """Krum with f = 2 wants 7 clients; where one of 7 sent garbage and was dropped, one attacker at most is left."""
    krum = Pipeline(resolve("rule", "krum(num_byzantine=2)"), resolve_chain("mixing", "arc(num_byzantine=2)"))
    with pytest.raises(AggregationError, match="n >= 2f"):
        krum.aggregate(UPDATES, context())
    one = Pipeline(resolve("rule", "krum(num_byzantine=1)"), resolve_chain("mixing", "arc(num_byzantine=1)"))
    assert torch.equal(krum.aggregate(UPDATES, context(), exposed=1).vector, one.aggregate(UPDATES, context()).vector)
    none = krum.aggregate(UPDATES, context(), exposed=2)
    assert torch.equal(krum.aggregate(UPDATES, context(), exposed=9).vector, none.vector)


def test_claims_do_not_go_with_rules_that_they_would_undo() -> None:
    with pytest.raises(ConfigError, match="median does not"):
        Pipeline(resolve("rule", "median()")).check(claimed=True)
    for rule in ("fltrust()", "geometric_median()", "centered_clipping()", "foolsgold()"):
        with pytest.raises(ConfigError, match=r"does not go with .*; it goes with .*multi_krum, norm_clipping"):
            Pipeline(resolve("rule", rule)).check(claimed=True)
    with pytest.raises(ConfigError, match=r"mixing bucketing.* it goes with arc, clip_norms"):
        Pipeline(resolve("rule", "mean()"), resolve_chain("mixing", "bucketing(bucket_size=2)")).check(claimed=True)
    with pytest.raises(ConfigError, match="does not go with geometric_median"):
        Pipeline(resolve("rule", "geometric_median()")).aggregate(UPDATES, context(), [1.0] * 6)


@pytest.mark.parametrize(
    ("rule", "mixing"),
    [
        ("norm_clipping(max_norm=1.0)", ""),
        ("weak_dp(max_norm=1.0, std=0.0)", ""),
        ("mean()", "clip_norms(max_norm=1.0)"),
    ],
)
def test_no_claim_undoes_a_clipping(rule: str, mixing: str) -> None:
    """As federated averaging of shortened updates: the sum of claim / all claims times the update, shortened to 1."""
    updates = torch.randn(6, 50, generator=generator(3), dtype=torch.float64)
    updates[5] *= 1000
    shortened = updates / updates.norm(dim=1, keepdim=True).clamp(min=1.0)
    for claims in ([71.0] * 5 + [166.0], [71.0] * 5 + [1e9], [0.0] * 5 + [1.0]):
        result = Pipeline(resolve("rule", rule), resolve_chain("mixing", mixing)).aggregate(updates, context(), claims)
        shares = torch.tensor(claims, dtype=torch.float64) / sum(claims)
        torch.testing.assert_close(result.vector.double(), shares @ shortened)
        assert result.vector.norm() <= 1 + 1e-9


def test_a_rule_that_looks_at_clients_cannot_follow_a_mixing() -> None:
    with pytest.raises(ConfigError, match=r"recall looks at single clients \(history, clients\)"):
        Pipeline(component(recall), [Component("halves", halves)]).check()


def test_as_many_client_ids_as_updates() -> None:
    with pytest.raises(AggregationError, match="5 updates came with 6 client ids"):
        Pipeline(component(mean)).aggregate(UPDATES[:5], context())


def test_noise_is_drawn_from_the_rounds_generator() -> None:
    chain = Pipeline(component(noisy))
    first, again = chain.aggregate(UPDATES, context()).vector, chain.aggregate(UPDATES, context()).vector
    assert torch.equal(first, again)
    assert not torch.equal(first, chain.aggregate(UPDATES, context(2)).vector)
    noise = first - UPDATES.mean(0)
    assert 0.3 < float(noise.std()) < 0.7


def test_history_is_summed_per_client_and_previous_is_the_last_aggregate() -> None:
    rule, memory = component(recall), {}
    one = RoundContext(clients=[4, 1], seed=0, memory=memory)
    Pipeline(rule).aggregate(UPDATES[:2], one)
    two = RoundContext(clients=[1, 9], round=2, memory=one.memory)
    previous, history, clients = supply(rule, two, UPDATES[2:4])
    torch.testing.assert_close(history, torch.stack([UPDATES[1] + UPDATES[2], UPDATES[3]]))
    assert clients == [1, 9]
    torch.testing.assert_close(previous, Pipeline(rule).aggregate(UPDATES[:2], RoundContext([4, 1])).vector)
    assert two.memory["history.clients"].tolist() == [4, 1, 9]


def test_needs_are_known_names() -> None:
    def strange(updates: Tensor, weather: str) -> Tensor: ...

    assert needs(recall) == ("previous", "history", "clients")
    assert needs(mean) == ()
    with pytest.raises(ConfigError, match="strange wants 'weather', but a round offers: clients, round"):
        needs(strange)


def test_root_update_wants_root_samples() -> None:
    @weight_rule
    def trusting(updates: Stack, root_update: Tensor) -> Tensor:
        return uniform_weights(updates) * float(root_update.sum())

    with pytest.raises(AggregationError, match="set root-samples"):
        Pipeline(component(trusting)).aggregate(UPDATES, context())
    result = Pipeline(component(trusting)).aggregate(UPDATES, context(root=lambda: torch.ones(2)))
    torch.testing.assert_close(result.vector, 2 * UPDATES.mean(0))


def test_features_are_the_last_weight_matrix() -> None:
    def rule(updates: Tensor, history: Tensor, *, features: str = "output") -> Tensor: ...

    layout = Layout(("a.weight", "a.bias", "b.weight", "b.bias"), ((3, 4), (3,), (2, 3), (2,)), 23)
    assert feature_columns(Component("rule", rule), layout, 23) == slice(15, 21)
    assert feature_columns(Component("rule", rule, {"features": "all"}), layout, 23) == slice(0, 23)
    assert feature_columns(Component("rule", rule), None, 23) == slice(0, 23)


def test_the_server_step_is_optimizer_then_eta_then_transforms() -> None:
    step = ServerStep(resolve("optimizer", "momentum(beta=0.5)"), [resolve("transform", "clip_model(max_norm=1)")], 0.1)
    model, here = torch.zeros(40), context()
    model = step(model, UPDATES[0], here)
    torch.testing.assert_close(model, 0.1 * UPDATES[0])
    model = step(model, UPDATES[1], here)
    wanted = 0.1 * UPDATES[0] + 0.1 * (0.5 * UPDATES[0] + UPDATES[1])
    torch.testing.assert_close(model, wanted / max(1.0, float(wanted.norm())))
