"""Grouped bars: our ACC and ASR beside the paper's, one group per row of the table."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hawthorn.report._style import COLOURS, WIDE, new_figure
from hawthorn.reproduce.study import Row

OURS, PAPER = COLOURS[0], "#b9b9b9"
BAR = 0.38  # of the room of a group


def draw_beside(rows: Sequence[Row], title: str = "") -> Figure:
    """Draw two panels of horizontal bars, ACC and ASR in percent; a missing figure says so."""
    figure = new_figure(WIDE, 1.3 + 0.42 * max(len(rows), 2))
    left, right = figure.subplots(1, 2, sharey=True)
    _bars(left, rows, [(r.acc, r.paper_acc, r.acc_range) for r in rows], "accuracy on clean test data (ACC), %")
    _bars(right, rows, [(r.asr, r.paper_asr, r.asr_range) for r in rows], "attack success rate (ASR), %")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=2)
    return figure


def _bars(
    axes: Axes,
    rows: Sequence[Row],
    figures: Sequence[tuple[float | None, float | None, tuple[float, float] | None]],
    title: str,
) -> None:
    for at, (ours, paper, span) in enumerate(figures):
        for offset, value, colour in ((-BAR / 2, ours, OURS), (BAR / 2, paper, PAPER)):
            if value is not None:
                axes.barh(at + offset, value, BAR, color=colour)
                axes.text(value + 1, at + offset, f"{value:.1f}", va="center", fontsize=7)
            elif offset < 0:
                axes.text(1, at + offset, "not run", va="center", fontsize=7, color="#767676")
        if ours is not None and span is not None:
            low, high = ours - span[0], span[1] - ours
            axes.errorbar(ours, at - BAR / 2, xerr=[[low], [high]], color="black", capsize=2, linewidth=1)
    axes.barh([0], [0], color=OURS, label="ours")
    axes.barh([0], [0], color=PAPER, label="the paper's")
    axes.set_title(title)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_yticks(range(len(rows)), [row.shown for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
