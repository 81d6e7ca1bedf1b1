"""Who took part: a heat map of clients and rounds, with each client's weight relative to equal weights."""

from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from hawthorn.compare import malicious_clients
from hawthorn.report._style import ATTACK, legend_above, new_figure, round_axis
from server.record import RoundRecord, RunRecord

MAX_ROWS, MAX_COLUMNS = 48, 120
ABSENT, DROPPED, ZERO, PRESENT = "#F2F2F2", "#1A1A1A", "#F4DC8B", "#6FA8A0"
BLUES = LinearSegmentedColormap.from_list("weights", colormaps["Blues"](np.linspace(0.28, 1.0, 256)))


@dataclass(frozen=True)
class Cells:
    """The heat map's numbers [rows, columns]; a column is `width` rounds, from the run's first one on."""

    clients: list[int]
    num_malicious: int  # the first rows are malicious clients
    first: int
    width: int
    weight: np.ndarray  # mean weight relative to 1/n over the column's rounds; NaN where there is none
    present: np.ndarray  # usable replies, counted
    dropped: np.ndarray  # dropped replies, counted
    attacking: np.ndarray  # bool
    skipped: np.ndarray  # [columns] bool: every round of the column was skipped


def choose_clients(run: RunRecord) -> tuple[list[int], int]:
    """Return (clients shown, how many of them are malicious): malicious first, then those sampled most often."""
    counts = np.zeros(run.config.num_clients, dtype=int)
    for record in run.rounds:
        np.add.at(counts, record.sampled, 1)
    order = np.argsort(-counts, kind="stable").tolist()
    bad = set(malicious_clients(run))
    malicious, benign = [c for c in order if c in bad], [c for c in order if c not in bad]
    room = max(MAX_ROWS // 2, MAX_ROWS - len(benign))  # for malicious clients
    shown = sorted(malicious[:room])
    return shown + sorted(benign[: MAX_ROWS - len(shown)]), len(shown)


def read_cells(run: RunRecord) -> Cells:
    """Return the heat map of a run that has rounds; many rounds share a column."""
    clients, num_malicious = choose_clients(run)
    row_of = {client: row for row, client in enumerate(clients)}
    first, last = run.rounds[0].round, run.rounds[-1].round
    width = -(-(last - first + 1) // MAX_COLUMNS)
    columns = -(-(last - first + 1) // width)
    total, weighted, present, dropped = (np.zeros((len(clients), columns)) for _ in range(4))
    attacking, kept = np.zeros((len(clients), columns), dtype=bool), np.zeros(columns, dtype=bool)
    for record in run.rounds:
        column = (record.round - first) // width
        kept[column] |= record.skipped is None
        for client, weight in zip(record.clients, _relative(record), strict=True):
            if (row := row_of.get(client)) is not None:
                present[row, column] += 1
                if weight is not None:
                    total[row, column] += weight
                    weighted[row, column] += 1
        for client in record.dropped:
            if (row := row_of.get(int(client))) is not None:
                dropped[row, column] += 1
        attacking[[row_of[c] for c in record.attacking if c in row_of], column] = True
    mean = np.divide(total, weighted, out=np.full_like(total, np.nan), where=weighted > 0)
    return Cells(clients, num_malicious, first, width, mean, present, dropped, attacking, ~kept)


def _relative(record: RoundRecord) -> list[float] | list[None]:
    """Return each usable reply's weight divided by 1/n, in the order of `clients`; None without weights."""
    total = sum(map(abs, record.weights or ()))
    if record.weights is None or record.skipped:
        return [None] * len(record.clients)
    return [abs(w) * len(record.clients) / total if total else 0.0 for w in record.weights]


def draw_participation(run: RunRecord, width: float) -> Figure | None:
    """Draw one run's heat map, `width` inches wide; None without rounds."""
    if not run.rounds:
        return None
    cells = read_cells(run)
    rows, columns = cells.weight.shape
    row_height = min(0.32, max(0.115, 4.2 / rows))
    figure = new_figure(width, row_height * rows + 1.5)
    axes = figure.subplots()
    top = max(2.0, float(np.nanmax(cells.weight, initial=0.0)))
    extent = (cells.first - 0.5, cells.first - 0.5 + columns * cells.width, rows - 0.5, -0.5)
    axes.imshow(_colours(cells, top), aspect="auto", interpolation="nearest", extent=extent)
    _mark_rows(axes, cells, row_height)
    _separate(axes, cells, _side(cells, row_height, width))
    _mark_attacks(axes, cells, _side(cells, row_height, width))
    for column in np.flatnonzero(cells.skipped):
        left = extent[0] + column * cells.width
        axes.axvspan(left, left + cells.width, facecolor="none", edgecolor="#555555", hatch="////", lw=0)
    axes.grid(False)
    round_axis(axes, cells.first)
    axes.set_xlim(extent[0], extent[1])
    if columns * cells.width <= 10:
        axes.set_xticks(range(cells.first, cells.first + columns))
    axes.set_ylabel("client")
    if not np.isnan(cells.weight).all():
        mappable = ScalarMappable(Normalize(0, top), BLUES)
        bar = figure.colorbar(mappable, ax=axes, fraction=0.04, pad=0.015, aspect=max(8.0, row_height * rows / 0.14))
        bar.set_label("weight (1 = equal)", labelpad=6)
        bar.locator = MaxNLocator(5, steps=[1, 2, 5, 10])
        bar.update_ticks()
        bar.outline.set_visible(False)  # type: ignore[operator]
    _legend(figure, cells)
    return figure


def _colours(cells: Cells, top: float) -> np.ndarray:
    image = np.empty((*cells.weight.shape, 3))
    image[:] = to_rgb(ABSENT)
    image[cells.present > 0] = to_rgb(PRESENT)
    known = ~np.isnan(cells.weight)
    image[known] = BLUES(Normalize(0, top)(cells.weight[known]))[:, :3]
    image[known & (cells.weight == 0)] = to_rgb(ZERO)
    image[(cells.dropped > 0) & (cells.dropped >= cells.present)] = to_rgb(DROPPED)
    return image


def _mark_rows(axes: Axes, cells: Cells, row_height: float) -> None:
    labels = [f"m {c}" if row < cells.num_malicious else str(c) for row, c in enumerate(cells.clients)]
    axes.set_yticks(range(len(labels)), labels, fontsize=min(8.5, 62 * row_height))
    axes.tick_params(axis="y", length=0, pad=2)
    for label in axes.get_yticklabels()[: cells.num_malicious]:
        label.set_color(ATTACK)
    if 0 < cells.num_malicious < len(labels):
        axes.axhline(cells.num_malicious - 0.5, color=ATTACK, lw=1.2, zorder=2.5)


def _side(cells: Cells, row_height: float, width: float) -> float:
    """Return the shorter side of a cell in points; 0.82 of the figure's width are the axes."""
    return 72 * min(row_height, 0.82 * width / cells.weight.shape[1])


def _separate(axes: Axes, cells: Cells, side: float) -> None:
    """Draw thin lines between cells that are large enough for them."""
    rows, columns = cells.weight.shape
    if side >= 5:
        left = cells.first - 0.5
        style = {"color": "white", "lw": min(1.0, side / 16)}
        axes.hlines(np.arange(1, rows) - 0.5, left, left + columns * cells.width, **style)
        axes.vlines(left + cells.width * np.arange(1, columns), -0.5, rows - 0.5, **style)


def _mark_attacks(axes: Axes, cells: Cells, side: float) -> None:
    rows, columns = np.nonzero(cells.attacking)
    axes.scatter(
        cells.first - 0.5 + (columns + 0.5) * cells.width,
        rows,
        s=min(5.0, 0.5 * side) ** 2,
        color=ATTACK,
        edgecolors="white",
        linewidths=0.4 if side > 5 else 0,
        zorder=3,
    )


def _legend(figure: Figure, cells: Cells) -> None:
    known = ~np.isnan(cells.weight)
    entries: list[tuple[Artist, str]] = []
    if ((cells.present == 0) & (cells.dropped == 0)).any():
        entries.append((Patch(facecolor=ABSENT, edgecolor="#BBBBBB"), "not sampled"))
    if (known & (cells.weight == 0)).any():
        entries.append((Patch(color=ZERO), "weight 0"))
    if ((cells.present > 0) & ~known).any():
        entries.append((Patch(color=PRESENT), "took part"))
    if cells.dropped.any():
        entries.append((Patch(color=DROPPED), "dropped"))
    if cells.skipped.any():
        entries.append((Patch(facecolor="white", edgecolor="#555555", hatch="////"), "round skipped"))
    if cells.attacking.any():
        entries.append((Line2D([], [], color=ATTACK, marker="o", markersize=4, linestyle=""), "attacking"))
    if entries:
        legend_above(figure, [handle for handle, _ in entries], [label for _, label in entries])


def describe_crop(run: RunRecord) -> str:
    """Return what the heat map leaves out or puts together, as sentences; empty if nothing."""
    if not run.rounds:
        return ""
    cells = read_cells(run)
    said = []
    if len(cells.clients) < run.config.num_clients:
        benign = len(cells.clients) - cells.num_malicious
        said.append(
            f"Shown are {len(cells.clients)} of {run.config.num_clients} clients: {cells.num_malicious} of "
            f"{len(malicious_clients(run))} malicious ones and the {benign} benign ones sampled most often."
        )
    if cells.width > 1:
        said.append(f"Each column is {cells.width} rounds; its colour is the mean over those the client took part in.")
    return " ".join(said)
