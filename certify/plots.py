"""Pictures of certificates: certified rate and accuracy against the radius, margins of single points.

Reads files of certificates and nothing else. A share at radius r counts the points whose radius is r or more, as in
Xie et al., "CRFL" (ICML 2021), section 6; a point that abstained has radius 0. Shades are 95 % bands for the
population that the points were drawn from (`certify.crfl.curves`), each radius by itself.
"""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from certify.bounds import Floats
from certify.crfl.curves import Curve, certified_accuracy, certified_rate
from certify.files.lines import CertificateFile
from certify.files.settings import CrflSettings, VoteSettings, ZonotopeSettings
from certify.record import Certificate
from tasks.errors import RecordError

# The look of the reports: Okabe and Ito's palette without its yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
GREY = "#767676"
WIDE, DPI = 11.0, 144
STYLE: dict[Any, Any] = {
    "font.size": 9.0, "axes.titlesize": 9.5, "axes.titlelocation": "left", "axes.grid": True, "axes.axisbelow": True,
    "grid.color": "#dddddd", "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "legend.frameon": False, "lines.linewidth": 1.6, "text.parse_math": False,
}  # fmt: skip
ALPHA = 0.05
_AXES = {
    "l2 of the released model's parameters": "radius: l2 distance that the released model may be moved",
    "l2": "radius: l2 change of each poisoned training sample",
    "samples per batch": "poisoned samples per batch",
    "clients": "malicious clients",
    "linf": "radius eps: l_inf change of the input",
}
_WHOLE = ("samples per batch", "clients")


@dataclass(frozen=True)
class Series:
    """One line of the picture: points with their certificates and true labels; radii that were asked for, if few."""

    name: str
    unit: str
    certificates: tuple[Certificate, ...]
    labels: tuple[int, ...]
    asked: tuple[float, ...] = ()
    clean: float | None = None  # share that is predicted right, where the certificates say it


def plot(files: Sequence[CertificateFile], out: Path, *, max_radius: float | None = None) -> Path:
    """Draw `files` into the PNG `out` and return its path; raises `RecordError` if there is nothing to draw."""
    out = Path(out)
    out = out if out.suffix else out.with_suffix(".png")
    if out.suffix != ".png":
        raise RecordError(f"the picture is a PNG; wanted NAME.png, got {out}")
    if not files or any(not file.certificates for file in files):
        empty = [str(file.path) for file in files if not file.certificates]
        raise RecordError(f"there is nothing to draw; no certificates in: {', '.join(empty) or 'no file'}")
    with rc_context(STYLE):
        content = _png(draw(files, max_radius))
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(f".{out.name}.part")
    part.write_bytes(content)
    part.replace(out)
    return out


def draw(files: Sequence[CertificateFile], max_radius: float | None = None) -> Figure:
    """Return the figure: a row of panels per unit of the radius, and one of margins for bounds on inputs."""
    series = [_series(file, name) for file, name in zip(files, _names(files))]
    units = list(dict.fromkeys(each.unit for each in series))
    margins = [(file, name) for file, name in zip(files, _names(files)) if file.header.kind == "zonotope"]
    rows = len(units) + bool(margins)
    figure = Figure(figsize=(WIDE, 3.7 * rows + 0.2 * math.ceil(len(series) / 2) + 0.2), dpi=DPI, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2, squeeze=False)
    for panels, unit in zip(grid, units):
        chosen = [(i, each) for i, each in enumerate(series) if each.unit == unit]
        limit = _limit([each for _, each in chosen], max_radius)
        for axes, what in zip(panels, ("accuracy", "rate")):
            _curves(axes, chosen, what, limit)
            axes.set_xlabel(_AXES.get(unit, f"radius ({unit})"))
            if unit in _WHOLE:
                axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if margins:
        _margins(grid[-1], margins)
    handles = [Line2D([], [], **_look(i)) for i in range(len(series))]
    _legend(figure, handles, [each.name for each in series])
    return figure


