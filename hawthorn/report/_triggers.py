"""Inverted triggers beside the attacker's own, and class distances before and after, as pictures."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from hawthorn.report._style import ATTACK, GREY, WIDE, new_figure
from hawthorn.triggers import Seen, TriggersOfRun

COLUMNS = 10  # triggers in a line
SMALL = 6.5


def draw_triggers(found: TriggersOfRun) -> Figure | None:
    """Draw the true trigger and, per model, the inverted ones towards its target; None of inputs that are no images."""
    if found.true_mask is None or found.true_pattern is None or found.target is None or found.true_mask.dim() != 3:
        return None
    rows = [(_title(seen, found), seen.to_class(found.target)) for seen in (found.before, found.after) if seen]
    columns = max(min(COLUMNS, len(cells)) for _, cells in rows)
    lines = [(title, cells[at : at + columns]) for title, cells in rows for at in range(0, len(cells), columns)]
    figure = new_figure(WIDE + 1, 1.5 * len(lines) + 0.2)
    grid = figure.subplots(len(lines), columns + 1, squeeze=False)
    for axes in grid.flatten().tolist():
        axes.set_axis_off()
    _image(grid[0][0], found.true_mask, found.true_pattern, f"the attacker's, to {found.target}")
    size = float(found.true_mask.amax(0).sum())
    grid[0][0].text(0.5, -0.04, f"l1 {size:.0f}", transform=grid[0][0].transAxes, ha="center", va="top", fontsize=7)
    for line, (title, cells) in zip(grid, lines):
        style: dict[str, Any] = {"rotation": 90, "ha": "right", "va": "center", "fontsize": 8}
        line[1].text(-0.07, 0.5, title, transform=line[1].transAxes, **style)
        for axes, (source, mask, pattern, size) in zip(line[1:], cells):
            _image(axes, mask, pattern, f"{source} to {found.target}")
            text = f"l1 {size:.1f}" if size > 0 else "none found"
            axes.text(0.5, -0.04, text, transform=axes.transAxes, ha="center", va="top", fontsize=7)
    return figure


def _title(seen: Seen, found: TriggersOfRun) -> str:
    return "the final model" if seen is found.after else "the model before"


def _image(axes: Axes, mask: Tensor, pattern: Tensor, title: str) -> None:
    """Show mask times pattern as an image; grey where the trigger leaves the input as it is."""
    alpha = mask.amax(0, keepdim=True).clamp(0, 1)
    shown = (alpha * pattern.clamp(0, 1) + (1 - alpha) * 0.5).expand(3, -1, -1) if pattern.shape[0] in (1, 3) else None
    if shown is None:
        shown = (alpha * pattern.mean(0, keepdim=True) + (1 - alpha) * 0.5).expand(3, -1, -1)
    axes.imshow(shown.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7, loc="center", pad=3)
    height, width = shown.shape[1:]
    axes.add_patch(Rectangle((-0.5, -0.5), width, height, fill=False, edgecolor=GREY, lw=0.6, clip_on=False))


def draw_distances(found: TriggersOfRun) -> Figure:
    """Draw the class distances of both models as heat maps with one scale; the attacker's target is framed."""
    models = [seen for seen in (found.before, found.after) if seen]
    size = max(3.6, 0.48 * len(found.after.distances) + 0.8)
    figure = new_figure(size * len(models) + 0.9, size + 0.3)
    grid = figure.subplots(1, len(models), squeeze=False)[0]
    high = max(1.0, *(float(d) for seen in models for d in _found(seen.distances)))
    for axes, seen in zip(grid, models):
        title = "the final model" if seen is found.after else "the model before"
        _matrix(axes, seen.distances, high, f"{title}: mean {_mean(seen.distances)}", found.target)
    return figure


def _found(distances: Tensor) -> Tensor:
    return distances[torch.isfinite(distances)]


def _mean(distances: Tensor) -> str:
    """Say the mean of the distances that were found, and how many were sought in vain."""
    found, lost = _found(distances), int(torch.isinf(distances).sum())
    if not len(found):
        return "none found"
    return f"{float(found.mean()):.1f}" + (f", {lost} not found" if lost else "")


def _matrix(axes: Axes, distances: Tensor, high: float, title: str, target: int | None) -> None:
    colours, classes = colormaps["viridis"], len(distances)
    for source, row in enumerate(distances.tolist()):
        for to, value in enumerate(row):
            known = math.isfinite(value)
            colour: Sequence[float] = colours(value / high) if known else (0.93, 0.93, 0.93, 1.0)
            axes.add_patch(Rectangle((to - 0.5, source - 0.5), 1, 1, facecolor=colour, edgecolor="white", lw=0.6))
            ink = "white" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5 else "black"
            text = f"{value:.0f}" if known else "" if source == to else "–"
            axes.text(to, source, text, ha="center", va="center", fontsize=SMALL, color=ink)
    if target is not None:
        axes.add_patch(Rectangle((target - 0.5, -0.5), 1, classes, fill=False, edgecolor=ATTACK, lw=1.8, zorder=3))
    axes.set_title(title)
    axes.set_xlim(-0.5, classes - 0.5)
    axes.set_ylim(classes - 0.5, -0.5)
    axes.set_xticks(range(classes))
    axes.set_yticks(range(classes))
    axes.set_xlabel("to class")
    axes.set_ylabel("from class")
    axes.set_aspect("equal")
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
