"""FLIP's theory checked on finished runs: two models, without and with the defence, on every test sample.

Zhang et al., "FLIP" (ICLR 2023), section 4, and `certify.flip`: Theorem 1's bounds against the loss changes themselves,
on clean and on backdoored samples; the trigger-recovery radius against draws inside it, corners and worst corners among
them, and against the worst corner just outside; and the counts of Table 4. An experiment file asks for it in its table

    [theory]
    draws = 10000
    [theory.pairs.single]
    label = "single-shot"
    before = "single_no_defence"    # arms; they differ in how honest clients train
    after = "single_flip"
    paper = [8843, 8458, 5816, 476] # clean right before, after; attacks before, after
"""

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from certify.bounds import Floats
from certify.flip.bounds import LossBounds, exact_loss_change, linear_change, loss_bounds
from certify.flip.counts import Comparison, compare, count
from certify.flip.radius import RecoveryRadius, printed_norm_radius, recovery_radius, worst_errors
from client.attack import read_attack
from client.flip.inversion import invert
from client.flip.triggers import Search, random_start
from hawthorn.experiment import Experiment
from server.record import RunRecord, read_model, read_run
from server.writer import MAY_CHANGE
from tasks.errors import ConfigError, RecordError
from tasks.params import bind
from tasks.rng import generator
from tasks.task import Task, load

BATCH = 500
DEFENCE = {"training", "rule", "mixing", "transform", "optimizer", "root_samples", "gate", "tau"}  # may differ
OUTSIDE = 1.01  # of the radius
STEPS, IMAGES = 400, 64  # of the inversion that a recovered trigger comes from


@dataclass(frozen=True)
class Pair:
    """Two arms to compare; `paper` are Table 4's counts, if the paper has them."""

    name: str
    label: str
    before: str
    after: str
    paper: tuple[int, ...] = ()


@dataclass(frozen=True)
class Theory:
    """What an experiment file asks for."""

    pairs: tuple[Pair, ...]
    draws: int = 10_000


@dataclass(frozen=True)
class OnSamples:
    """Theorem 1 on one set of samples."""

    samples: int
    change: float  # the sum of the samples' loss changes
    bounds: LossBounds
    violations: int  # samples whose loss change lies outside Theorem 1's bounds, or outside the tighter ones

    @property
    def least_targets(self) -> int:
        """Samples whose label is surely an argmin of the logit differences: their lower bound is 0."""
        return int(self.bounds.target_least.sum())


@dataclass(frozen=True)
class OnRadius:
    """The recovery radius around one trigger."""

    trigger: str
    radius: RecoveryRadius
    printed_norm: RecoveryRadius
    within: int  # samples on which the true trigger lies inside the radius around this one
    draws: int = 0
    violations: int = 0
    tried_outside: int = 0
    broken_outside: int = 0


@dataclass(frozen=True)
class Checked:
    """All that was found about one pair; `problem` says why there is nothing."""

    pair: Pair
    clean: OnSamples | None = None
    backdoored: OnSamples | None = None
    clean_right: tuple[int, int] = (0, 0)  # accepted and right, before and after
    attacks_accepted: tuple[int, int] = (0, 0)  # before and after, each at its run's own tau
    attacks: Comparison | None = None  # both at the second run's tau, as Corollary 1 speaks of them
    radii: list[OnRadius] = field(default_factory=list)
    problem: str = ""


def read_theory(path: Path, experiment: Experiment) -> Theory | None:
    """Read the table `[theory]` of an experiment file, None without one; raises `ConfigError`."""
    content = tomllib.loads(path.read_text()).get("theory")
    if content is None:
        return None
    labels = [arm.label for arm in experiment.arms]
    pairs = []
    for name, table in content.get("pairs", {}).items():
        try:
            pair = Pair(name, **{"label": name, **table, "paper": tuple(table.get("paper", ()))})
        except TypeError as error:
            raise ConfigError(f"{path}: [theory.pairs.{name}]: {error}") from None
        if pair.before not in labels or pair.after not in labels:
            raise ConfigError(f"{path}: [theory.pairs.{name}] wants two of the arms {', '.join(labels)}")
        pairs.append(pair)
    draws = content.get("draws", 10_000)
    if not pairs or type(draws) is not int or draws < 1:
        raise ConfigError(f"{path}: [theory] wants pairs, and draws of at least 1, got {len(pairs)} and {draws!r}")
    return Theory(tuple(pairs), draws)