def _series(file: CertificateFile, name: str) -> Series:
    """Return the line of a file; of bounds on inputs, over the points whose radii are all there."""
    settings = file.header.settings
    if not isinstance(settings, ZonotopeSettings):
        return Series(
            name, file.certificates[0].unit, file.certificates, tuple(map(file.true_label, file.certificates))
        )
    by_point: dict[int | None, list[Certificate]] = {}
    for certificate in file.certificates:
        by_point.setdefault(certificate.sample, []).append(certificate)
    whole = [found for found in by_point.values() if len(found) == len(settings.eps)]
    if not whole:
        raise RecordError(f"{file.path} has no point with all its radii yet; let the command that makes it go on")
    chosen = tuple(max(found, key=lambda certificate: certificate.radius) for found in whole)
    right = [isinstance(margin := c.parameters.get("clean_margin"), float) and margin > 0 for c in chosen]
    labels = tuple(map(file.true_label, chosen))
    name = name if not file.missing else f"{name}, {len(chosen)} with all radii"
    return Series(name, chosen[0].unit, chosen, labels, settings.eps, sum(right) / len(right))


def _curves(axes: Axes, series: Sequence[tuple[int, Series]], what: str, limit: float) -> None:
    """Draw one share of all series: as steps where every radius is known, as points where some were asked for."""
    for index, each in series:
        radii = _radii(each, limit)
        curve = _share(each, radii, what)
        colour = COLOURS[index % len(COLOURS)]
        if each.asked:
            low, high = curve.share - curve.lower, curve.upper - curve.share
            bars = 100 * np.clip(np.stack([low, high]), 0, None)
            axes.errorbar(radii, 100 * curve.share, bars, fmt="o", capsize=3, markersize=4, color=colour)
            # what holds at a radius holds at every smaller one
            ends, shares = np.concatenate([[0.0], radii]), np.concatenate([curve.share[:1], curve.share])
            axes.plot(ends, 100 * shares, drawstyle="steps-pre", **_look(index))
            if each.clean is not None and what == "accuracy":
                axes.axhline(100 * each.clean, color=colour, linewidth=0.9, linestyle=(0, (1, 3)))
            continue
        axes.plot(radii, 100 * curve.share, drawstyle="steps-pre", **_look(index))
        axes.fill_between(
            radii, 100 * curve.lower, 100 * curve.upper, step="pre", color=colour, alpha=0.15, linewidth=0
        )
    about = {
        "accuracy": "certified at this radius, and right",
        "rate": "certified at this radius, right or wrong",
    }
    axes.set_title(about[what])
    axes.set_ylabel(f"certified {what}, %")
    axes.set_ylim(-3, 103)
    axes.set_xlim(-0.02 * limit, 1.02 * limit)


def _share(each: Series, radii: Floats, what: str) -> Curve:
    if what == "rate":
        return certified_rate(each.certificates, radii, alpha=ALPHA)
    return certified_accuracy(each.certificates, each.labels, radii, alpha=ALPHA)


def _radii(each: Series, limit: float) -> Floats:
    """Return the radii at which a share changes, from 0 to just beyond the largest, where it is 0."""
    if each.asked:
        return np.array([radius for radius in each.asked if radius <= limit])
    found = np.array([certificate.radius for certificate in each.certificates])
    inside = found[found <= limit]
    beyond = [limit] if len(inside) < len(found) else [inside.max() + 1e-9 * limit]
    return np.unique(np.concatenate([[0.0], inside, beyond]))


def _limit(series: Sequence[Series], max_radius: float | None) -> float:
    """Return the end of the axis: just beyond the largest finite radius, so that the fall to 0 is seen."""
    if max_radius is not None:
        return max_radius
    radii = [c.radius for each in series for c in each.certificates if math.isfinite(c.radius)]
    radii += [radius for each in series for radius in each.asked]
    return 1.05 * max(radii, default=0.0) or 1.0


