"""How the report's pictures look: colours for colour-blind readers too, sizes, figures without global state."""

import io
from collections.abc import Iterator, Sequence

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from hawthorn.compare import run_names
from server.record import RunRecord

# Okabe and Ito's palette without its yellow, which is too light on white; line styles tell more than seven runs apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ATTACK, BENIGN, IDLE, GREY = "#B40426", "#0072B2", "#E69F00", "#767676"
WIDE, HALF = 11.0, 6.6  # inches
DPI = 144
LONG = 24  # characters of a name that every panel has room for
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "text.parse_math": False,  # names are shown as they are, dollar signs too
    "hatch.linewidth": 0.6,
}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure (inches) that draws with Agg and spaces its parts so that nothing overlaps."""
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers: powers would need the mathematics that names must not set."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def png(figure: Figure) -> bytes:
    """Return a figure as PNG; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def run_labels(runs: Sequence[RunRecord]) -> list[str]:
    """Return `run_names`, numbered if some are too long to be shown whole in every place."""
    names = run_names(runs)
    if len(names) == 1 or max(map(len, names), default=0) <= LONG:
        return names
    return [f"#{number} {name}" for number, name in enumerate(names, start=1)]


def shorten_middle(text: str, length: int) -> str:
    """Return `text` cut to `length` in its middle: names differ at either end."""
    if len(text) <= length:
        return text
    head = (length - 1) // 2
    return f"{text[:head]}…{text[len(text) - (length - 1 - head) :]}"


def look(index: int) -> dict[str, str]:
    """Return colour, line style and marker of run number `index`."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
    }


def legend_above(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Put one legend above all panels, in as many columns as fit."""
    shown = [shorten_middle(label, 48) for label in labels]
    longest = max(map(len, shown))
    columns = max(1, int(figure.get_figwidth() / (0.075 * longest + 0.65)))
    # matplotlib leaves labels that start with an underscore out of a legend
    names = [f" {label}" if label.startswith("_") else label for label in shown]
    figure.legend(list(handles), names, loc="outside upper left", ncols=min(columns, len(names)))


def panels(runs: Sequence[RunRecord], height: float) -> tuple[Figure, Iterator[tuple[int, Axes]]]:
    """Return a figure with one panel per run, and pairs (index of the run, axes); `height` is a row's, in inches."""
    columns = {1: 1, 2: 2, 4: 2}.get(len(runs), 3)
    rows = -(-len(runs) // columns)
    figure = new_figure(WIDE, height * rows + 0.5)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten().tolist()
    for spare in grid[len(runs) :]:
        spare.remove()
    length = {1: 100, 2: 60}.get(columns, 38)
    for run, axes, label in zip(runs, grid, run_labels(runs)):
        axes.set_title(shorten_middle(label, length))
        if not run.rounds:
            axes.text(0.5, 0.5, "no round on record", transform=axes.transAxes, ha="center", color=GREY)
        round_axis(axes, max((record.round for record in run.rounds), default=0), first=1)
    return figure, enumerate(grid[: len(runs)])


def round_axis(axes: Axes, last: int, first: int = 0) -> None:
    """Make the x axis one of rounds `first` to `last`, ticks at whole numbers."""
    axes.set_xlim(first - 0.6, max(last, first + 1) + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("round")
