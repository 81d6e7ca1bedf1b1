"""From finished runs to a figure: what every curve holds, and its files, as CSV, Markdown and picture.

The files are named by the study and lie in the folder of its runs, which figures with equal arms share.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure as Picture

from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.experiment import Arm
from hawthorn.report._style import STYLE, png
from hawthorn.reproduce.by_rounds import ByRounds, radii_by_rounds
from hawthorn.reproduce.certified import WAYS, Certified, certify_line
from hawthorn.reproduce.closeness import Distances, closeness
from hawthorn.reproduce.figure import Figure, Line
from hawthorn.reproduce.figure_picture import draw_certified, draw_closeness, draw_rounds
from hawthorn.reproduce.figure_tables import (
    Curves,
    as_markdown,
    certified_csv,
    closeness_csv,
    figure_of,
    radii_of,
    rounds_csv,
)
from hawthorn.reproduce.study import Study
from server.crfl import read_training_record
from tasks.errors import CertificationError, RecordError


def measure(
    study: Study, outcomes: Mapping[str, Outcome] | None = None, tell: Callable[[str], None] = lambda text: None
) -> Curves:
    """Return every curve of every seed, in the figure's order; what is not finished says why."""
    figure, outcomes = figure_of(study), outcomes or {}
    if figure.kind == "closeness":
        return [_distances(line, seed, arms, outcomes) for line, seed, arms in _each(study, figure)]
    if figure.kind == "rounds":
        return [_by_rounds(line, seed, arms, outcomes, figure) for line, seed, arms in _each(study, figure)]
    found = []
    for line, seed, arms in _each(study, figure):
        tell(f"certifying {line.label}, seed {seed}")
        found.append(_certified(line, seed, arms, outcomes, figure.points))
    return found


def _each(study: Study, figure: Figure) -> Iterator[tuple[Line, int, dict[str, Arm]]]:
    for line in figure.lines:
        for seed, experiment in zip(study.seeds, study.experiments):
            yield line, seed, {arm.label: arm for arm in experiment.arms}


def _certified(
    line: Line, seed: int, arms: Mapping[str, Arm], outcomes: Mapping[str, Outcome], points: int
) -> Certified:
    folder = _folder(arms[line.arm], outcomes)
    if isinstance(folder, str):
        return Certified(line, seed, problem=folder)
    try:
        return certify_line(line, folder, seed, points)
    except RecordError as error:
        return Certified(line, seed, problem=str(error))


def _distances(line: Line, seed: int, arms: Mapping[str, Arm], outcomes: Mapping[str, Outcome]) -> Distances:
    folders = [_folder(arms[label], outcomes) for label in (line.arm, line.clean)]
    for label, folder in zip((line.arm, line.clean), folders):
        if isinstance(folder, str):
            return Distances(line, seed, problem=f"{label}: {folder}")
    try:
        return Distances(line, seed, tuple(closeness(*(Path(folder) for folder in folders))))
    except RecordError as error:
        return Distances(line, seed, problem=str(error))


def _by_rounds(
    line: Line, seed: int, arms: Mapping[str, Arm], outcomes: Mapping[str, Outcome], figure: Figure
) -> ByRounds:
    folder = _folder(arms[line.arm], outcomes)
    if isinstance(folder, str):
        return ByRounds(line, seed, problem=folder)
    try:
        record = read_training_record(folder)
        return ByRounds(line, seed, tuple(radii_by_rounds(record, line.ratio, figure.pa, figure.pb, figure.last_round)))
    except (RecordError, CertificationError) as error:
        return ByRounds(line, seed, problem=str(error))


def _folder(arm: Arm, outcomes: Mapping[str, Outcome]) -> Path | str:
    """Return the folder of an arm's finished run, or why there is none."""
    if arm.config is None:
        return arm.problem
    outcome = outcomes.get(arm.config.name)
    if outcome is not None and not outcome.has_record:
        return f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status
    return arm.config.run_folder if earlier_run(arm.config)[0] == "finished" else "not run"


def write_figure(study: Study, found: Curves) -> dict[str, Path]:
    """Write NAME.csv, NAME.md and NAME.png into the folder of the runs; return kind -> path."""
    folder, stem = study.folder, Path(study.name).stem
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):  # type: ignore[arg-type]
        text, picture = _drawn(study, found)
        image = png(picture)
    contents = {f"{stem}.csv": text.encode(), f"{stem}.md": as_markdown(study, found).encode(), f"{stem}.png": image}
    for name, content in contents.items():
        partial = folder / f"{name}.partial"
        partial.write_bytes(content)
        os.replace(partial, folder / name)
    return {name.rpartition(".")[2]: folder / name for name in contents}


def _drawn(study: Study, found: Curves) -> tuple[str, Picture]:
    """Return a figure's CSV and its picture."""
    title = study.first.title + (f" ({study.first.variant})" if study.first.variant else "")
    figure = figure_of(study)
    if figure.kind == "closeness":
        distances = [each for each in found if isinstance(each, Distances)]
        return closeness_csv(study, distances), draw_closeness(distances, title)
    if figure.kind == "rounds":
        by_rounds = [each for each in found if isinstance(each, ByRounds)]
        return rounds_csv(study, by_rounds), draw_rounds(by_rounds, title, figure.legend)
    certified = [each for each in found if isinstance(each, Certified)]
    radii = {way: radii_of(study, certified, way) for way in WAYS}
    return certified_csv(study, certified), draw_certified(certified, radii, title, figure.legend)
