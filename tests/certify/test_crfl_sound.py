"""Sound CRFL certificates: the numbers of the coupled bound, brute force on small federations, refusals."""

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from certify.bounds import ABSTAINED, simultaneous, two_stage
from certify.crfl import coupled
from certify.crfl.assumptions import assumptions
from certify.crfl.certificates import certify_crfl, shift_lower
from certify.crfl.divergence import divergence_budget_lower, neyman_pearson_shift_lower
from certify.crfl.evidence import Evidence
from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.linear import gradient_norm_upper, lipschitz_upper, smoothness_upper
from certify.record import Certificate
from certify.smoothing.logits import sample_linear_votes
from tasks.errors import CertificationError, RecordError
from tasks.rng import generator

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks is no part of the installed package

from benchmarks.certification.coupled_worlds import Federation, Poison  # noqa: E402

SHA = "0123456789abcdef" * 4
PRINTED = 0.05 * 10 * 30 * 1e-3 * 0.05 * math.sqrt(17)  # c L_Z of the paper's MNIST setting at rho 3


def federation(seed: int = 1, **change: Any) -> Federation:
    """Return 4 clients with 30 points each in 3 dimensions, 3 classes."""
    source = generator(seed, "small")
    inputs = torch.randn(4, 30, 3, generator=source, dtype=torch.float64)
    labels = torch.randint(0, 3, (4, 30), generator=source)
    known: dict[str, Any] = {
        "inputs": inputs, "labels": labels, "num_classes": 3, "batch_size": 10, "rate": 0.05, "clip_norm": 2.0,
        "clip_growth": 0.0,
        "sigma": 0.05, "scale": 2.0, "rows": 3, "attack_round": 2, "num_rounds": 4, "seed": seed,
    }  # fmt: skip
    return Federation(**known | change)


def run_clean(world: Federation, **entries: Any) -> tuple[torch.Tensor, TrainingRecord]:
    released = world.run([world.clean_poison()])[0]
    return released, world.record(released, **entries)


POINTS = torch.randn(40, 3, generator=generator(9, "points"), dtype=torch.float64)


def feature_radii(certificates: list[Certificate]) -> np.ndarray:
    return np.array([certificate.radius for certificate in certificates])


# ---- numbers


def test_the_coupled_forms_at_the_papers_example() -> None:
    """pA 0.7, pB 0.1 with the paper's Lipschitz constant: 1.285 becomes 2.5703 and 2.920."""
    divergence = 0.01 * np.sqrt(2 * divergence_budget_lower(0.7, 0.1))
    neyman_pearson = 0.01 * neyman_pearson_shift_lower(0.7, 0.1)
    assert float(divergence) / PRINTED == pytest.approx(2.5703, abs=5e-5)
    assert float(divergence) / PRINTED == pytest.approx(2 * 1.285160038778, abs=1e-10)
    assert float(neyman_pearson) / PRINTED == pytest.approx(2.920, abs=5e-4)


def test_constants_of_the_loss() -> None:
    assert lipschitz_upper(3.0, 17.18, True) == pytest.approx(27.226, abs=2e-3)
    assert lipschitz_upper(3.0, 17.18, True) / math.sqrt(17) == pytest.approx(6.60, abs=5e-3)
    assert 1 / smoothness_upper(17.2, True) == pytest.approx(6.7e-3, abs=5e-5)
    assert gradient_norm_upper(0.0, True) == pytest.approx(math.sqrt(2))


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 6), st.booleans(), st.floats(0.01, 30))
def test_constants_bound_what_they_say(seed: int, classes: int, bias: bool, size: float) -> None:
    """Random models and pairs of samples: gradients, their change by features, labels and parameters."""
    rng = np.random.default_rng(seed)
    first, second = rng.normal(size=(2, classes, 5)) * rng.exponential(3)
    x, moved = rng.normal(size=(2, 4)) * size

    def gradient(model: np.ndarray, x: np.ndarray, label: int) -> np.ndarray:
        lifted = np.append(x, float(bias))
        logits = model @ lifted
        p = np.exp(logits - logits.max())
        return np.outer(p / p.sum() - np.eye(classes)[label], lifted)

    norm, rho = float(np.linalg.norm(x)), float(np.linalg.norm(first))
    change = float(np.linalg.norm(moved - x))
    slope, step = gradient(first, x, 0), 1 + 1e-12
    assert np.linalg.norm(slope) <= gradient_norm_upper(norm, bias) * step
    by_features = np.linalg.norm(gradient(first, moved, 0) - slope)
    assert by_features <= lipschitz_upper(rho, norm, bias) * change * step, "norm of one of the two samples suffices"
    by_label = np.linalg.norm(gradient(first, moved, 1) - slope)
    assert by_label <= (lipschitz_upper(rho, norm, bias) * change + gradient_norm_upper(norm, bias)) * step
    by_model = np.linalg.norm(gradient(second, x, 0) - slope)
    assert by_model <= smoothness_upper(norm, bias) * np.linalg.norm(second - first) * step


