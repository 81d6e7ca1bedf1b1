"""`hawthorn tau` and `hawthorn triggers`: finished models at every threshold, and the triggers they give away."""

import csv
import io
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from tasks.errors import ConfigError

console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
Folders = Annotated[list[Path], typer.Argument(help="Folders of finished runs, or of experiments with several arms.")]


def tau(
    folders: Folders,
    taus: Annotated[str, typer.Option(help="Thresholds with commas.")] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9",
    out: Annotated[Path | None, typer.Option(help="Folder of tau.csv and tau.png; default: the first folder.")] = None,
) -> None:
    """Show ACC and ASR of finished runs at any threshold of rejection, and the confidence's ROC curve and AUC.

    Each model is evaluated once; reports of these runs then show the curves.
    """
    from matplotlib import rc_context

    from hawthorn.commands.runs import read_all
    from hawthorn.report._style import STYLE, png, run_labels
    from hawthorn.report._thresholds import draw_thresholds
    from server.record import replace_file
    from server.rejection import auc, measure_confidences, rates

    at = _numbers(taus)
    runs = read_all(folders)
    found = [measure_confidences(run.folder) for run in runs]
    table = Table("run", "tau", "ACC %", "ASR %", "clean rejected %", "attacked rejected %", "AUC")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", "tau", "acc", "asr", "clean_rejected", "attacked_rejected", "auc", "sha256"])
    for run, name, confidences in zip(runs, run_labels(runs), found):
        area, curve = auc(confidences), rates(confidences, at)
        columns = (curve.acc, curve.asr, curve.clean_rejected, curve.attacked_rejected)
        for number, values in zip(at, zip(*columns)):
            last = "" if area is None else f"{area:.4f}"
            table.add_row(name, f"{number:g}", *("–" if math.isnan(v) else f"{100 * v:.2f}" for v in values), last)
            cells = ["" if math.isnan(v) else f"{v:.6f}" for v in values]
            writer.writerow([run.name, f"{number:g}", *cells, last, run.facts.get("sha256", "")])
    console.print(table)
    place = out or folders[0]
    place.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):  # type: ignore[arg-type]
        figure = draw_thresholds(
            [(name, run.config.tau, each) for name, run, each in zip(run_labels(runs), runs, found)]
        )
        assert figure is not None
        picture = png(figure)
    for name, content in (("tau.csv", text.getvalue().encode()), ("tau.png", picture)):
        replace_file(place / name, content)
        console.print(f"{name}: {place / name}", soft_wrap=True)


def triggers(
    folder: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    before: Annotated[
        Path | None,
        typer.Option(help="A run folder or a model file to compare with; default: what the run began with."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Test samples of each class that a trigger is sought on.")] = 8,
    steps: Annotated[int, typer.Option(help="Steps of each search.")] = 200,
) -> None:
    """Invert the triggers of all pairs of classes of a run's model: beside the attacker's own, and as distances.

    Writes triggers.png, distances.png and distances.csv into the run's folder; its report then shows them.
    """
    from matplotlib import rc_context

    from hawthorn.report._style import STYLE, png
    from hawthorn.report._triggers import draw_distances, draw_triggers
    from hawthorn.triggers import measure_triggers
    from server.record import replace_file

    if samples < 1 or steps < 1:
        raise ConfigError(f"--samples and --steps must be at least 1, got {samples} and {steps}")
    found = measure_triggers(folder, before, samples=samples, steps=steps)
    console.print(_distances(found))
    contents = {"distances.csv": _distances_csv(found).encode()}
    with rc_context({**STYLE, "axes.grid": False}):  # type: ignore[arg-type]
        contents["distances.png"] = png(draw_distances(found))
        if (figure := draw_triggers(found)) is not None:
            contents["triggers.png"] = png(figure)
    for name, content in contents.items():
        replace_file(folder / name, content)
        console.print(f"{name}: {folder / name}", soft_wrap=True)


def _distances(found: Any) -> Table:
    """Return the median distance to every class, before and after: a small one is suspect."""
    import torch

    names = [name for name in ("before", "after") if getattr(found, name) is not None]
    table = Table("to class", *(f"median l1, {name}" for name in names), "the attacker's l1")
    for to in range(len(found.after.distances)):
        values = [torch.nanmedian(getattr(found, name).distances[:, to]).item() for name in names]
        own = f"{float(found.true_mask.amax(0).sum()):.1f}" if to == found.target else ""
        table.add_row(str(to), *(f"{v:.1f}" if math.isfinite(v) else "none found" for v in values), own)
    return table


def _distances_csv(found: Any) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["model", "source", "target", "l1", "attackers_target"])
    for name in ("before", "after"):
        if (seen := getattr(found, name)) is not None:
            for source, row in enumerate(seen.distances.tolist()):
                for to, value in enumerate(row):
                    if source != to:
                        shown = f"{value:.4f}" if math.isfinite(value) else ""
                        writer.writerow([name, source, to, shown, int(to == found.target)])
    return text.getvalue()


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--taus wants numbers with commas, got {text!r}") from None
    if not all(0 <= number <= 1 for number in numbers):
        raise ConfigError(f"--taus wants numbers from 0 to 1, got {text!r}")
    return numbers
