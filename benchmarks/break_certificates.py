"""Try to break CRFL certificates on real MNIST: poison inside and just outside the certified radius.

    python benchmarks/break_certificates.py [--rounds 3] [--targets 8] [--clients 20] [--samples 60000] [--seed 1]
                                            [--data-dir FOLDER] [--json OUT]

Worlds that share start, batches and noise are trained with and without poison; a certificate is broken where a test
point's label differs although the poison was smaller than its radius. Poison is aimed: at points whose radius is just
above (or just below) its size, its direction the gradient of the target's margin through the attacker's local
training; besides, random directions and a common trigger. Sound certificates must never break. Corollary 1 as printed
is attacked where Lemma 1 does not reach: labels that flip, and an attacker whose samples are long.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.certification.coupled_worlds import Federation, Poison
from certify.crfl import corollary, coupled
from certify.crfl.divergence import divergence_budget_lower, neyman_pearson_shift_lower
from certify.crfl.evidence import Evidence
from tasks.datasets.mnist import mnist
from tasks.errors import HawthornError
from tasks.rng import generator
from tasks.source import DataSource

LONG = 140.0  # norm of the long samples
LONG_RATE = 1e-4  # from the attacked round on; at most 1/beta with samples that long
QUANTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9)  # of the radii: sizes of poison
FRAGILE = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05)  # where flipped labels, whose effect has one size, reach further


@dataclass(frozen=True)
class Tried:
    """What became of one kind of attack on one kind of certificate."""

    certificate: str
    attack: str
    should_hold: bool
    worlds: int
    inside: int  # pairs of a world and a point whose radius is above the poison's size
    broken: int  # of these, whose label changed
    outside: int  # pairs whose radius the poison reached or passed
    flipped: int  # of these, whose label changed
    closest: float | None  # least poison by radius that changed a label


@dataclass(frozen=True, eq=False)
class Case:
    """A federation without poison: its released model, test points, their labels and radii by certificate."""

    federation: Federation
    points: Tensor  # [points, features]
    released: Tensor  # [classes, features + 1]

    @staticmethod
    def of(federation: Federation, points: Tensor) -> "Case":
        return Case(federation, points, federation.run([federation.clean_poison()])[0])

    def with_long_samples(self, target: int, labels: Tensor) -> "Case":
        """Return the case in which the first attacker's poisoned rows are the target point itself, at norm LONG."""
        federation = self.federation
        rows = federation.batches(federation.attack_round)[0][:, : federation.rows].flatten()
        inputs, owned = federation.inputs.clone(), federation.labels.clone()
        inputs[0, rows] = self.points[target] * (LONG / self.points[target].norm())
        owned[0, rows] = labels[torch.arange(len(rows)) % 2]
        return Case.of(replace(federation, inputs=inputs, labels=owned, late_rate=LONG_RATE), self.points)

    def logits(self, models: Tensor) -> Tensor:
        """Return logits [worlds, points, classes]; their order is that of the exact votes as well."""
        return self.points @ models[..., :-1].mT + models[..., None, :, -1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all attacks; return 1 if a sound certificate broke or a broken one could not be shown to be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds in all; the second is attacked")
    parser.add_argument("--targets", type=int, default=8, help="test points aimed at, per size of poison")
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--samples", type=int, default=60_000, help="training samples, shared out equally")
    parser.add_argument("--points", type=int, default=2000, help="test points")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data-dir", type=Path, default=None)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    try:
        tried = attack_all(options)
    except HawthornError as error:
        Console(stderr=True).print(f"[red]{error}")
        return 2
    show(tried)
    if options.json is not None:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
        options.json.write_text(json.dumps({"settings": settings, "tried": [asdict(t) for t in tried]}, indent=1))
    return int(any(t.broken > 0 if t.should_hold else t.broken == 0 for t in tried))


def attack_all(options: argparse.Namespace) -> list[Tried]:
    """Return what became of every attack."""
    data = mnist(DataSource.default(options.data_dir))
    train, labels = data.batch("train", slice(0, options.samples))
    points = data.batch("test", slice(0, options.points))[0].flatten(1).double()
    shares = (options.clients, -1)
    order = torch.randperm(len(labels), generator=generator(options.seed, "shares"))
    order = order[: len(order) // options.clients * options.clients]
    plain = Federation(
        inputs=train.flatten(1).double()[order].view(*shares, 784), labels=labels[order].view(shares), num_classes=10,
        num_rounds=options.rounds, seed=options.seed,
    )  # fmt: skip
    case = Case.of(plain, points)
    sound, printed = (lambda c: feature_radii(c, "margin")), (lambda c: feature_radii(c, "printed"))
    flips = lambda c: feature_radii(c, "margin", label_flips=True)  # noqa: E731
    voted = lambda c: feature_radii(c, "neyman_pearson")  # noqa: E731
    aim = options.targets
    return [
        try_features("sound, margin", "aimed", case, sound, True, aim),
        try_features("sound, margin", "random", case, sound, True, aim, random_poison),
        try_features("sound, margin", "trigger", case, sound, True, aim, trigger_poison),
        try_features("sound, exact votes", "aimed", case, voted, True, aim),
        try_features("sound, labels may flip", "aimed, flips", case, flips, True, aim, flipped_poison),
        try_samples(case, aim),
        try_long("sound, margin", case, sound, True, aim),
        try_features("as printed", "aimed, flips", case, printed, False, aim, flipped_poison, FRAGILE),
        try_long("as printed", case, printed, False, aim),
    ]


def feature_radii(case: Case, form: str, label_flips: bool = False) -> np.ndarray:
    """Return the certified ||d|| per point, 0 without a certificate."""
    record = case.federation.record(case.released, label_flips=label_flips)
    network = case.federation.network(case.released)
    if form == "margin":
        shift = Evidence.margins(network, case.points).bounds["shift_lower"]
    else:
        bounds = Evidence.exact(network, case.points, record.smoothing_sigma).bounds
        if form == "printed":
            divergence = divergence_budget_lower(bounds["pa_lower"], bounds["pb_upper"])
            return corollary.feature_radius(record, divergence)
        shift = record.smoothing_sigma * neyman_pearson_shift_lower(bounds["pa_lower"], bounds["pb_upper"])
    assert record.start_norm is not None
    return coupled.feature_radius(record, shift, record.start_norm)


def try_features(
    certificate: str, attack: str, case: Case, radii_of: Callable[[Case], np.ndarray], should_hold: bool, targets: int,
    make: "Callable[[Case, Tensor, int, int, float], Poison] | None" = None, quantiles: Sequence[float] = QUANTILES,
) -> Tried:  # fmt: skip
    """Poison by sizes at `quantiles` of the radii, aimed at the points just inside and just outside."""
    radii = radii_of(case)
    poisons, sizes = [], []
    logits = case.logits(case.released)
    order = np.argsort(radii)
    positive = order[radii[order] > 0]
    for quantile in quantiles:
        place = int(quantile * (len(positive) - 1))
        size = float(radii[positive[place]]) * (1 - 1e-9)  # the point at `place` is the first one inside
        around = positive[max(0, place - targets // 4) :][:targets]
        for target in around.tolist():
            best, other = logits[target].topk(2).indices.tolist()
            poisons.append((make or aimed_poison)(case, case.points[target], best, other, size))
            sizes.append(size)
    labels = np.concatenate(
        [case.logits(case.federation.run(poisons[i : i + 16])).argmax(2).numpy() for i in range(0, len(poisons), 16)]
    )
    return judge(certificate, attack, should_hold, radii, np.array(sizes), labels != logits.argmax(1).numpy())


def try_samples(case: Case, targets: int) -> Tried:
    """Replace q samples of every batch by the worst of the same norm bound, at and beyond the certified q."""
    record = case.federation.record(case.released)
    shift = Evidence.margins(case.federation.network(case.released), case.points).bounds["shift_lower"]
    assert record.start_norm is not None
    radii = coupled.sample_radius(record, shift, record.start_norm, None)
    radii = radii + 0.5 * (radii > 0)  # the whole numbers up to a certified one are inside
    logits = case.logits(case.released)
    changed, sizes = [], []
    for count in (1, 2, 3, 5, 10):
        near = np.argsort(np.abs(radii - count), kind="stable")[:targets]
        armed = replace(case.federation, rows=count)
        pairs = [(case.points[t], *logits[t].topk(2).indices.tolist()) for t in near.tolist()]
        poisons = [replaced_poison(armed, point, other, record.data_norm_bound) for point, _, other in pairs]
        changed.append(case.logits(armed.run(poisons)).argmax(2).numpy() != logits.argmax(1).numpy())
        sizes += [count] * len(pairs)
    return judge("sound, samples replaced", "aimed", True, radii, np.array(sizes, dtype=float), np.concatenate(changed))


def try_long(
    certificate: str, case: Case, radii_of: Callable[[Case], np.ndarray], should_hold: bool, targets: int
) -> Tried:
    """Let the attacker own long samples like the target, in both worlds, and change their features alone."""
    fragile = np.argsort(radii_of(case))
    fragile = fragile[radii_of(case)[fragile] > 0][:targets]
    parts = []
    for target in fragile.tolist():
        pair = case.logits(case.released)[target].topk(2).indices
        own = case.with_long_samples(target, pair)
        radii = radii_of(own)
        sizes = float(radii[target]) * np.array([1 - 1e-9, 2.0])
        logits = own.logits(own.released)
        best, other = logits[target].topk(2).indices.tolist()
        poisons = [aimed_poison(own, own.points[target], best, other, size) for size in sizes.tolist() if size > 0]
        changed = own.logits(own.federation.run(poisons)).argmax(2) != logits.argmax(1)
        parts.append(judge(certificate, "", should_hold, radii, sizes[: len(poisons)], changed.numpy()))
    return together(certificate, "aimed, long samples", should_hold, parts)


def together(certificate: str, attack: str, should_hold: bool, parts: Sequence[Tried]) -> Tried:
    """Return the sum of what became of several attacks."""
    return Tried(
        certificate, attack, should_hold, sum(t.worlds for t in parts), sum(t.inside for t in parts),
        sum(t.broken for t in parts), sum(t.outside for t in parts), sum(t.flipped for t in parts),
        min((t.closest for t in parts if t.closest), default=None),
    )  # fmt: skip


def judge(
    certificate: str, attack: str, should_hold: bool, radii: np.ndarray, sizes: np.ndarray, changed: np.ndarray
) -> Tried:
    """Count pairs of worlds and points inside and outside the radius, and those whose label changed."""
    inside = sizes[:, None] < radii
    outside = ~inside & (radii > 0)
    with np.errstate(divide="ignore"):
        share = (sizes[:, None] / radii)[changed & (radii > 0)]
    return Tried(
        certificate, attack, should_hold, len(sizes), int(inside.sum()), int((inside & changed).sum()),
        int(outside.sum()), int((outside & changed).sum()), float(share.min()) if share.size else None,
    )  # fmt: skip


def aimed_poison(case: Case, point: Tensor, best: int, other: int, size: float, flip: bool = False) -> Poison:
    """Return the poison of norm `size` that moves a point's margin most: steepest steps through local training."""
    clean = case.federation.clean_poison()
    labels = torch.full_like(clean.labels, other) if flip else clean.labels
    gap = torch.zeros(case.federation.num_classes, dtype=torch.float64)
    gap[best], gap[other] = 1.0, -1.0
    lifted = torch.cat([point, point.new_ones(1)])
    change = _rows((point / point.norm()).expand_as(clean.inputs), size)
    for _ in range(4):
        change.requires_grad_(True)
        local = case.federation.attacked(Poison(clean.inputs + change, labels)).sum(0)
        (slope,) = torch.autograd.grad(gap @ local @ lifted, change)
        change = _rows(-slope, size)
    return Poison(clean.inputs + change, labels)


def flipped_poison(case: Case, point: Tensor, best: int, other: int, size: float) -> Poison:
    """Return an aimed poison whose rows all have the label the point is to get."""
    return aimed_poison(case, point, best, other, size, flip=True)


def random_poison(case: Case, point: Tensor, best: int, other: int, size: float) -> Poison:
    """Return a poison of independent random directions."""
    clean = case.federation.clean_poison()
    source = generator(case.federation.seed, "random", best, other, repr(size), repr(float(point.sum())))
    drawn = torch.randn(clean.inputs.shape, generator=source, dtype=torch.float64)
    return Poison(clean.inputs + _rows(drawn, size), clean.labels)


def trigger_poison(case: Case, point: Tensor, best: int, other: int, size: float) -> Poison:
    """Return a poison with one trigger on every row: CRFL's four pixels, brighter or darker by the two classes."""
    clean = case.federation.clean_poison()
    trigger = torch.zeros_like(point)
    trigger[torch.tensor([23 * 28 + 25, 24 * 28 + 24, 25 * 28 + 23, 25 * 28 + 25])] = 1.0 if best < other else -1.0
    return Poison(clean.inputs + _rows(trigger.expand_as(clean.inputs), size), clean.labels)


def replaced_poison(federation: Federation, point: Tensor, other: int, norm: float) -> Poison:
    """Return rows that all are the point itself, as long as allowed, with the label it is to get."""
    clean = federation.clean_poison()
    row = point / point.norm() * (norm * (1 - 1e-9))
    return Poison(row.expand_as(clean.inputs).clone(), torch.full_like(clean.labels, other))


def _rows(change: Tensor, size: float) -> Tensor:
    """Return `change` with every row [..., features] of norm `size`."""
    norms = change.norm(dim=-1, keepdim=True)
    return (change * (size / norms.clamp(min=1e-300))).detach()


def show(tried: Sequence[Tried]) -> None:
    """Print the table."""
    table = Table(title="Certificates under attack: pairs of a poisoned world and a test point")
    for name in ("certificate", "attack", "worlds", "inside", "broken", "outside", "flipped", "least size / radius"):
        table.add_column(name, justify="left" if name in ("certificate", "attack") else "right")
    for t in tried:
        colour = "green" if (t.broken == 0) == t.should_hold else "red"
        closest = "-" if t.closest is None else f"{t.closest:.2f}"
        cells: list[Any] = [t.worlds, t.inside, f"[{colour}]{t.broken}[/]", t.outside, t.flipped, closest]
        table.add_row(t.certificate, t.attack, *map(str, cells))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
