"""One self-contained HTML page about one or several runs: nothing is loaded from elsewhere, no script runs."""

import base64
import os
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

from hawthorn.report import _curves, _gate, _tables
from hawthorn.report import _thresholds as _thresholds_picture
from hawthorn.report import _triggers as _triggers_picture
from hawthorn.report._participation import describe_crop, draw_participation
from hawthorn.report._style import HALF, STYLE, WIDE, png, run_labels
from hawthorn.triggers import kept_triggers
from server.record import RunRecord
from server.rejection import kept_confidences
from tasks.errors import RecordError

CAPTIONS = {
    "metrics": (
        "Accuracy and attack success rate of the global model after each round; round 0 is the model before training. "
        "A good defence keeps ACC high and ASR low."
    ),
    "attack": " The bars below mark the rounds in which at least one sampled client attacked.",
    "rejection": (
        "Predictions whose confidence is below tau are rejected: solid lines count a rejected sample as wrong and a "
        "rejected attack as failed, dotted lines reject nothing. The AUC is the chance that a clean sample's "
        "confidence exceeds an attacked one's."
    ),
    "shares": (
        "How much of the aggregate the attackers wrote in each round. The black line is their part of the usable "
        "replies, which equal weights would give them. Empty rounds had no attacker, no weights, or were skipped."
    ),
    "norms": (
        "How long the clients' updates were: the line is the median, the band reaches from the smallest to the "
        "largest. The dashed line is the aggregate that the rule made of them."
    ),
    "gate": (
        "What the gate measured of every candidate. Lines go through the accepted ones, which are the model; a white "
        "cross is a candidate that was rejected, in a shaded round. Round 0 is the model that the run was given. The "
        "loss is the mean of the largest upper bound of another logit's lead, 0 where it cannot lead."
    ),
    "thresholds": (
        "The final model at every threshold tau: predictions with a smaller confidence are rejected. Solid: accepted "
        "and right (ACC), or as the attacker wants (ASR); dotted: the share of clean, or attacked, samples rejected. A "
        "vertical line is the run's own tau. AUC: the chance that a clean sample is surer than an attacked one."
    ),
    "triggers": (
        "the attacker's trigger, and the smallest ones that inversion found on the model from every class to the "
        "attacker's target: mask times pattern on grey, and the mask's l1 norm."
    ),
    "distances": (
        "class distances, the l1 norm of the smallest mask found that turns samples of the row's class into the "
        "column's; –: none was found. The frame marks the attacker's target. Hardening makes distances grow."
    ),
    "seconds": "Where the time of each round went.",
}


@dataclass(frozen=True)
class Picture:
    """A figure as the page shows it."""

    data: str  # base64 of a PNG
    caption: str
    alt: str


@dataclass(frozen=True)
class GateSection:
    """One run's gate on the page."""

    label: str
    picture: Picture | None
    decisions: _tables.Grid


def write_report(runs: list[RunRecord], out: Path, title: str | None = None) -> Path:
    """Write the page about `runs` to `out` and its main figure to `out` with suffix .png; return the page's path.

    `out` without a suffix gets .html. Raises `RecordError` if there are no runs.
    """
    if not runs:
        raise RecordError("a report wants at least one run, got none")
    out = Path(out)
    out = out if out.suffix else out.with_suffix(".html")
    if out.suffix == ".png":
        raise RecordError(f"a report is an HTML page, its figure is written beside it; wanted NAME.html, got {out}")
    with rc_context(STYLE):  # type: ignore[arg-type]
        main = png(_curves.draw_metrics(runs))
        page = _page(runs, main, title or _title(runs))
    out.parent.mkdir(parents=True, exist_ok=True)
    _write(out.with_suffix(".png"), main)
    _write(out, page.encode())
    return out