@settings(max_examples=80, deadline=None)
@given(st.floats(1e-6, 10), st.floats(0, 1), st.floats(0, 3), st.floats(1e-9, 100))
def test_deviations_are_inverted_on_the_safe_side(linear: float, constant: float, growth: float, shift: float) -> None:
    bound = coupled.Deviation(linear, constant, growth)
    change = float(bound.change_lower(np.array(shift)))
    if change > 0:
        assert float(bound.upper(change)) < shift
    assert float(bound.upper(change * (1 + 1e-9) + 1e-15)) >= shift * (1 - 1e-9), "no larger change would do"


def test_deviations_at_the_ends() -> None:
    assert coupled.Deviation(1.0, 0.0, 0.1).change_lower(np.array([np.inf, 0.0])).tolist() == [np.inf, 0.0]
    assert coupled.Deviation(0.0, 0.5, 0.0).change_lower(np.array([1.0, 0.4])).tolist() == [np.inf, 0.0]


# ---- brute force


def random_poison(world: Federation, size: float, rng: np.random.Generator, flips: bool, along: bool) -> Poison:
    """Return a poison of norm `size` per row: independent directions, or one for all rows."""
    clean = world.clean_poison()
    shape = (1, 1, 1, 3) if along else clean.inputs.shape
    change = torch.from_numpy(rng.normal(size=shape)).expand_as(clean.inputs)
    change = change * (size / change.norm(dim=-1, keepdim=True))
    labels = torch.from_numpy(rng.integers(0, 3, size=clean.labels.shape)) if flips else clean.labels
    return Poison(clean.inputs + change, labels)


