"""What a study of robustness shows: a table for a terminal, NAME.csv, NAME.md and NAME.png in its runs' folder."""

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib import rc_context
from rich.box import SIMPLE_HEAD
from rich.table import Table

from hawthorn.experiment import read_experiment
from hawthorn.report._style import STYLE, png
from hawthorn.reproduce.robustness import Measured, PaperRow, Robustness
from hawthorn.reproduce.robustness_picture import draw_points, draw_rows
from hawthorn.reproduce.study import Study

DASH = "–"
POLICIES = ("paper", "hardened")


@dataclass(frozen=True)
class Beside:
    """The paper's figures of one row, in percent and units of the loss; None where the paper's radius is another."""

    normal: float | None = None
    adversarial: float | None = None
    bounds: Mapping[float, tuple[float, float]] = field(default_factory=dict)  # radius -> certified, loss


def radii_of(rows: Sequence[Measured]) -> list[float]:
    """Return the radii of the bounds that any row has."""
    return sorted({bound.eps for row in rows if row.found for bound in row.found.bounds})


def attacked_at(rows: Sequence[Measured]) -> list[float]:
    """Return the radii of the attack on the final model that any row has."""
    return sorted({eps for row in rows for eps in row.attacked})


def head(rows: Sequence[Measured]) -> list[str]:
    """Return the names of the columns."""
    names = ["row", "seed", "points", "normal", "PGD", "temp. PGD", "ASR"]
    names += [f"{what} {eps:g}" for eps in radii_of(rows) for what in ("certified", "mean loss")]
    names += [f"attacked {eps:g}" for eps in attacked_at(rows)]
    return [*names, *(f"{policy} gate" for policy in POLICIES), "attack s", "gate s", "note"]


def beside(study: Study, rows: Sequence[Measured]) -> dict[str, Beside]:
    """Return the paper's figures of the rows, by label.

    The file lists them in the order of the radii of its own settings, which the runs' need not be (`--set gate-eps`).
    """
    if all(row.paper is None for row in rows):
        return {}
    own = read_experiment(str(study.path), {}, variant=study.first.variant or None, lenient=True)
    written = {arm.label: arm.config for arm in own.arms if arm.config}
    ran = {arm.label: arm for arm in study.first.arms}
    found = {}
    for row in rows:
        arm, paper = ran[row.label], row.paper
        asked = written.get(arm.paper, written.get(row.label))  # the row of the paper may be another arm's
        if paper is not None and asked is not None and arm.config is not None:
            same = asked.gate_attack_eps == arm.config.gate_attack_eps
            bounds = dict(zip(asked.gate_radii, paper.bounds, strict=False))
            found[row.label] = Beside(paper.normal, paper.adversarial if same else None, bounds)
    return found


def cells(row: Measured, rows: Sequence[Measured], paper: Beside) -> list[str]:
    """Return one row; the paper's figure stands in brackets."""
    found = row.found
    first = [row.shown, str(row.seed), str(row.certification or DASH)]
    if found is None:
        return [*first, *[DASH] * (len(head(rows)) - 4), row.note]
    first.append(_percent(found.normal_accuracy, paper.normal))
    first.append(_percent(found.pgd_accuracy, paper.adversarial))
    first += [_percent(found.temperature_pgd_accuracy), _percent(row.asr)]
    for eps in radii_of(rows):
        bound = next((bound for bound in found.bounds if bound.eps == eps), None)
        known = paper.bounds.get(eps, (None, None))
        first.append(_percent(bound.certified_accuracy if bound else None, known[0]))
        first.append(_loss(bound.mean_loss if bound else None, known[1]))
    first += [_percent(row.attacked.get(eps)) for eps in attacked_at(rows)]
    for policy in POLICIES:
        decision = row.decisions.get(policy)
        first.append(DASH if decision is None else "accepts" if decision.accepted else "rejects")
    return [*first, f"{row.seconds_train:.0f}", f"{row.seconds_gate:.0f}", row.note]


def _percent(value: float | None, paper: float | None = None) -> str:
    text = DASH if value is None else f"{100 * value:.2f}"
    return text if paper is None else f"{text} ({paper:g})"


def _loss(value: float | None, paper: float | None = None) -> str:
    text = DASH if value is None else f"{value:.3g}"
    return text if paper is None else f"{text} ({paper:g})"


def robustness_table(study: Study, rows: Sequence[Measured]) -> Table:
    """Return the table for a terminal: a line per metric, a column per row of the study."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=_caption(rows), caption_justify="left")
    first, *others = _turned(study, rows)
    for place, name in enumerate(first):
        table.add_column(name, justify="left" if place == 0 else "right", overflow="fold")
    for line in others:
        table.add_row(*line)
    return table


def _turned(study: Study, rows: Sequence[Measured]) -> list[list[str]]:
    """Return a line per metric: its name, then its value in every row of the study; the rows' names come first."""
    papers = beside(study, rows)
    columns = [head(rows), *(cells(row, rows, papers.get(row.label, Beside())) for row in rows)]
    return [list(line) for line in zip(*columns, strict=True)]


