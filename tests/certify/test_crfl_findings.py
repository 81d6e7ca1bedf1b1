"""Ways in which a CRFL certificate would claim too much, each with worlds in which the claim is seen to fail or not."""

import json
import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from certify.bounds import simultaneous
from certify.crfl import coupled
from certify.crfl.assumptions import assumptions
from certify.crfl.certificates import BrokenAssumption, certify_crfl
from certify.crfl.evidence import Evidence
from certify.crfl.training_record import CLIP_ERROR, ClientWork, RoundWork, TrainingRecord
from certify.network import Network
from certify.smoothing.sampled import count_votes
from tasks.errors import CertificationError, RecordError

Model = tuple[np.ndarray, np.ndarray]


def record(network: Network | None = None, **entries: Any) -> TrainingRecord:
    """Return a run of one round, one feature and two classes; the first client poisons `poisoned` of each batch."""
    known: dict[str, Any] = {
        "clients": 1,
        "rate": 0.1,
        "batch": 1,
        "poisoned": 1,
        "scale": 1.0,
        "steps": 1,
        "updates": None,
        "num_rounds": 1,
    }
    clients, rate, batch, poisoned, scale, steps, updates, rounds = (entries.pop(k, v) for k, v in known.items())
    weights = (1 / clients,) * clients
    work = RoundWork(
        participants=tuple(range(clients)),
        weights=weights,
        learning_rates=(rate,) * clients,
        clip_norm=100.0,
        noise=0.1,
    )
    local = tuple(
        ClientWork(
            client=c,
            weight=weights[c],
            learning_rate=rate,
            batch_sizes=(batch,) * steps,
            poisoned=(0 if c else poisoned,) * steps,
            scale=1.0 if c else scale,
            update_norm=None if updates is None else updates[c],
        )
        for c in range(clients)
    )
    told: dict[str, Any] = {
        "model": "logistic_regression()",
        "bias": True,
        "num_classes": 2,
        "num_params": 4,
        "num_clients": clients,
        "rounds": (work,) * rounds,
        "smoothing_sigma": 0.1,
        "attack_round": 1,
        "attackers": (0,),
        "work": local,
        "label_flips": True,
        "data_norm_bound": 1.0,
        "data_norm_found": 1.0,
        "start_norm": 10.0,
        "clip_error": 0.0,
        "model_sha256": None if network is None else network.sha256(),
    }
    return TrainingRecord(**told | entries)


def linear(model: Model, bias: bool = True) -> Network:
    tensors = {"w": torch.tensor(model[0])} | ({"b": torch.tensor(model[1])} if bias else {})
    described = {"kind": "linear", "weight": "w"} | ({"bias": "b"} if bias else {})
    return Network.from_parts([described], tensors, (model[0].shape[1],))


def step(model: Model, x: float, label: int, rate: float) -> Model:
    """Return the update of one step of gradient descent on one sample."""
    z = model[0][:, 0] * x + model[1]
    p = np.exp(z - z.max())
    residual = p / p.sum() - np.eye(2)[label]
    return -rate * residual[:, None] * x, -rate * residual


def moved(model: Model, *updates: tuple[float, Model]) -> Model:
    return model[0] + sum(f * u[0] for f, u in updates), model[1] + sum(f * u[1] for f, u in updates)


def norm(update: Model) -> float:
    return math.sqrt((update[0] ** 2).sum() + (update[1] ** 2).sum()) * (1 + 1e-9)


def label_of(model: Model, x: float) -> int:
    return int((model[0][:, 0] * x + model[1]).argmax())


def statuses(run: TrainingRecord, found: Evidence, statement: Any = "coupled", **more: Any) -> dict[str, str]:
    return {a.name: a.status for a in assumptions(run, found, statement, **more)}


ZERO: Model = (np.zeros((2, 1)), np.zeros(2))
PLAIN: Model = (np.array([[1.0], [0.0]]), np.zeros(2))
POINT = torch.tensor([[1.0]])
HOST = Evidence.margins(linear(PLAIN), POINT)


# ---- scaling