@pytest.mark.parametrize("flips", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_no_poison_moves_the_model_further_than_the_bound(seed: int, flips: bool) -> None:
    world = federation(seed, attackers=2)
    released, record = run_clean(world, label_flips=flips)
    assert record.start_norm is not None
    bound = coupled.deviation(record, record.attacking, record.start_norm)
    rng = np.random.default_rng(seed)
    nearest = 0.0
    for size in (0.0, 0.01, 0.3, 2.0):
        poisons = [
            random_poison(world, max(size, 1e-12), rng, flips, along) for along in (False, True) for _ in range(15)
        ]
        moved = (world.run(poisons) - released).flatten(1).norm(dim=1)
        limit = float(bound.upper(size))
        assert float(moved.max()) <= limit + 1e-12
        nearest = max(nearest, float(moved.max()) / limit if limit > 1e-9 else 0.0)
    assert nearest > 0.05, "the bound is within reach of random poison"


def test_the_bound_is_nearly_reached_by_one_step_of_one_sample() -> None:
    """One attacker, one step, one sample, one round: only the constants of softmax are left to lose."""
    inputs = torch.tensor([[[3.0, 0.0]]], dtype=torch.float64)
    world = Federation(
        inputs=inputs, labels=torch.zeros(1, 1, dtype=torch.long), num_classes=2, batch_size=1, rate=0.05, sigma=0.0,
        clip_norm=50.0, clip_growth=0.0, scale=1.0, rows=1, attack_round=1, num_rounds=1,
    )  # fmt: skip
    released, record = run_clean(world, label_flips=True)
    moved = (world.run([Poison(inputs[None], torch.ones(1, 1, 1, dtype=torch.long))]) - released).norm()
    assert record.start_norm is not None
    limit = float(coupled.deviation(record, record.attacking, record.start_norm).upper(0.0))
    assert float(moved) == pytest.approx(limit, rel=1e-9), "a flipped label moves exactly as far as charged"


def test_scaling_that_an_honest_client_would_not_do_is_charged() -> None:
    """The attacker alone scales; the certificate adds (gamma - 1) of its update, and refuses without its norm."""
    world = federation(3, scale=3.0)
    honest = replace(world, scale=1.0)
    released, record = run_clean(honest)
    start = world.start[0]
    update = float((honest.attacked(honest.clean_poison())[0] - start).norm())
    own = replace(record.work[0], scale=3.0, update_norm=update)
    others = tuple(replace(work, update_norm=1.0) for work in record.work[1:])
    covered = replace(record, counterpart_scaled=False, work=(own, *others))
    assert covered.start_norm is not None
    limit = float(coupled.deviation(covered, covered.attacking, covered.start_norm).upper(0.1))
    rng = np.random.default_rng(1)
    moved = (
        (world.run([random_poison(world, 0.1, rng, False, False) for _ in range(20)]) - released).flatten(1).norm(dim=1)
    )
    assert float(moved.max()) <= limit
    scaled_too = replace(covered, counterpart_scaled=True)
    assert float(moved.min()) > float(coupled.deviation(scaled_too, scaled_too.attacking, 1.0).upper(0.1)) * 0.5
    found = Evidence.margins(honest.network(released), POINTS)
    assert certify_crfl(covered, found)[0].radius < certify_crfl(scaled_too, found)[0].radius
    with pytest.raises(CertificationError, match="scaled_counterpart"):
        certify_crfl(replace(covered, work=(replace(own, update_norm=None), *others)), found)


def aimed(world: Federation, size: float, point: torch.Tensor, best: int, other: int, flips: bool) -> Poison:
    """Return the steepest poison against one point's margin."""
    clean = world.clean_poison()
    labels = torch.full_like(clean.labels, other) if flips else clean.labels
    gap = torch.zeros(3, dtype=torch.float64)
    gap[best], gap[other] = 1, -1
    lifted = torch.cat([point, point.new_ones(1)])
    change = clean.inputs * 0 + size / math.sqrt(3)
    for _ in range(3):
        change = change.detach().requires_grad_(True)
        local = world.attacked(Poison(clean.inputs + change, labels)).sum(0)
        (slope,) = torch.autograd.grad(gap @ local @ lifted, change)
        change = -slope * (size / slope.norm(dim=-1, keepdim=True).clamp(min=1e-300))
    return Poison((clean.inputs + change).detach(), labels)


@pytest.mark.parametrize("form", ["margin", "neyman_pearson", "divergence"])
@pytest.mark.parametrize("flips", [False, True])
def test_no_attack_inside_a_certified_radius_succeeds(form: Any, flips: bool) -> None:
    world = federation(5, rate=0.02)
    released, record = run_clean(world, label_flips=flips)
    network = world.network(released)
    found = Evidence.margins(network, POINTS) if form == "margin" else Evidence.exact(network, POINTS, world.sigma)
    certificates = certify_crfl(record, found, form=form)
    assert all(certificate.sound for certificate in certificates)
    radii = feature_radii(certificates)
    rng = np.random.default_rng(1)
    sure = np.flatnonzero(radii > 0)
    assert len(sure) > 10
    poisons, sizes = [], []
    for index in sure[np.argsort(radii[sure])][:12]:
        size = float(min(radii[index], 50.0)) * (1 - 1e-9)
        label = certificates[index].label
        assert label is not None
        others = [other for other in range(3) if other != label]
        poisons += [aimed(world, size, POINTS[index], label, other, flips) for other in others]
        poisons += [random_poison(world, size, rng, flips, along) for along in (False, True)]
        sizes += [size] * 4
    labels = (world.run(poisons) @ torch.cat([POINTS, torch.ones(40, 1)], 1).T.double()).argmax(1).numpy()
    clean = np.array([-1 if c.label is None else c.label for c in certificates])
    inside = np.array(sizes)[:, None] < radii
    assert inside.sum() > 200
    assert not (inside & (labels != clean)).any()
    far = [
        aimed(world, 40.0, POINTS[i], int(clean[i]), int(o), flips) for i in sure[:8] for o in range(3) if o != clean[i]
    ]
    outside = (world.run(far) @ torch.cat([POINTS, torch.ones(40, 1)], 1).T.double()).argmax(1).numpy()
    assert (outside != clean)[:, sure].any(), "the attack is one that works outside"


@pytest.mark.parametrize("seed", range(5))
def test_radii_never_exceed_the_exact_radius_by_brute_force(seed: int) -> None:
    """One client, one sample of two features, one step: every direction and size tried, in plain numpy."""
    source = generator(seed, "tiny")
    world = Federation(
        inputs=torch.randn(1, 1, 2, generator=source, dtype=torch.float64) * 2,
        labels=torch.zeros(1, 1, dtype=torch.long),
        num_classes=3, batch_size=1, rate=0.05, sigma=0.1, clip_norm=1.5, clip_growth=0.0, scale=3.0, rows=1,
        attack_round=1, num_rounds=1, seed=seed,
    )  # fmt: skip
    released, record = run_clean(world)
    points = POINTS[:, :2]
    found = Evidence.margins(world.network(released), points)
    radii = feature_radii(certify_crfl(record, found))
    sizes, angles = np.geomspace(1e-3, 50, 200), np.linspace(0, 2 * np.pi, 91)
    circle = np.stack([np.cos(angles), np.sin(angles)], 1)
    moved = world.inputs[0, 0].numpy() + sizes[:, None, None] * circle
    lifted = np.concatenate([moved, np.ones((*moved.shape[:2], 1))], 2)
    start = world.start[0].numpy()
    logits = lifted @ start.T
    share = np.exp(logits) / np.exp(logits).sum(2, keepdims=True) - np.eye(3)[0]
    models = start - 0.05 * 3.0 * share[..., :, None] * lifted[..., None, :]
    norms = np.linalg.norm(models, axis=(2, 3), keepdims=True)
    models = models / np.maximum(1, norms / 1.5)
    tested = np.concatenate([points.numpy(), np.ones((len(points), 1))], 1)
    labels = (models @ tested.T).argmax(2)
    changed = (labels != found.label).any(1)
    exact = np.where(changed.any(0), sizes[changed.argmax(0)], np.inf)
    assert (radii < exact).all()
    reached = np.isfinite(exact)
    assert (exact / radii)[reached].min() < 20, "some radius is within reach of the exact one"


def test_replaced_samples_and_counted_clients() -> None:
    """At the sample level any rows of the norm may come, as many as certified; at the client level any clients."""
    world = federation(6, rate=0.02, scale=1.0, rows=1)
    released, record = run_clean(world)
    found = Evidence.margins(world.network(released), POINTS)
    bound = float(world.inputs.norm(dim=2).max())
    samples = feature_radii(certify_crfl(record, found, level="sample"))
    clients = feature_radii(certify_crfl(record, found, level="client"))
    assert {0, 1} < set(samples) and max(samples) <= 10  # noqa: PT018
    assert {0, 1} < set(clients) and max(clients) <= 4  # noqa: PT018
    clean = (released @ torch.cat([POINTS, torch.ones(40, 1)], 1).T.double()).argmax(0).numpy()
    for level, radii in (("sample", samples), ("client", clients)):
        for number in (1, 2, 3):
            inside = radii >= number
            armed = replace(world, rows=number) if level == "sample" else replace(world, attackers=number)
            poisons = []
            for index in np.flatnonzero(inside)[np.argsort(found.bounds["shift_lower"][inside])][:10]:
                for other in range(3):
                    rows = armed.clean_poison()
                    best = POINTS[index] / POINTS[index].norm() * bound
                    poisons.append(Poison(best.expand_as(rows.inputs).clone(), torch.full_like(rows.labels, other)))
            if poisons:
                labels = (armed.run(poisons) @ torch.cat([POINTS, torch.ones(40, 1)], 1).T.double()).argmax(1).numpy()
                assert not (labels != clean)[:, inside].any(), (level, number)


# ---- coverage: the whole statement, votes included


@pytest.mark.parametrize("bound", ["two_stage", "simultaneous"])
def test_sampled_certificates_hold_at_their_level(bound: str) -> None:
    """In 300 seeds, a certificate from 60 votes claims more than the exact radius in a share alpha at most."""
    world = federation(7, rate=0.02)
    released, record = run_clean(world)
    network = world.network(released)
    exact = Evidence.margins(network, POINTS[:1])
    truth, label = feature_radii(certify_crfl(record, exact))[0], int(exact.label[0])
    wrong = claimed = 0
    for seed in range(300):
        votes = sample_linear_votes(network, POINTS[:1], sigma=world.sigma, num_draws=60, seed=seed)
        if bound == "two_stage":
            first = sample_linear_votes(network, POINTS[:1], sigma=world.sigma, num_draws=10, seed=seed, stream="first")
            bounds = two_stage(first.counts, votes.counts, 60, 0.2)
        else:
            bounds = simultaneous(votes.counts, 60, 0.2)
        (one,) = certify_crfl(record, Evidence.from_votes(votes, bounds))
        claimed += one.label is not None
        wrong += one.label is not None and (one.label != label or one.radius > truth)
    assert claimed > 100
    assert wrong <= 300 * 0.2 + 4 * math.sqrt(300 * 0.2 * 0.8)


def test_two_classes_gain_nothing_from_noise() -> None:
    """With two classes the exact votes' Neyman-Pearson distance is the margin's, up to the error of quadrature."""
    world = federation(8)
    world = replace(world, labels=world.labels.clamp(max=1), num_classes=2)
    released, record = run_clean(world)
    network = world.network(released)
    margin = shift_lower(record, Evidence.margins(network, POINTS), "margin")
    voted = Evidence.exact(network, POINTS, world.sigma)
    vote = shift_lower(record, voted, "neyman_pearson")
    near = (voted.bounds["pa_lower"] < 1 - 1e-6) & (voted.label != ABSTAINED)
    assert near.sum() > 10
    assert vote[near] == pytest.approx(margin[near], rel=1e-5, abs=1e-9)
    divergence = shift_lower(record, voted, "divergence")
    assert (divergence[near] <= vote[near]).all(), "Neyman and Pearson's lemma is the tight one"
    assert (divergence[near] > 0.5 * vote[near]).all()


# ---- the marginal law


def amplified(record: TrainingRecord, deviation: float) -> float:
    return coupled.amplified_divergence_upper(record, deviation)


def with_rounds(record: TrainingRecord, number: int, **change: Any) -> TrainingRecord:
    return replace(record, rounds=(replace(record.rounds[0], **change),) * number)


def test_amplification_adds_the_noise_of_all_rounds() -> None:
    _, record = run_clean(federation())
    flat = with_rounds(replace(record, smoothing_sigma=0.01), 100, noise=0.01, clip_norm=3.0)
    flat = replace(flat, attack_round=10)
    assert amplified(flat, 0.003) == pytest.approx(0.003**2 / (2 * 91 * 0.01**2))
    shift = float(coupled.amplified_shift_lower(flat, divergence_budget_lower(np.array(0.7), np.array(0.1))))
    assert shift / PRINTED == pytest.approx(1.285160038778 * 2 * math.sqrt(91), rel=1e-9)
    assert shift / PRINTED / 1.285160038778 == pytest.approx(19, abs=0.1), "91 rounds: 19 times the paper's radius"
    assert amplified(flat, 0.0) == 0.0


@pytest.mark.parametrize("clip_norm", [0.05, 0.5])
def test_the_marginal_bound_holds_where_the_densities_can_be_followed(clip_norm: float) -> None:
    """One dimension, exact propagation of densities: noise, clip, contraction by a strongly convex step, repeat."""
    sigma, deviation, rounds = 0.1, 0.08, 6
    grid = np.linspace(-1.5, 1.5, 1501)
    kernel_of = lambda mean: np.exp(-0.5 * ((grid - mean) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))  # noqa: E731
    width = grid[1] - grid[0]
    step = np.clip(grid - 0.05 * np.tanh(grid), -clip_norm, clip_norm)
    transition = np.stack([kernel_of(mean) for mean in step])
    first, second = kernel_of(0.0), kernel_of(deviation)
    _, record = run_clean(federation())
    for number in range(1, rounds + 1):
        exact = float(np.sum(second * np.log(np.maximum(second, 1e-300) / np.maximum(first, 1e-300))) * width)
        run = with_rounds(
            replace(record, smoothing_sigma=sigma, attack_round=1), number, noise=sigma, clip_norm=clip_norm
        )
        run = replace(run, start_norm=1.0)
        assert exact <= amplified(run, deviation) * (1 + 1e-6) + 1e-12
        assert exact > 0.0
        first, second = first @ transition * width, second @ transition * width


def test_the_marginal_form_wants_votes_of_trainings() -> None:
    world = federation()
    released, record = run_clean(world)
    network = world.network(released)
    one = Evidence.exact(network, POINTS, world.sigma)
    with pytest.raises(CertificationError, match="law_of_votes"):
        certify_crfl(record, one, form="marginal")
    with pytest.raises(CertificationError, match="law_of_votes"):
        certify_crfl(record, replace(one, independent_trainings=True), form="marginal")
    many = replace(one, independent_trainings=True, method="given")
    certificates = certify_crfl(record, many, form="marginal")
    assert {a.name: a.status for a in certificates[0].assumptions}["law_of_votes"] == "stated"
    counts, hashes = np.array([[3, 0, 0]] * len(POINTS)), tuple(f"{i:064x}" for i in range(3))
    for trainings, status in ((hashes, "checked"), (hashes[:2], "violated"), ((SHA,) * 3, "violated")):
        found = replace(many, counts=counts, trainings=trainings)
        assert {a.name: a.status for a in assumptions(record, found, "marginal")}["law_of_votes"] == status
    last = record.rounds[0]
    assert coupled.marginal_start_norm(record) == pytest.approx(math.hypot(last.clip_norm or 0, 0.05 * math.sqrt(12)))
    assert coupled.marginal_start_norm(replace(record, attack_round=1)) == record.start_norm


# ---- what stands in the way


def settled() -> tuple[TrainingRecord, Evidence]:
    world = federation()
    released, record = run_clean(world)
    return record, Evidence.exact(world.network(released), POINTS[:3], world.sigma)


def partial(record: TrainingRecord) -> TrainingRecord:
    absent = replace(record.rounds[0], participants=(0, 1), weights=(0.5, 0.5), learning_rates=(0.05, 0.05))
    return replace(record, rounds=(*record.rounds[:-1], absent))


def fast(record: TrainingRecord) -> TrainingRecord:
    rate = 2.01 / smoothness_upper(record.data_norm_bound, True)
    return replace(record, rounds=(*record.rounds[:-1], replace(record.rounds[0], learning_rates=(rate,) * 4)))


BROKEN: dict[str, Callable[[TrainingRecord], TrainingRecord]] = {
    "convex_loss": lambda r: replace(r, model="small_cnn()"),
    "plain_sgd": lambda r: replace(r, momentum=0.5),
    "gradient clip 1.0": lambda r: replace(r, gradient_clip=1.0),
    "server_step": lambda r: replace(r, server_optimizer="adam"),
    "weights sum to 1.5": lambda r: replace(r, server_lr=1.5),
    "fixed_weights .* heuristic": lambda r: replace(r, rule="geometric_median()"),
    "full_participation": partial,
    "step_size": fast,
    "same_batches": lambda r: replace(r, same_batches=False),
    "update_limit": lambda r: replace(r, max_update_norm=1e-3),
    "start_norm": lambda r: replace(r, start_norm=None),
    "data_norm": lambda r: replace(r, data_norm_found=r.data_norm_bound * 1.01),
    "smoothing_noise": lambda r: replace(r, smoothing_sigma=0.0),
    "released_model": lambda r: replace(r, model_sha256=SHA),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_assumption_is_refused(name: str) -> None:
    record, found = settled()
    assert certify_crfl(record, found)
    with pytest.raises(CertificationError, match=f"no sound certificate: .*{name}"):
        certify_crfl(BROKEN[name](record), found)


def test_a_bound_below_its_level_is_refused() -> None:
    record, found = settled()
    with pytest.raises(CertificationError, match="confidence"):
        certify_crfl(record, replace(found, method="crfl_top_two/hoeffding"))


def test_margins_need_no_noise_and_weight_decay_is_no_hindrance() -> None:
    world = federation(sigma=0.0)
    released, record = run_clean(world)
    assert certify_crfl(record, Evidence.margins(world.network(released), POINTS))[0].radius > 0
    record, found = settled()
    assert certify_crfl(replace(record, weight_decay=1e-3), found)[0].sound


def test_flips_and_replacement_cost_radius() -> None:
    record, found = settled()
    free, flips = (feature_radii(certify_crfl(replace(record, label_flips=f), found)) for f in (False, True))
    assert (flips <= free).all() and flips.sum() < free.sum()  # noqa: PT018
    slight, any_sample = (
        feature_radii(certify_crfl(record, found, level="sample", change_norm=c)) for c in (1e-3, None)
    )
    assert (any_sample <= slight).all() and any_sample.sum() < slight.sum()  # noqa: PT018
    certificate = certify_crfl(record, found, level="sample")[0]
    assert {a.name: a.status for a in certificate.assumptions}["data_norm"] == "stated"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"certificate": "printed"}, "certificate must be sound or paper"), ({"level": "input"}, "level must be"),
        ({"form": "kl"}, "form must be"), ({"form": "margin"}, "does not go with votes"),
        ({"change_norm": 1.0}, "must be None"), ({"level": "client", "change_norm": -1.0}, "change_norm must be"),
    ],
)  # fmt: skip
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    record, found = settled()
    with pytest.raises(CertificationError, match=message):
        certify_crfl(record, found, **arguments)