def _caption(rows: Sequence[Measured]) -> str:
    text = "Accuracies in %, the paper's figures in brackets; loss: mean certifiable loss on the certification points."
    if any(row.attacked for row in rows):
        text += " attacked: accuracy of the final model under PGD at the gate's temperature."
    return text + " gate: what a policy says of the model right after the honest one. Seconds: of the last round."


def as_csv(study: Study, rows: Sequence[Measured]) -> str:
    """Return the rows as CSV, accuracies as shares; one column each for ours and the paper's."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ["study", "variant", "row", "label", "seed", "certification_points", "normal", "pgd", "margin_pgd"]
    names += ["temperature_pgd", "acc", "asr", "paper_normal", "paper_pgd"]
    for eps in radii_of(rows):
        names += [f"{what}_{eps:g}" for what in ("certified", "loss", "relative", "paper_certified", "paper_loss")]
    names += [f"attacked_{eps:g}" for eps in attacked_at(rows)]
    names += [f"{policy}_{what}" for policy in POLICIES for what in ("gate", "reason")]
    writer.writerow([*names, "attack_seconds", "gate_seconds", "note"])
    papers = beside(study, rows)
    for row in rows:
        writer.writerow(_csv_row(study, row, rows, papers.get(row.label, Beside())))
    return out.getvalue()


def _csv_row(study: Study, row: Measured, rows: Sequence[Measured], paper: Beside) -> list[object]:
    found = row.found
    values: list[object] = [study.name, study.first.variant, row.label, row.shown, row.seed, row.certification]
    if found is None:
        values += [""] * 6
    else:
        values += [found.normal_accuracy, found.pgd_accuracy, found.margin_pgd_accuracy, found.temperature_pgd_accuracy]
        values += [row.acc, row.asr]
    values += [None if figure is None else figure / 100 for figure in (paper.normal, paper.adversarial)]
    for eps in radii_of(rows):
        bound = next((b for b in found.bounds if b.eps == eps), None) if found else None
        values += [bound.certified_accuracy, bound.mean_loss, bound.relative_margin] if bound else [""] * 3
        known = paper.bounds.get(eps)
        values += [known[0] / 100, known[1]] if known else ["", ""]
    values += [row.attacked.get(eps, "") for eps in attacked_at(rows)]
    for policy in POLICIES:
        decision = row.decisions.get(policy)
        values += ["", ""] if decision is None else [decision.accepted, "; ".join(decision.reasons)]
    values += [round(row.seconds_train, 1), round(row.seconds_gate, 1), row.note] if found else ["", "", row.note]
    return ["" if v is None else round(v, 6) if isinstance(v, float) else v for v in values]


def as_markdown(study: Study, rows: Sequence[Measured]) -> str:
    """Return the table as Markdown, what was run above it and why the gates reject below it."""
    first, *others = _turned(study, rows)
    lines = [first, ["---", *["---:"] * (len(first) - 1)]]
    lines += [[cell.replace("|", "\\|") for cell in line] for line in others]
    variant = f" ({study.first.variant})" if study.first.variant else ""
    parts = [f"# {study.first.title}{variant}", study.first.about]
    parts += ["\n".join("| " + " | ".join(line) + " |" for line in lines), _caption(rows)]
    reasons = [
        f"- {row.shown}, seed {row.seed}, {policy}: {'; '.join(decision.reasons)}."
        for row in rows
        for policy, decision in row.decisions.items()
        if decision.reasons
    ]
    if reasons:
        parts += ["## Why a gate rejects", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"


def write_robustness(study: Study, shown: Robustness, rows: Sequence[Measured]) -> dict[str, Path]:
    """Write all files; return kind -> path."""
    folder, stem = study.folder, Path(study.name).stem
    folder.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):  # type: ignore[arg-type]
        title = study.first.title
        drawn = draw_points(rows, title) if shown.kind == "points" else draw_rows(_aligned(study, rows), title)
        image = png(drawn)
    contents = {"csv": as_csv(study, rows).encode(), "md": as_markdown(study, rows).encode(), "png": image}
    written = {}
    for kind, content in contents.items():
        written[kind] = folder / f"{stem}.{kind}"
        partial = folder / f"{stem}.{kind}.partial"
        partial.write_bytes(content)
        os.replace(partial, written[kind])
    return written


def _aligned(study: Study, rows: Sequence[Measured]) -> list[Measured]:
    """Return the rows with the paper's figures at the rows' radii in their order, as they are drawn; NaN for none."""
    papers, radii, none = beside(study, rows), radii_of(rows), float("nan")
    found = []
    for row in rows:
        paper = papers.get(row.label, Beside())
        normal, adversarial = (none if figure is None else figure for figure in (paper.normal, paper.adversarial))
        bounds = tuple(paper.bounds.get(eps, (none, none)) for eps in radii)
        found.append(replace(row, paper=PaperRow(normal, adversarial, bounds) if row.paper else None))
    return found