def test_client_level_charges_scales_that_others_were_not_recorded_with() -> None:
    """Client 0 was recorded scaling by 10; in the other worlds client 1 scales too, or instead."""
    start: Model = (np.array([[1.0], [-1.0]]), np.zeros(2))
    updates = [step(start, x, 0, 0.1) for x in (1.0, -0.5)]
    worlds = [
        moved(start, (0.5 * a, updates[0]), (0.5 * b, updates[1])) for a, b in ((10, 1), (10, 10), (1, 10), (1, 1))
    ]
    network = linear(worlds[0])
    run = record(network, clients=2, scale=10.0, batch=100, updates=[norm(u) for u in updates], start_norm=1.4143)
    points = np.linspace(-1, 1, 401)
    found = Evidence.margins(network, torch.tensor(points)[:, None])
    certificates = certify_crfl(run, found, level="client")
    changed = 0
    for x, certificate in zip(points, certificates, strict=True):
        for world in worlds[1:]:
            changed += label_of(world, x) != label_of(worlds[0], x)
            assert certificate.label is None or label_of(world, x) == certificate.label
    assert changed > 0
    assert any(certificate.label is not None for certificate in certificates), "the charge leaves something"
    unknown = replace(run, work=tuple(replace(work, update_norm=None) for work in run.work))
    with pytest.raises(CertificationError, match="scaled_counterpart"):
        certify_crfl(unknown, found, level="client")
    with pytest.raises(CertificationError, match="update_norm"):
        coupled.client_radius(unknown, np.ones(1), 1.4143, None)
    assert certify_crfl(unknown, found, level="sample"), "the recorded attackers scale in both worlds"
    assert statuses(run, HOST, "printed", client_level=True)["scaled_counterpart"] == "violated"


def test_a_scale_below_one_is_charged_as_the_honest_one() -> None:
    """The attacker shrinks his update, an honest client would not: what is sent there is whole."""
    start: Model = (np.array([[6.0], [-6.0]]), np.zeros(2))
    poison, honest = step(start, 1.0, 0, 0.5), step(start, 1.0, 1, 0.5)
    attacked, clean = moved(start, (0.1, poison)), moved(start, (1.0, honest))
    run = record(
        linear(attacked), rate=0.5, scale=0.1, updates=[norm(poison) + 1e-9], counterpart_scaled=False, start_norm=8.49
    )
    apart = norm((attacked[0] - clean[0], attacked[1] - clean[1])) / (1 + 1e-9)
    for replaced in (True, False):
        assert apart <= float(coupled.deviation(run, run.attacking, 8.49, replaced).upper(0.0))
    assert coupled.sample_radius(run, np.array([apart, apart * 0.9]), 8.49, None).tolist() == [0, 0]


def test_sample_and_client_counts_are_those_of_the_bound_evaluated_one_by_one() -> None:
    one: dict[str, Any] = {"weight": 0.5, "learning_rate": 0.1, "batch_sizes": (7, 2), "update_norm": 0.3}
    works = (
        ClientWork(client=0, **dict[str, Any](one, batch_sizes=(9, 9, 4)), poisoned=(3, 3, 3), scale=2.0),
        ClientWork(client=1, **one, poisoned=(1, 0)),
        ClientWork(client=2, **dict[str, Any](one, weight=0.0), poisoned=(0, 0)),
    )
    rounds = (
        RoundWork(participants=(0, 1, 2), weights=(0.5, 0.5, 0.0), learning_rates=(0.1,) * 3, clip_norm=9.0, noise=0.0),
    )
    for same in (True, False):
        run = record(clients=1, counterpart_scaled=same, rounds=rounds, work=works, attackers=(0, 1), num_clients=3)
        shift = np.linspace(0, 3, 200)
        for change in (0.3, None):
            by_count = []
            for count in range(1, 10):
                armed = [replace(w, poisoned=tuple(min(count, n) for n in w.batch_sizes)) for w in works[:2]]
                by_count.append(float(coupled.deviation(run, armed, 10.0, change is None).upper(change or 0.0)))
            assert coupled.sample_radius(run, shift, 10.0, change).tolist() == np.searchsorted(by_count, shift).tolist()
            assert len(set(np.searchsorted(by_count, shift).tolist())) > 0
            clients = coupled.client_radius(run, shift, 10.0, change)
            assert (np.diff(clients) >= 0).all()
            assert set(clients.tolist()) >= {0, 3}


# ---- the model behind the evidence


def test_the_network_is_held_against_the_record() -> None:
    """Without bias in the record, the gradient's bound would miss the bias that the network has."""
    with pytest.raises(CertificationError, match=r"model_form .*bias is False in the record"):
        certify_crfl(record(bias=False, model="logistic_regression(bias=False)"), HOST)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"num_params": 6}, "num_params"), ({"num_classes": 4}, "classes"), ({"dtype": "float32"}, "dtype"),
    ]  # fmt: skip
    for change, what in wrong:
        with pytest.raises(CertificationError, match=rf"model_form .*{what}"):
            certify_crfl(record(**change), HOST)
    with pytest.raises(CertificationError, match=r"convex_loss .*bias is True in the record"):
        certify_crfl(record(model="logistic_regression(bias=False)"), HOST)
    assert statuses(record(dtype="float64"), HOST)["model_form"] == "checked"
    assert statuses(record(), replace(HOST, form=None))["model_form"] == "stated"


def test_votes_of_another_kind_of_network_are_refused() -> None:
    described = [{"kind": "linear", "weight": "w"}, {"kind": "relu"}, {"kind": "linear", "weight": "v"}]
    deep = Network.from_parts(described, {"w": torch.eye(2), "v": torch.eye(2)}, (2,))
    normal = [{"kind": "normalise", "mean": [0.5], "std": [0.01]}, {"kind": "linear", "weight": "w", "bias": "b"}]
    scaled = Network.from_parts(normal, {"w": torch.zeros(2, 1), "b": torch.ones(2)}, (1,))
    for network, run in ((deep, record(num_params=8)), (scaled, record())):
        votes = count_votes(network, torch.ones(1, *network.input_shape), sigma=0.1, num_draws=50, seed=0)
        found = Evidence.from_votes(votes, simultaneous(votes.counts, 50, 0.1))
        with pytest.raises(CertificationError, match=r"model_form .*no softmax regression"):
            certify_crfl(run, found)
        unseen = Evidence.from_votes(replace(votes, form=None), simultaneous(votes.counts, 50, 0.1))
        assert statuses(run, unseen)["model_form"] == "stated"
        again = Evidence.from_votes(replace(votes, form=None), simultaneous(votes.counts, 50, 0.1), network=network)
        assert statuses(run, again)["model_form"] == "violated"
        with pytest.raises(CertificationError, match="the votes are of model"):
            Evidence.from_votes(votes, simultaneous(votes.counts, 50, 0.1), network=linear(PLAIN))


# ---- texts