def test_unfinished_votes_are_no_evidence() -> None:
    world = federation()
    released, _ = run_clean(world)
    votes = sample_linear_votes(world.network(released), POINTS, sigma=0.05, num_draws=20, seed=1)
    with pytest.raises(CertificationError, match="19 of 20 draws"):
        Evidence.from_votes(replace(votes, num_draws=19), simultaneous(votes.counts, 20, 0.1))


# ---- certificates and records travel


def test_every_certificate_survives_its_line() -> None:
    record, found = settled()
    for certificate in certify_crfl(record, found):
        assert Certificate.from_json(certificate.to_json()) == certificate
        assert certificate.method == "crfl/sound/neyman_pearson/exact/quadrature"
        assert certificate.model_sha256 == record.model_sha256


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    _, record = run_clean(federation(), label_flips=True)
    record.save(tmp_path / "record.json")
    assert TrainingRecord.load(tmp_path / "record.json") == record
    for text, message in (("{", "is JSON"), ("[]", "schema 1"), ('{"schema": 1}', "missing")):
        with pytest.raises(RecordError, match=message):
            TrainingRecord.from_json(text)
    with pytest.raises(RecordError, match=r"unknown \['more'\]"):
        TrainingRecord.from_json(record.to_json().replace("{", '{"more": 1,', 1))
    with pytest.raises(RecordError, match="no training record"):
        TrainingRecord.load(tmp_path / "missing")