def check_pair(pair: Pair, before: Path, after: Path, draws: int) -> Checked:
    """Check one pair of finished runs; raises `RecordError` for runs that differ in more than the defence."""
    first, second = read_run(before), read_run(after)
    task = _same_task(first, second)
    models = [_double(task, run) for run in (first, second)]
    clean, triggered = _test_inputs(task, first)
    if not all(torch.equal(*both) for both in zip(triggered, _test_inputs(task, second)[1])):
        raise RecordError(f"{first.folder} and {second.folder} differ in more than the defence: the attack's trigger")
    (inputs, labels), (attacked, wanted) = clean, triggered
    before_clean, after_clean = (_logits(model, inputs) for model in models)
    before_bad, after_bad = (_logits(model, attacked) for model in models)
    taus = first.config.tau, second.config.tau
    right = [count(z, labels, t).accepted_wanted for z, t in zip((before_clean, after_clean), taus)]
    hit = [count(z, wanted, t).accepted_wanted for z, t in zip((before_bad, after_bad), taus)]
    return Checked(
        pair,
        _on_samples(before_clean, after_clean, labels),
        _on_samples(before_bad, after_bad, wanted),
        (right[0], right[1]),
        (hit[0], hit[1]),
        compare(before_bad, after_bad, wanted, second.config.tau),
        list(_radii(task, first, models, attacked, wanted, draws)),
    )


def _same_task(first: RunRecord, second: RunRecord) -> Task:
    """Return the task of both; the attack's text may differ in how attackers train, its trigger is compared later."""
    ours, theirs = vars(first.config), vars(second.config)
    free = DEFENCE | MAY_CHANGE - {"num_rounds"} | {"attack", "eval_every", "keep_updates", "keep_models"}
    if differ := [key for key in ours if key not in free and not key.startswith("gate_") and ours[key] != theirs[key]]:
        raise RecordError(f"{first.folder} and {second.folder} differ in more than the defence: {', '.join(differ)}")
    return load(first.config)


def _double(task: Task, run: RunRecord) -> nn.Module:
    """Return the final model of a run in float64; its parameters are exactly those of the file."""
    model = task.build_model().double().eval()
    bind(model, task.layout, read_model(run.folder / "model.safetensors", task.layout).double())
    return model


