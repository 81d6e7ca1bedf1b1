"""Pictures of figures: certified rate and accuracy against the radius, distances of twins and radii against rounds."""

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from certify.bounds import Floats
from certify.crfl.curves import certified_accuracy, certified_rate
from hawthorn.report._style import COLOURS, DASHES, GREY, WIDE, logarithmic, new_figure, round_axis
from hawthorn.reproduce.by_rounds import ByRounds
from hawthorn.reproduce.certified import WAYS, Certified
from hawthorn.reproduce.closeness import Distances

FINE = 1001  # radii of a drawn curve
PLAIN: dict[str, Any] = {"linestyle": (0, (1, 3)), "linewidth": 0.9}
TITLES = {
    "paper": "as the paper: Corollary 1",
    "votes": "sound, from votes",
    "margin": "sound, exact margins",
}


def draw_certified(found: Sequence[Certified], radii: dict[str, Floats], title: str = "", legend: str = "") -> Picture:
    """Draw a row of two panels per way to certify, rate and accuracy; several seeds as their mean.

    A way that certified nothing has no row, but its reason below, unless no way did.
    """
    made = [way for way in WAYS if any(way in each.ways and each.ways[way].certificates for each in found)]
    ways = made or list(WAYS)
    picture = new_figure(WIDE, 3.2 * len(ways) + 1.0)
    grid = picture.subplots(len(ways), 2, squeeze=False, sharey=True)
    groups: dict[str, list[Certified]] = {}
    for each in found:
        groups.setdefault(each.line.name, []).append(each)
    for way, (left, right) in zip(ways, grid):
        for place, group in enumerate(groups.values()):
            _curves(left, right, place, way, group, radii[way])
        for axes, what in ((left, "certified rate"), (right, "certified accuracy")):
            axes.set_title(f"{what}, {_title(found, way)}")
            axes.set_xlabel("radius: l2 change of each poisoned sample")
            axes.set_xlim(0, radii[way][-1])
            axes.set_ylim(0, 1.02)
            if not made or _all_abstain(found, way):
                text = "every point abstains" if made else _why(found, way)
                axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY, wrap=True)
    left_out: dict[str, list[str]] = {}
    for way in WAYS if made else ():
        if way not in made:
            left_out.setdefault(_why(found, way), []).append(TITLES[way])
    lines = [line for why, names in left_out.items() for line in textwrap.wrap(f"{'; '.join(names)}: {why}", 150)]
    handles = [Line2D([], [], **_look(place)) for place in range(len(groups))]
    prefix = f"{legend}: " if legend else ""
    names = [prefix + group[0].line.label for group in groups.values()]
    if any(each.labels for each in found):
        handles.append(Line2D([], [], color=GREY, **PLAIN))
        names.append("accuracy, nothing certified")
    below = picture.legend(handles, names, loc="outside lower left", ncols=min(len(names), 5), alignment="left")
    below.set_title("\n".join(lines), FontProperties(size=8.5))
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _title(found: Sequence[Certified], way: str) -> str:
    weighed = any("fixed_weights" in each.ways[way].broken for each in found if way in each.ways)
    return TITLES[way] + (", a heuristic here" if weighed else "")


def _curves(left: Axes, right: Axes, place: int, way: str, group: Sequence[Certified], radii: Floats) -> None:
    """Draw one curve, the mean over seeds, into both panels, as far as there is something of it."""
    known = [each.accuracy for each in group if not each.problem]
    if known:
        right.axhline(float(np.mean(known)), color=_look(place)["color"], **PLAIN)
    made = [(each, each.ways[way]) for each in group if way in each.ways and each.ways[way].certificates]
    if not made:
        return
    radii = np.linspace(radii[0], radii[-1], FINE)
    rates = [certified_rate(result.certificates, radii).share for _, result in made]
    accuracies = [certified_accuracy(result.certificates, each.labels, radii).share for each, result in made]
    left.plot(radii, _to_zero(np.mean(rates, axis=0)), drawstyle="steps-pre", **_look(place))
    right.plot(radii, _to_zero(np.mean(accuracies, axis=0)), drawstyle="steps-pre", **_look(place))


def _to_zero(shares: Floats) -> Floats:
    """Return falling shares up to the first 0: curves that have ended do not cover each other on the axis."""
    ended = np.flatnonzero(shares == 0)
    return np.where(np.arange(len(shares)) <= (ended[0] if len(ended) else len(shares)), shares, np.nan)


def _all_abstain(found: Sequence[Certified], way: str) -> bool:
    results = [each.ways[way] for each in found if way in each.ways]
    return all(result.abstained == 1 for result in results if result.certificates)


def _why(found: Sequence[Certified], way: str) -> str:
    reasons = [each.problem or each.ways[way].problem for each in found]
    text = next((reason for reason in reasons if reason), "nothing").split('. certificate="paper"')[0]
    return text if len(text) < 240 else f"{text[:237]}..."


def draw_closeness(found: Sequence[Distances], title: str = "") -> Picture:
    """Draw the distances of twins against the round, from the first round in which they differ."""
    picture = new_figure(WIDE * 0.6, 4.6)
    axes = picture.subplots()
    last, lines, seeds = 0, list[Line2D](), len({each.seed for each in found})
    for place, each in enumerate(found):
        apart = [(number, distance) for number, distance in each.rounds if distance > 0]
        if apart:
            label = f"{each.line.label}, seed {each.seed}" if seeds > 1 else each.line.label
            lines += axes.plot(*zip(*apart), **_look(place), label=label)
            last = max(last, apart[-1][0])
    round_axis(axes, last)
    axes.set_ylabel("l2 distance of the models")
    if lines:
        logarithmic(axes)
        picture.legend(handles=lines, loc="outside lower left", ncols=2 if len(lines) > 4 else 1)
    else:
        text = next((each.problem for each in found if each.problem), "the models never differ")
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY, wrap=True)
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def draw_rounds(found: Sequence[ByRounds], title: str = "", legend: str = "") -> Picture:
    """Draw two panels of radii against T: Corollary 1 as printed, and what holds for the law over trainings."""
    picture = new_figure(WIDE, 4.6)
    panels = picture.subplots(1, 2, sharey=True)
    names = ("as the paper: Corollary 1", "sound for the law over trainings, flips and lengths charged")
    seeds = {each.seed for each in found}
    for place, each in enumerate(found):
        for axes, values in zip(panels, zip(*[radii for _, *radii in each.radii])):
            numbers = [number for number, *_ in each.radii]
            axes.plot(numbers, np.where(np.array(values) > 0, values, np.nan), **_look(place))
    for axes, name in zip(panels, names):
        axes.set_title(name)
        logarithmic(axes)
        axes.set_xlabel("rounds T")
        if not any(each.radii for each in found):
            text = next((each.problem for each in found if each.problem), "nothing")
            axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY, wrap=True)
    panels[0].set_ylabel("radius: l2 change of each poisoned sample")
    prefix = f"{legend}: " if legend else ""
    labels = [prefix + each.line.label + (f", seed {each.seed}" if len(seeds) > 1 else "") for each in found]
    picture.legend([Line2D([], [], **_look(place)) for place in range(len(found))], labels, loc="outside lower left",
                   ncols=min(len(labels), 5))  # fmt: skip
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _look(place: int) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }
