"""ACC, ASR and the share of rejected samples over all thresholds tau, and the ROC curve of the confidence."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hawthorn.report._style import COLOURS, GREY, WIDE, legend_above, new_figure
from server.evaluate import Confidences
from server.rejection import auc, rates, roc

STEPS = 200  # parts of the axis


def draw_thresholds(found: Sequence[tuple[str, float, Confidences]]) -> Figure | None:
    """Draw (name, the run's own tau, confidences) of runs: ACC over tau, ASR over tau, ROC; None without runs."""
    if not found:
        return None
    attacked = any(len(confidences.hit) for _, _, confidences in found)
    figure = new_figure(WIDE if attacked else WIDE / 2, 4.0)
    panels = figure.subplots(1, 3 if attacked else 1, squeeze=False)[0]
    taus, names = np.linspace(0.0, 1.0, STEPS + 1), []
    for index, (name, own, confidences) in enumerate(found):
        colour, at = COLOURS[index % len(COLOURS)], rates(confidences, taus)
        curves = [(panels[0], at.acc, at.clean_rejected)]
        if len(confidences.hit):
            curves.append((panels[1], at.asr, at.attacked_rejected))
            panels[2].plot(*roc(confidences), color=colour)
        for axes, rate, rejected in curves:
            axes.plot(taus, 100 * rate, color=colour)
            axes.plot(taus, 100 * rejected, ":", color=colour, lw=1.1)
            if own > 0:
                axes.axvline(own, color=colour, lw=0.8, alpha=0.6)
        area = auc(confidences)
        names.append(name + (f" (tau {own:g})" if own > 0 else "") + ("" if area is None else f", AUC {area:.3f}"))
    for axes, title in zip(panels, ("ACC, %", "ASR, %")):
        axes.set_title(title)
        axes.set_xlabel("threshold tau")
        axes.set_ylabel(title)
        axes.set_xlim(0, 1)
        axes.set_ylim(-3, 103)
    if attacked:
        panels[2].plot([0, 1], [0, 1], "--", color=GREY, lw=0.8)
        panels[2].set_title("ROC of the confidence")
        panels[2].set_xlabel("attacked samples accepted, share")
        panels[2].set_ylabel("clean samples accepted, share")
        panels[2].set_xlim(-0.01, 1.01)
        panels[2].set_ylim(-0.01, 1.01)
    handles = [Line2D([], [], color=COLOURS[index % len(COLOURS)]) for index in range(len(found))]
    extra = [Line2D([], [], color=GREY), Line2D([], [], color=GREY, linestyle=":")]
    legend_above(figure, [*handles, *extra], [*names, "accepted, and counted", "rejected"])
    return figure