def test_a_record_is_held_against_the_data() -> None:
    world = federation()
    _, record = run_clean(world)
    longest = float(world.inputs.norm(dim=2).max())
    blank = replace(record, data_norm_found=None, data_norm_bound=longest + 1e-9)
    assert {a.name: a.status for a in assumptions(blank, settled()[1], "coupled")}["data_norm"] == "stated"
    first = blank.checked_against(world.inputs[0])
    both = first.checked_against(world.inputs[1:].flatten(0, 1))
    assert longest <= (both.data_norm_found or 0.0) <= longest * (1 + 1e-12)
    assert {a.name: a.status for a in assumptions(both, settled()[1], "coupled")}["data_norm"] == "checked"
    with pytest.raises(RecordError, match="inputs must have norm"):
        blank.checked_against(world.inputs[0] * 5)


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 20.0), st.floats(1.0, 4.0), st.booleans(), st.integers(1, 9))
def test_more_attack_never_has_a_larger_sound_radius(more: float, gamma: float, flips: bool, rows: int) -> None:
    _, record = run_clean(federation(), label_flips=flips)
    shift = np.linspace(0, 5, 30)
    start = record.start_norm
    assert start is not None

    def radii(run: TrainingRecord, norm: float) -> list[np.ndarray]:
        counts = [
            level(run, shift, norm, c) for level in (coupled.sample_radius, coupled.client_radius) for c in (0.1, None)
        ]
        return [coupled.feature_radius(run, shift, norm), *counts]

    def armed(**change: Any) -> TrainingRecord:
        return replace(record, work=(replace(record.work[0], **change), *record.work[1:]))

    base = radii(record, start)
    assert all((np.diff(found) >= 0).all() for found in base), "a vote that survives more has the larger radius"
    stronger = [
        radii(record, start * more), radii(replace(record, data_norm_bound=record.data_norm_bound * more), start),
        radii(armed(scale=record.work[0].scale * gamma), start), radii(replace(record, label_flips=True), start),
        radii(armed(poisoned=(max(rows, 3),) * 3), start),
    ]  # fmt: skip
    for other in stronger:
        assert all((a >= b).all() for a, b in zip(base, other, strict=True))


