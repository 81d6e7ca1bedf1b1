"""A file of certificates in a few lines: what was certified, what is claimed for how many points, what is assumed."""

import math
from typing import Any

import numpy as np
from rich.table import Table

from certify.files.lines import CertificateFile
from certify.files.settings import ZonotopeSettings
from certify.record import Certificate


def summarise(file: CertificateFile) -> dict[str, Any]:
    """Return the summary as JSON: an infinity is text there."""
    header = file.header
    return {
        "file": str(file.path),
        "kind": header.kind,
        "complete": not file.missing,
        "missing": file.missing,
        "model": {"file": header.model.file, "architecture": header.model.architecture, "sha256": header.model.sha256},
        "dataset": header.points.dataset,
        "split": header.points.split,
        "points": header.num_points,
        "versions": dict(header.versions),
        "claims": [_group(file, name, chosen) for name, chosen in _groups(file)],
        "assumptions": [{"name": a.name, "status": a.status, "detail": a.detail} for a in _assumptions(file)],
    }


def tables(file: CertificateFile) -> list[Table]:
    """Return the summary as tables."""
    header, known = file.header, summarise(file)
    facts = Table("", "", show_header=False, title=f"{header.kind}: {file.path}", title_justify="left")
    facts.add_row("model", f"{header.model.architecture} in {header.model.file}")
    facts.add_row("model sha256", header.model.sha256)
    indices = header.points.indices
    facts.add_row("points", f"{len(indices)} of {header.points.dataset}, {header.points.split}: {_range(indices)}")
    if file.missing:
        facts.add_row("missing", f"{file.missing} of {header.num_certificates} certificates; run the command again")
    head = ("method", "claim against", "points", "certified", "abstained", "right, %", "radius: median", "largest")
    claims = Table(*head, title="claims", title_justify="left")
    for group in known["claims"]:
        claims.add_row(
            group["method"], f"{group['level']}, {group['unit']}", str(group["points"]), str(group["certified"]),
            str(group["abstained"]), f"{100 * group['certified_accuracy']:.1f}", _number(group["median_radius"]),
            _number(group["largest_radius"]),
        )  # fmt: skip
    assumed = Table("assumption", "status", "detail", title="assumptions", title_justify="left")
    for assumption in _assumptions(file):
        style = "bold red" if assumption.status == "violated" else None
        assumed.add_row(assumption.name, assumption.status, assumption.detail, style=style)
    return [facts, claims, assumed]


def _groups(file: CertificateFile) -> list[tuple[str, list[Certificate]]]:
    """Return the certificates, those of a radius that was asked for together."""
    settings = file.header.settings
    if not isinstance(settings, ZonotopeSettings):
        chosen = list(file.certificates)
        return [(chosen[0].method, chosen)] if chosen else []
    by_eps = [(eps, [c for c in file.certificates if c.parameters["eps"] == eps]) for eps in settings.eps]
    return [(f"{chosen[0].method}, eps {eps:g}", chosen) for eps, chosen in by_eps if chosen]


def _group(file: CertificateFile, name: str, chosen: list[Certificate]) -> dict[str, Any]:
    right = [not c.abstained and c.label == file.true_label(c) for c in chosen]
    radii = np.array([c.radius for c in chosen])
    return {
        "method": name,
        "level": chosen[0].level,
        "unit": chosen[0].unit,
        "points": len(chosen),
        "certified": sum(not c.abstained for c in chosen),
        "abstained": sum(c.abstained for c in chosen),
        "certified_accuracy": sum(right) / len(chosen),
        "median_radius": _plain(float(np.sort(radii)[len(radii) // 2])),
        "largest_radius": _plain(float(radii.max())),
        "sound": all(c.sound for c in chosen),
    }


def _assumptions(file: CertificateFile) -> tuple[Any, ...]:
    return file.certificates[0].assumptions if file.certificates else ()


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)


def _number(number: float | str) -> str:
    return number if isinstance(number, str) else f"{number:.4g}"


def _range(indices: tuple[int, ...]) -> str:
    if indices == tuple(range(indices[0], indices[-1] + 1)):
        return f"{indices[0]} to {indices[-1]}"
    return ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