def _page(runs: list[RunRecord], main: bytes, title: str) -> str:
    folder = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    attacked = any(record.attacking for run in runs for record in run.rounds)
    return environment.get_template("page.html.j2").render(
        title=title,
        warnings=_tables.warnings(runs),
        headline=_tables.headline(runs),
        metrics=_picture(main, CAPTIONS["metrics"] + (CAPTIONS["attack"] if attacked else ""), "ACC and ASR per round"),
        rejection=_drawn(_curves.draw_rejection(runs), "rejection", "ACC, ASR and confidence AUC with rejection"),
        thresholds=_thresholds(runs),
        triggers=_triggers(runs),
        gates=_gates(runs),
        gate_tally=_gate.tally(runs),
        quorums=_gate.quorums(runs),
        shares=_drawn(_curves.draw_shares(runs), "shares", "attackers' part of the weight per round"),
        shares_missing=_shares_missing(runs, attacked),
        participation=_participation(runs),
        norms=_drawn(_curves.draw_norms(runs), "norms", "norms of updates per round"),
        seconds=_drawn(_curves.draw_seconds(runs), "seconds", "seconds per round"),
        dropped=_tables.dropped_replies(runs),
        dropped_by_client=_tables.dropped_by_client(runs),
        skipped=_tables.skipped_rounds(runs),
        differing=_tables.settings_that_differ(runs),
        settings=_tables.all_settings(runs),
        facts=_tables.facts(runs),
        single=len(runs) == 1,
    )


def _title(runs: list[RunRecord]) -> str:
    return f"Run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs compared"


def _gates(runs: list[RunRecord]) -> list[GateSection]:
    sections = []
    for run, label in zip(runs, run_labels(runs)):
        if _gate.gated([run]):
            picture = _drawn(_gate.draw_gate(run, f"{label}, {run.config.gate}"), "gate", f"the gate of {label}")
            sections.append(GateSection(label, picture, _gate.decisions(run)))
    return sections


def _thresholds(runs: list[RunRecord]) -> Picture | None:
    """The curves over tau, of the runs whose confidences `hawthorn tau` has kept."""
    named = zip(run_labels(runs), runs)
    found = [(name, run.config.tau, kept) for name, run in named if (kept := kept_confidences(run)) is not None]
    return _drawn(_thresholds_picture.draw_thresholds(found), "thresholds", "ACC and ASR over the threshold; the ROC")


def _triggers(runs: list[RunRecord]) -> list[Picture]:
    """Inverted triggers and class distances, of the runs for which `hawthorn triggers` has kept them."""
    pictures = []
    for run, label in zip(runs, run_labels(runs)):
        if (found := kept_triggers(run)) is None:
            continue
        with rc_context({"axes.grid": False}):
            before = f" Before: {found.before.name}." if found.before else ""
            if (figure := _triggers_picture.draw_triggers(found)) is not None:
                caption = f"{label}: {CAPTIONS['triggers']}{before}"
                pictures.append(_picture(png(figure), caption, f"triggers of {label}"))
            figure = _triggers_picture.draw_distances(found)
            caption = f"{label}: {CAPTIONS['distances']}{before}"
            pictures.append(_picture(png(figure), caption, f"class distances of {label}"))
    return pictures


def _participation(runs: list[RunRecord]) -> list[Picture]:
    pictures = []
    for run, label in zip(runs, run_labels(runs)):
        if figure := draw_participation(run, WIDE if len(runs) == 1 else HALF):
            caption = f"{label}, {run.config.defence}. {describe_crop(run)}".rstrip()
            pictures.append(_picture(png(figure), caption, f"clients and rounds of {label}"))
    return pictures


def _shares_missing(runs: list[RunRecord], attacked: bool) -> str:
    """Say which runs have no panel of shares, and why."""
    if not attacked:
        return "Nobody attacked in these runs." if len(runs) > 1 else "Nobody attacked in this run."
    names = []
    for run, label in zip(runs, run_labels(runs)):
        applied = [record for record in run.rounds if record.attacking and not record.skipped]
        if applied and all(record.weights is None for record in applied):
            names.append(label)
    return f"No weights per client for {', '.join(names)}: the rule works on single parameters." if names else ""


def _drawn(figure: Figure | None, key: str, alt: str) -> Picture | None:
    return None if figure is None else _picture(png(figure), CAPTIONS[key], alt)


def _picture(data: bytes, caption: str, alt: str) -> Picture:
    return Picture(base64.b64encode(data).decode(), caption, alt)


def _write(path: Path, content: bytes) -> None:
    """Write in one step: whoever has the page open never loads half of one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