WRONG: list[tuple[Callable[[TrainingRecord], Any], str]] = [
    (lambda r: replace(r, attack_round=5), "attack_round must be from 1 to 4"),
    (lambda r: replace(r, attackers=()), "attackers must be participants"),
    (lambda r: replace(r, attackers=(9,)), "attackers must be participants"),
    (lambda r: replace(r, attackers=(1,)), "only attackers have poisoned"),
    (lambda r: replace(r, work=r.work[1:]), "every participant"),
    (lambda r: replace(r, work=(replace(r.work[0], weight=0.5), *r.work[1:])), "with its weight"),
    (lambda r: replace(r, num_clients=3), "numbered below 3"),
    (lambda r: replace(r, smoothing_sigma=math.nan), "smoothing_sigma must be 0 or more"),
    (lambda r: replace(r, label_flips=1), "label_flips must be true or false"),
    (lambda r: replace(r.work[0], poisoned=(11, 0, 0)), "from 0 to the batch size"),
    (lambda r: replace(r.work[0], batch_sizes=(10,)), "one batch size and poisoned count each"),
    (lambda r: replace(r.work[0], scale=0.0), "scale must be above 0"),
    (lambda r: replace(r.rounds[0], participants=(0, 0, 1, 2)), "each once"),
    (lambda r: replace(r.rounds[0], weights=(1.0,)), "equally many"),
    (lambda r: replace(r.rounds[0], clip_norm=0.0), "clip_norm above 0"),
    (lambda r: replace(r.rounds[0], noise=-1.0), "noise must be 0 or more"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message for _, message in WRONG])
def test_contradictory_records_are_refused(change: Callable[[TrainingRecord], Any], message: str) -> None:
    _, record = run_clean(federation())
    with pytest.raises(RecordError, match=message):
        change(record)


def test_steps_are_counted_as_they_were_taken() -> None:
    """A short last batch with as many poisoned rows weighs more than its step."""
    work = ClientWork(client=0, weight=1.0, learning_rate=0.1, batch_sizes=(10, 10, 5), poisoned=(2, 2, 2))
    assert work.poisoned_share == pytest.approx(0.2 + 0.2 + 0.4)
    assert RoundWork(participants=(0,), weights=(1.0,), learning_rates=(0.1,), clip_norm=None, noise=0.0)