WRONG_TEXTS: list[tuple[dict[str, Any], str]] = [
    ({"rule": "mean() | krum(num_byzantine=1)"}, "fixed_weights"), ({"rule": "mean()|anything"}, "fixed_weights"),
    ({"rule": "mean(x"}, "fixed_weights"), ({"rule": ""}, "fixed_weights"),
    ({"model": "logistic_regression() | mnist_net()"}, "convex_loss"),
    ({"model": "logistic_regression(hidden=999)"}, "convex_loss"),
    ({"model": "logistic_regression(mean=(0.5,), std=(0.01,))"}, "convex_loss"),
    ({"training": "sgd(lr=0.1, momentum=0.9)"}, "local_training"), ({"training": "sgd(lr=0.2)"}, "local_training"),
    ({"training": "sgd(lr=0.1, decay_at=(0.5,), decay_by=2.0)"}, "local_training"),
    ({"training": "sgd(lr=0.1, max_gradient_norm=0.05)"}, "local_training"),
    ({"training": "flip(lr=0.1)"}, "local_training"), ({"training": "adversarial(lr=0.1, eps=0.1)"}, "local_training"),
    ({"training": "something()"}, "local_training"), ({"training": ""}, "local_training"),
    ({"transform": "crfl(rho=100.0, sigma=0.1) | clip_model(max_norm=1.0)"}, "transform"),
    ({"transform": "crfl(rho=99.0, sigma=0.1)"}, "transform"), ({"transform": ""}, "transform"),
    ({"transform": "gaussian_noise(std=0.1)"}, "transform"),
    ({"optimizer": "adam()"}, "optimizer"), ({"mixing": "bucketing(size=2)"}, "mixing"),
    ({"collusion": "min_max()"}, "collusion"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name"), WRONG_TEXTS, ids=[str(change) for change, _ in WRONG_TEXTS])
def test_texts_that_the_theorems_do_not_speak_of_are_refused(change: dict[str, Any], name: str) -> None:
    with pytest.raises(CertificationError, match=rf"no sound certificate: .*{name}"):
        certify_crfl(record(**change), HOST)


def test_texts_are_checked_where_they_are_there_and_stated_where_not() -> None:
    names = ("local_training", "transform", "optimizer", "mixing", "collusion")
    assert {statuses(record(), HOST)[name] for name in names} == {"stated"}
    told = record(
        training="sgd(lr=0.1, decay_at=(0.5,))",
        transform="crfl(rho=99.0, slope=1.0, sigma=0.1)",
        optimizer="step()",
        mixing="",
        collusion="",
    )
    assert {statuses(told, HOST)[name] for name in names} == {"checked"}
    with pytest.raises(CertificationError, match=r"clip_error \(the clip lies within 0 rho"):
        certify_crfl(told, HOST)
    assert certify_crfl(replace(told, clip_error=CLIP_ERROR), HOST)[0].sound
    later = record(num_rounds=2, transform="crfl(rho=100.0, sigma=0.2)")
    assert statuses(later, HOST)["transform"] == "violated", "the noise is 0.1 in the record"


def test_records_without_the_texts_are_still_read() -> None:
    run = record(training="sgd(lr=0.1)", clip_error=0.5)
    old = json.loads(run.to_json())
    for name in ("training", "transform", "optimizer", "mixing", "collusion", "dtype", "clip_error"):
        del old[name]
    for work in old["rounds"]:
        del work["model_norm"]
    read = TrainingRecord.from_json(json.dumps(old))
    assert (read.training, read.clip_error) == (None, CLIP_ERROR)
    assert TrainingRecord.from_json(run.to_json()) == run
    del old["rule"], old["model"]
    with pytest.raises(RecordError, match=r"missing \['model'\]"):
        TrainingRecord.from_json(json.dumps(old))


# ---- laws, poison, weights, the clip


def test_one_models_votes_are_not_believed_to_be_of_many_trainings() -> None:
    votes = count_votes(linear(PLAIN), POINT, sigma=0.1, num_draws=100, seed=0)
    found = Evidence.from_votes(votes, simultaneous(votes.counts, 100, 0.01), independent_trainings=True)
    with pytest.raises(CertificationError, match="law_of_votes"):
        certify_crfl(record(), found, form="marginal")


def test_the_marginal_form_takes_no_norm_from_one_run() -> None:
    run = record(scale=3.0, updates=[1e-6], counterpart_scaled=False)
    one = coupled.deviation(run, run.attacking, 10.0).constant
    every = coupled.deviation(run, run.attacking, 10.0, any_training=True).constant
    assert every - one == pytest.approx(2 * (0.1 * 2 - 1e-6), rel=1e-6)
    with pytest.raises(CertificationError, match="weight decay"):
        coupled.deviation(replace(run, weight_decay=0.1), run.attacking, 10.0, any_training=True)


def test_attackers_without_poison_certify_nothing_at_the_levels_that_take_it_as_recorded() -> None:
    run = record(poisoned=0)
    assert [certify_crfl(run, HOST, level=level)[0].label for level in ("feature", "client")] == [None, None]
    assert coupled.sample_radius(run, np.array([1e9]), 10.0, None).tolist() == [1], "all of a batch of one"
    votes = Evidence.exact(linear(PLAIN), POINT, 0.1)
    with pytest.warns(BrokenAssumption):
        assert certify_crfl(run, votes, certificate="paper")[0].label is None
    with pytest.warns(BrokenAssumption):
        assert certify_crfl(run, votes, certificate="paper", level="client", change_norm=0.1)[0].label is None


def test_weights_that_sum_above_one_are_charged_round_by_round() -> None:
    run = record(num_rounds=101)
    heavy = replace(run, rounds=(run.rounds[0], *(replace(run.rounds[0], weights=(1 + 5e-7,)),) * 100))
    assert 1 <= coupled.expansion_upper(run) <= 1 + 1e-12
    assert coupled.expansion_upper(heavy) == pytest.approx((1 + 1e-6) ** 100, rel=1e-12)
    assert coupled.expansion_upper(heavy) >= (1 + 1e-6) ** 100 * (1 - 1e-15)
    least = coupled.survived_lower(heavy, np.array([1.0]))
    assert float(least[0]) == pytest.approx(1 - 1e-4, rel=1e-6)
    shift = coupled.amplified_shift_lower(run, np.array([0.3]))
    assert coupled.amplified_shift_lower(heavy, np.array([0.3])) == pytest.approx(shift / (1 + 1e-6) ** 100, rel=1e-9)


def float32_clip(model: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the model clipped as the product does: 2^-22 below the bound, in float32."""
    norm = float(torch.linalg.vector_norm(model.double()))
    return model if norm <= bound else model * (bound / norm * (1 - 2.0**-22))


def test_the_clip_as_it_is_run_brings_models_further_apart_than_the_exact_one_and_is_charged() -> None:
    generator = torch.Generator().manual_seed(1)
    run = record(clip_error=CLIP_ERROR)
    run = replace(run, rounds=(replace(run.rounds[0], clip_norm=5.0),))
    (charge,) = (float(error) for error in coupled.clip_errors(run))
    wider = 0
    for _ in range(200):
        first = torch.randn(50, generator=generator)
        first = first * (5 / first.norm()) * (1 - 1e-7)
        second = first * (1 + 10 ** (-8 + 2 * float(torch.rand(1, generator=generator))))
        before = float((first.double() - second.double()).norm())
        after = float((float32_clip(first, 5.0).double() - float32_clip(second, 5.0).double()).norm())
        wider += after > before
        assert after <= before + charge
    assert wider > 10
    assert float(coupled.survived_lower(run, np.array([1.0]))[0]) == pytest.approx(1 - charge, rel=1e-11)
    inside = replace(run, rounds=(replace(run.rounds[0], model_norm=2.0),))
    shift = np.array([1.0, 2.9, 3.1])
    lost = (shift - coupled.survived_lower(inside, shift)) > charge / 2
    assert lost.tolist() == [False, False, True], "no model within the shift is clipped"
    noisy = replace(run, rounds=(replace(run.rounds[0], noise=1e-3),), smoothing_sigma=1e-3)
    budget = np.array([0.3])
    free, charged = (coupled.amplified_shift_lower(r, budget) for r in (replace(noisy, clip_error=0.0), noisy))
    assert float(free[0] - charged[0]) == pytest.approx(charge, rel=1e-6), "in one round the noise hides both alike"


# ---- cost


def test_large_records_are_quick_or_refused() -> None:
    begun = time.process_time()
    batch = record(batch=10**6, steps=5)
    assert certify_crfl(batch, HOST, level="sample")[0].radius == 249_999, "2 q / n < 0.5"
    many = record(clients=4000)
    assert certify_crfl(many, HOST, level="client")[0].radius > 0
    votes = Evidence.exact(linear(PLAIN), POINT, 0.1)
    for run, level in ((batch, "sample"), (many, "client")):
        with pytest.warns(BrokenAssumption):
            certify_crfl(run, votes, certificate="paper", level=level, change_norm=0.1)  # type: ignore[arg-type]
    assert time.process_time() - begun < 10
    for level in ("sample", "client"):
        with pytest.raises(CertificationError, match="stopped"):
            certify_crfl(batch, HOST, level=level, should_stop=lambda: True)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match="steps at most"):
        record(steps=5_000_001)
    with pytest.raises(RecordError, match=r"rounds, .* at most"):
        record(num_rounds=100_001)
    with pytest.raises(RecordError, match="samples at most"):
        record(batch=2**31 + 1)
    with pytest.raises(RecordError, match="weights must be numbers"):
        RoundWork(participants=(0,), weights=(10**400,), learning_rates=(0.1,), clip_norm=None, noise=0.0)