def _margins(panels: Sequence[Axes], files: Sequence[tuple[CertificateFile, str]]) -> None:
    """Draw every point's largest bound, sorted, per radius: below 0 is certified; as it is, and by its clean margin."""
    lines: list[tuple[Artist, str]] = []
    for number, (file, name) in enumerate(files):
        settings = file.header.settings
        assert isinstance(settings, ZonotopeSettings)
        for place, eps in enumerate(settings.eps):
            chosen = [c for c in file.certificates if c.parameters["eps"] == eps]
            style: dict[str, Any] = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[number % len(DASHES)]}
            for axes, values in zip(panels, (_bounds(chosen), _relative(chosen))):
                values = np.sort(values[np.isfinite(values)])
                share = 100 * (np.arange(len(values)) + 0.5) / max(1, len(chosen))
                axes.plot(share, values, **style)
            line = Line2D([], [], **style)
            lines.append((line, f"eps {eps:g}" if len(files) == 1 else f"eps {eps:g}, {name}"))
    for axes, title in zip(panels, ("another logit minus the label's", "the same / |clean margin|")):
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set_title(f"{title}, at most (below 0: certified)")
        axes.set_yscale("symlog", linthresh=1.0)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlim(-2, 102)
        axes.set_xlabel("points, sorted, %")
    panels[0].set_ylabel("upper bound, logits")
    panels[1].set_ylabel("upper bound / |clean margin|")
    handles, labels = zip(*lines)
    panels[0].legend(list(handles), list(labels), loc="upper left")


def _bounds(certificates: Sequence[Certificate]) -> Floats:
    return np.array([c.bounds["margin_upper"] for c in certificates], dtype=np.float64)


def _relative(certificates: Sequence[Certificate]) -> Floats:
    clean = [c.parameters.get("clean_margin") for c in certificates]
    with np.errstate(divide="ignore", invalid="ignore"):
        return _bounds(certificates) / np.abs(np.array([m if isinstance(m, float) else np.nan for m in clean]))


def _names(files: Sequence[CertificateFile]) -> list[str]:
    """Return what tells the files apart, each with what it certifies."""
    stems = [file.path.stem for file in files]
    if len(set(stems)) < len(stems):
        stems = [f"{file.path.parent.name}/{file.path.stem}" for file in files]
    return [f"{stem}: {describe(file)}" for stem, file in zip(stems, files)]


def describe(file: CertificateFile) -> str:
    """Return in a few words how the certificates of a file were made."""
    settings = file.header.settings
    number = f"{len({c.sample for c in file.certificates})} points"
    if isinstance(settings, ZonotopeSettings):
        return f"{settings.method}, {number}"
    votes = settings.votes if isinstance(settings, CrflSettings) else settings
    claim = f"{settings.certificate}, {settings.level} level, " if isinstance(settings, CrflSettings) else ""
    return f"{claim}{_way(votes)}, {number}"


def _way(votes: VoteSettings) -> str:
    if votes.way == "margin":
        return "margins without noise"
    if votes.way == "exact":
        return f"exact votes, sigma {votes.sigma:g}"
    bound = "paper's pair" if votes.bound == "crfl_top_two" else votes.bound
    joint = " for all points together" if votes.joint else ""
    return f"{bound}, sigma {votes.sigma:g}, M {votes.num_draws}, alpha {votes.alpha:g}{joint}"


def _look(index: int) -> dict[str, Any]:
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def _legend(figure: Figure, handles: Sequence[Artist], labels: Sequence[str]) -> None:
    """Put one legend above all panels, in as many columns as fit."""
    columns = max(1, int(figure.get_figwidth() / (0.07 * max(map(len, labels)) + 0.65)))
    names = [f" {label}" if label.startswith("_") else label for label in labels]
    figure.legend(list(handles), names, loc="outside upper left", ncols=min(columns, len(names)))


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
