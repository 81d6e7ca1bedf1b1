"""Heat maps of a grid: the worst over one axis with where it was found, and one panel per row with every point."""

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from hawthorn.grid import Map
from hawthorn.heatmap import Table, cell_text
from hawthorn.report._style import GREY, WIDE, new_figure

PANEL_COLUMNS = 4


def draw_worst(table: Table, drawn: Map) -> Figure:
    """Draw the worst as one heat map; a cell says its rate and, below it, where it was found."""
    figure = new_figure(2.4 + 1.0 * len(table.columns), 1.5 + 0.42 * len(table.rows))
    axes = figure.subplots()
    _draw(axes, table, drawn.value, size=9.0, with_source=True)
    axes.set_ylabel(drawn.rows)
    axes.set_xlabel(f"{drawn.columns} (hatched: the rule is not defined there)")
    return figure


def draw_panels(panels: Sequence[Table], drawn: Map) -> Figure:
    """Draw one heat map per row of the map: the axis of the worst against the columns."""
    columns = min(PANEL_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = new_figure(WIDE + 1.0, rows * (0.75 + 0.21 * len(panels[0].rows)) + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for spare in grid[len(panels) :]:
        spare.set_axis_off()
    for axes, panel in zip(grid, panels):
        _draw(axes, panel, drawn.value, size=6.0)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel(drawn.columns)
        axes.tick_params(labelbottom=True)
    return figure


def _draw(axes: Axes, table: Table, value: str, size: float, with_source: bool = False) -> None:
    """Fill the axes with coloured cells: blue is good for the defence, red is bad, for either rate."""
    colours = colormaps["RdYlBu" if value == "acc" else "RdYlBu_r"]
    for y, row in enumerate(table.rows):
        for x, column in enumerate(table.columns):
            cell = table.cells[row, column]
            corner = (x - 0.5, y - 0.5)
            if cell.rate is None:
                hatch = "////" if cell.state == "undefined" else None
                axes.add_patch(Rectangle(corner, 1, 1, facecolor="#eeeeee", edgecolor="#bbbbbb", hatch=hatch, lw=0))
                text = "" if cell.state == "undefined" else cell_text(cell)
                axes.text(x, y, text, ha="center", va="center", fontsize=size * 0.75, color=GREY)
                continue
            colour = colours(cell.rate)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour, edgecolor="white", lw=0.8))
            ink = "white" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5 else "black"
            sourced = with_source and bool(cell.by)
            style: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
            axes.text(x, y - (0.14 if sourced else 0), cell_text(cell), fontsize=size, **style)
            if sourced:
                axes.text(x, y + 0.25, cell.by, fontsize=size * 0.58, **style)
    axes.set_title(table.title)
    axes.set_xlim(-0.5, len(table.columns) - 0.5)
    axes.set_ylim(len(table.rows) - 0.5, -0.5)
    axes.set_xticks(range(len(table.columns)), table.columns)
    axes.set_yticks(range(len(table.rows)), table.rows, fontsize=max(size, 7.0))
    axes.tick_params(length=0)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