def _test_inputs(task: Task, run: RunRecord) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (inputs, labels) of the test split, and (inputs, wanted labels) of those the attack applies to."""
    attack = read_attack(run.config.attack)
    if attack.triggered is None:
        raise RecordError(f"{run.folder}: the attack {run.config.attack!r} has no trigger at test time")
    inputs, labels = task.dataset.batch("test", slice(0, None))
    attacked, wanted, counts = attack.triggered(inputs, labels, task.dataset.num_classes)
    return (inputs, labels), (attacked[counts], wanted[counts])


@torch.no_grad()
def _logits(model: nn.Module, inputs: Tensor) -> Floats:
    return torch.cat([model(part.double()) for part in inputs.split(BATCH)]).numpy()


def _on_samples(before: Floats, after: Floats, labels: Tensor) -> OnSamples:
    bounds, change = loss_bounds(before, after, labels), exact_loss_change(before, after, labels)
    slack = 1e-11 * (1 + np.abs(before).max(axis=1) + np.abs(after).max(axis=1))  # of the change, computed in float64
    inside = (bounds.tight_lower - slack <= change) & (change <= bounds.tight_upper + slack)
    return OnSamples(len(labels), float(change.sum()), bounds, int((~inside).sum()))


def _radii(
    task: Task, run: RunRecord, models: list[nn.Module], attacked: Tensor, wanted: Tensor, draws: int
) -> Iterator[OnRadius]:
    """Yield what the radius says around the true trigger and around an inverted one; nothing of other than W x + b."""
    layers = [[m for m in model.modules() if not len(list(m.children()))] for model in models]
    linear = [m for each in layers for m in each if isinstance(m, nn.Linear)]
    if len(linear) != 2 or not all(isinstance(m, nn.Linear | nn.Flatten) for each in layers for m in each):
        return
    first, second = linear
    weight = (second.weight.detach() - first.weight.detach()).numpy()
    bias = None if first.bias is None else (second.bias.detach() - first.bias.detach()).numpy()
    true, target = attacked.flatten(1).double().numpy(), wanted.numpy()
    radius = recovery_radius(weight, true, target, bias_change=bias)
    printed = printed_norm_radius(weight, true, target, bias_change=bias)
    inside, outside = _draw(weight, bias, true, radius, draws, run.config.seed)
    yield OnRadius("true", radius, printed, int(radius.certified.sum()), *inside, *outside)
    stamped = (
        _inverted(task, run, int(target[0])).flatten(1).double().numpy() if len(set(target.tolist())) == 1 else true
    )
    near = recovery_radius(weight, stamped, target, bias_change=bias)
    printed = printed_norm_radius(weight, stamped, target, bias_change=bias)
    within = (np.abs(stamped - true).max(axis=1) <= near.radius) & near.certified
    inside, outside = _draw(weight, bias, stamped, near, draws, run.config.seed)
    yield OnRadius("inverted", near, printed, int(within.sum()), *inside, *outside)


def _inverted(task: Task, run: RunRecord, target: int) -> Tensor:
    """Return the attacked test inputs with the trigger that inversion finds on the model without the defence."""
    model = task.build_model().eval()
    bind(model, task.layout, read_model(run.folder / "model.safetensors", task.layout))
    draw = generator(run.config.seed, "theory", "inversion")
    share = task.partition[next(c for c in range(run.config.num_clients) if c not in run.config.malicious_ids)]
    chosen = share[task.dataset.train_labels[share] != target][:IMAGES]
    searches = [Search(task.dataset.batch("train", chosen)[0], target)]
    triggers = invert(model, searches, random_start(1, task.dataset.input_shape, draw), STEPS, draw)
    inputs, labels = task.dataset.batch("test", slice(0, None))
    return triggers.stamp(inputs[labels != target], 0)


def _draw(
    weight: Floats, bias: Floats | None, center: Floats, found: RecoveryRadius, draws: int, seed: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return (draws, violations) inside the radius and (tries, broken) just outside it.

    A third of the draws is uniform in the ball, a third are random corners, a third the worst corner.
    """
    sure = np.flatnonzero(found.certified & np.isfinite(found.radius))
    if not len(sure):
        return (0, 0), (0, 0)
    random = np.random.default_rng(generator(seed, "theory", "draws").initial_seed())
    violations = 0
    for part in np.array_split(np.arange(draws), -(-draws // 1000)):
        chosen = random.choice(sure, len(part))
        radius = found.radius[chosen][:, None]
        errors = random.uniform(-1, 1, (len(part), center.shape[1]))
        corner, worst = part % 3 == 1, part % 3 == 2
        errors[corner] = np.where(errors[corner] < 0, -1.0, 1.0)
        errors *= radius
        some = RecoveryRadius(found.radius[chosen], found.limiting[chosen], found.target[chosen])
        errors[worst] = worst_errors(weight, some, some.radius)[worst]
        violations += int(_breaks(weight, bias, center[chosen] - errors, some).sum())
    at = sure[: min(len(sure), 1000)]
    some = RecoveryRadius(found.radius[at], found.limiting[at], found.target[at])
    beyond = _breaks(weight, bias, center[at] - worst_errors(weight, some, OUTSIDE * some.radius), some)
    return (draws, violations), (len(at), int(beyond.sum()))


def _breaks(weight: Floats, bias: Floats | None, inputs: Floats, found: RecoveryRadius) -> np.ndarray:
    """Return where some class's logit difference is surely below the target's."""
    change, errors = linear_change(weight, inputs, bias)
    rows = np.arange(len(inputs))
    return (change[rows, found.target] - errors[rows, found.target])[:, None] > (change + errors).min(1, keepdims=True)


def summary(found: list[Checked]) -> list[dict[str, Any]]:
    """Return one flat mapping per pair and set of samples or trigger, in the order of the checks."""
    return [row for each in found for row in _rows(each)]


def _rows(each: Checked) -> Iterator[dict[str, Any]]:
    first = {"pair": each.pair.name, "label": each.pair.label}
    if each.problem or each.clean is None or each.backdoored is None or each.attacks is None:
        yield {**first, "what": "", "note": each.problem}
        return
    paper = each.pair.paper or ("", "", "", "")
    for name, on, counts, theirs in (
        ("clean", each.clean, each.clean_right, paper[:2]),
        ("backdoored", each.backdoored, each.attacks_accepted, paper[2:]),
    ):
        yield {
            **first,
            "what": name,
            "samples": on.samples,
            "accepted_before": counts[0],
            "accepted_after": counts[1],
            "paper_before": theirs[0],
            "paper_after": theirs[1],
            "loss_change": on.change,
            "lower": on.bounds.sum_lower,
            "tight_lower": on.bounds.sum_tight_lower,
            "tight_upper": on.bounds.sum_tight_upper,
            "upper": on.bounds.sum_upper,
            "violations": on.violations,
            "label_least": on.least_targets,
        }
    for on in each.radii:
        sizes = on.radius.radius[on.radius.certified]
        printed = on.printed_norm.radius[on.radius.certified]
        yield {
            **first,
            "what": f"radius, {on.trigger} trigger",
            "samples": len(on.radius.radius),
            "certified": int(on.radius.certified.sum()),
            "radius_min": float(sizes.min()) if len(sizes) else None,
            "radius_median": float(np.median(sizes)) if len(sizes) else None,
            "radius_max": float(sizes.max()) if len(sizes) else None,
            "printed_norm_median": float(np.median(printed)) if len(sizes) else None,
            "within": on.within,
            "draws": on.draws,
            "violations": on.violations,
            "tried_outside": on.tried_outside,
            "broken_outside": on.broken_outside,
        }
