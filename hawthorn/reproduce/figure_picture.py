"""Pictures of figures: certified rate and accuracy against the radius, distances of twins against the round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Picture
from matplotlib.lines import Line2D

from certify.bounds import Floats
from certify.crfl.curves import certified_accuracy, certified_rate
from hawthorn.report._style import COLOURS, DASHES, GREY, WIDE, new_figure, round_axis
from hawthorn.reproduce.certified import WAYS, Certified

if TYPE_CHECKING:
    from hawthorn.reproduce.figure_results import Distances

FINE = 1001  # radii of a drawn curve
TITLES = {
    "paper": "as the paper: Corollary 1",
    "votes": "sound, from votes",
    "margin": "sound, exact margins",
}


def draw_certified(found: Sequence[Certified], radii: dict[str, Floats], title: str = "", legend: str = "") -> Picture:
    """Draw a row of two panels per way to certify, rate and accuracy; several seeds as their mean.

    A dotted line is the accuracy of the released model without any certificate.
    """
    picture = new_figure(WIDE, 3.2 * len(WAYS) + 0.8)
    grid = picture.subplots(len(WAYS), 2, squeeze=False, sharey=True)
    groups: dict[str, list[Certified]] = {}
    for each in found:
        groups.setdefault(each.line.name, []).append(each)
    for way, (left, right) in zip(WAYS, grid):
        drawn = [_curves(left, right, place, way, group, radii[way]) for place, group in enumerate(groups.values())]
        for axes, what in ((left, "certified rate"), (right, "certified accuracy")):
            axes.set_title(f"{what}, {TITLES[way]}")
            axes.set_xlabel("radius: l2 change of each poisoned sample")
            axes.set_xlim(0, radii[way][-1])
            axes.set_ylim(0, 1.02)
            if not any(drawn):
                axes.text(0.5, 0.5, _why(found, way), transform=axes.transAxes, ha="center", color=GREY, wrap=True)
    handles = [Line2D([], [], **_look(place)) for place in range(len(groups))]
    prefix = f"{legend}: " if legend else ""
    names = [prefix + group[0].line.label for group in groups.values()]
    picture.legend(handles, names, loc="outside lower left", ncols=min(len(names), 6))
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _curves(left: Axes, right: Axes, place: int, way: str, group: Sequence[Certified], radii: Floats) -> bool:
    """Draw one curve, the mean over seeds, into both panels; False if there is nothing of it."""
    known = [each.accuracy for each in group if not each.problem]
    if known:
        right.axhline(float(np.mean(known)), color=_look(place)["color"], linestyle=(0, (1, 3)), linewidth=0.9)
    made = [(each, each.ways[way]) for each in group if way in each.ways and each.ways[way].certificates]
    if not made:
        return False
    radii = np.linspace(radii[0], radii[-1], FINE)
    rates = [certified_rate(result.certificates, radii).share for _, result in made]
    accuracies = [certified_accuracy(result.certificates, each.labels, radii).share for each, result in made]
    left.plot(radii, np.mean(rates, axis=0), drawstyle="steps-pre", **_look(place))
    right.plot(radii, np.mean(accuracies, axis=0), drawstyle="steps-pre", **_look(place))
    return True


def _why(found: Sequence[Certified], way: str) -> str:
    reasons = [each.problem or each.ways[way].problem for each in found]
    text = next((reason for reason in reasons if reason), "nothing")
    return text if len(text) < 160 else f"{text[:157]}..."


def draw_closeness(found: Sequence[Distances], title: str = "") -> Picture:
    """Draw the distances of twins against the round, from the first round in which they differ."""
    picture = new_figure(WIDE * 0.6, 4.2)
    axes = picture.subplots()
    last, lines = 0, 0
    for place, each in enumerate(found):
        apart = [(number, distance) for number, distance in each.rounds if distance > 0]
        if apart:
            axes.plot(*zip(*apart), **_look(place), label=f"{each.line.label}, seed {each.seed}")
            last, lines = max(last, apart[-1][0]), lines + 1
    round_axis(axes, last)
    axes.set_ylabel("l2 distance of the models")
    if lines:
        axes.set_yscale("log")
        axes.legend()
    else:
        text = next((each.problem for each in found if each.problem), "the models never differ")
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", color=GREY, wrap=True)
    if title:
        picture.suptitle(title, x=0.01, ha="left", fontsize=11)
    return picture


def _look(place: int) -> dict[str, Any]:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "linestyle": DASHES[place // len(COLOURS) % len(DASHES)],
    }
