"""What a check of FLIP's theory found, as tables for a terminal, CSV and Markdown."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from hawthorn.compare import DASH
from hawthorn.reproduce.theory import OUTSIDE, Checked, summary
from server.record import replace_file

BOUNDS = {
    "label": "attack",
    "what": "samples",
    "samples": "number",
    "accepted_before": "counted before",
    "paper_before": "paper",
    "accepted_after": "after",
    "paper_after": "paper",
    "loss_change": "loss change",
    "lower": "lower bound",
    "tight_lower": "Jensen",
    "tight_upper": "Hoeffding",
    "upper": "upper bound",
    "violations": "violations",
    "label_least": "label least",
}
RADIUS = {
    "label": "attack",
    "what": "around",
    "samples": "samples",
    "certified": "certified",
    "radius_min": "least",
    "radius_median": "median",
    "radius_max": "largest",
    "printed_norm_median": "median, printed norm",
    "within": "true one inside",
    "draws": "draws",
    "violations": "violations",
    "broken_outside": f"broken at {OUTSIDE:g} r",
    "tried_outside": "of",
}
CAPTIONS = (
    "Counted: right answers on clean, the attacker's answers on backdoored samples (the paper's Table 4). Loss change "
    "and bounds: sums over the samples, without and with the defence; violations: samples whose change leaves them.",
    "The l-infinity ball around a sample with the trigger named, in which the defence raises the loss towards the "
    "target whatever the true trigger is. Violations: draws inside in which it does not.",
)


def theory_tables(found: Sequence[Checked]) -> list[Table]:
    """Return the tables of bounds and of radii."""
    tables = []
    for head, rows, caption in _parts(found):
        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption, caption_justify="left")
        for name in head.values():
            table.add_column(name, justify="left" if name in ("attack", "samples", "around") else "right")
        for row in rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def write_theory(folder: Path, title: str, found: Sequence[Checked]) -> dict[str, Path]:
    """Write theory.csv and theory.md into `folder`; return kind -> path."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {"theory.csv": _csv(found), "theory.md": _markdown(title, found)}
    for name, text in contents.items():
        replace_file(folder / name, text.encode())
    return {name: folder / name for name in contents}


def _parts(found: Sequence[Checked]) -> list[tuple[dict[str, str], list[list[str]], str]]:
    rows = summary(list(found))
    bounds = [row for row in rows if not row["what"].startswith("radius")]
    radii = [{**row, "what": row["what"].removeprefix("radius, ")} for row in rows if row["what"].startswith("radius")]
    parts = [(BOUNDS, [_cells(row, BOUNDS) for row in bounds], CAPTIONS[0])]
    return [*parts, (RADIUS, [_cells(row, RADIUS) for row in radii], CAPTIONS[1])] if radii else parts


def _cells(row: dict[str, Any], head: dict[str, str]) -> list[str]:
    if row.get("note"):
        return [str(row["label"]), str(row["note"]), *[DASH] * (len(head) - 2)]
    return [_text(row.get(key)) for key in head]


def _text(value: object) -> str:
    if value is None or value == "":
        return DASH
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"
    return str(value)


def _csv(found: Sequence[Checked]) -> str:
    rows = summary(list(found))
    names = list(dict.fromkeys(key for row in rows for key in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({key: f"{v:.9g}" if isinstance(v, float) else v for key, v in row.items()} for row in rows)
    return out.getvalue()


def _markdown(title: str, found: Sequence[Checked]) -> str:
    blocks = [f"# {title}: the theory, checked"]
    for head, rows, caption in _parts(found):
        lines = [list(head.values()), ["---" if at < 2 else "---:" for at in range(len(head))], *rows]
        blocks += [
            "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines),
            caption,
        ]
    return "\n\n".join(blocks) + "\n"
