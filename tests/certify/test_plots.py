"""Pictures: what the lines say, which files are refused, the same bytes each time."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from certify.files.header import Header, ModelSource, PointSource
from certify.files.lines import CertificateFile
from certify.files.settings import VoteSettings, ZonotopeSettings
from certify.plots import draw, plot
from certify.record import Certificate
from tasks.errors import RecordError

SHA = "0123456789abcdef" * 4
LABELS = (0, 1, 2, 0, 1)


def header(settings: Any) -> Header:
    model = ModelSource(file="model.safetensors", architecture="logistic_regression()", sha256=SHA)
    points = PointSource(dataset="digits()", split="test", indices=(0, 1, 2, 3, 4), labels=LABELS, sha256=SHA)
    return Header(model=model, points=points, settings=settings)


def votes(name: str = "votes", unit: str = "l2 of the released model's parameters") -> CertificateFile:
    """Return five certificates: radii 1, 2, 3, one abstained, one wrong with radius 4."""
    known: dict[str, Any] = {"level": "client", "method": "m", "unit": unit, "model_sha256": SHA, "data_sha256": SHA}
    labels, radii = (0, 1, 2, None, 0), (1.0, 2.0, 3.0, 0.0, 4.0)
    found = [Certificate(label=c, radius=r, sample=i, **known) for i, (c, r) in enumerate(zip(labels, radii))]
    return CertificateFile(Path(f"{name}.jsonl"), header(VoteSettings(way="margin")), tuple(found))


def bounds() -> CertificateFile:
    """Return bounds at two radii: three points certified at 0.1, one of them at 0.2; one predicted wrong."""
    known: dict[str, Any] = {"level": "input", "method": "m", "unit": "linf", "model_sha256": SHA, "data_sha256": SHA}
    uppers = {0.1: (-5.0, -2.0, -1.0, 3.0, 900.0), 0.2: (-1.0, 4.0, 8.0, 30.0, float("inf"))}
    clean = (9.0, 8.0, 7.0, 6.0, -5.0)
    found = [
        Certificate(
            label=LABELS[i] if upper < 0 else None, radius=eps if upper < 0 else 0.0, closed=True, sample=i,
            bounds={"margin_upper": upper}, parameters={"eps": eps, "clean_margin": clean[i]}, **known,
        )
        for eps, row in uppers.items()
        for i, upper in enumerate(row)
    ]  # fmt: skip
    return CertificateFile(Path("bounds.jsonl"), header(ZonotopeSettings(eps=(0.1, 0.2))), tuple(found))


def at(line: Any, radius: float) -> float:
    """Return a drawn step function ("steps-pre") at a radius."""
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    return float(y[np.searchsorted(x, radius, side="left")])


def test_lines_are_the_shares_of_points_at_each_radius() -> None:
    accuracy, rate = draw([votes()]).axes
    assert accuracy.get_ylabel() == "certified accuracy, %"
    assert {line.get_drawstyle() for axes in (accuracy, rate) for line in axes.lines} == {"steps-pre"}
    for radius, right, certified in [(0.0, 60, 100), (0.5, 60, 80), (1.0, 60, 80), (1.01, 40, 60), (3.5, 0, 20)]:
        assert at(accuracy.lines[0], radius) == pytest.approx(right)
        assert at(rate.lines[0], radius) == pytest.approx(certified)
    assert rate.lines[0].get_ydata()[-1] == 0  # type: ignore[index]
    assert len(accuracy.collections) == 1  # the band


def test_bounds_are_drawn_as_points_steps_and_margins() -> None:
    figure = draw([bounds()])
    accuracy, rate, margins, relative = figure.axes
    steps = next(line for line in accuracy.lines if line.get_drawstyle() == "steps-pre")
    assert [at(steps, radius) for radius in (0.05, 0.1, 0.15, 0.2)] == pytest.approx([60, 60, 20, 20])
    clean = [line for line in accuracy.lines if set(np.asarray(line.get_ydata()).tolist()) == {80.0}]
    assert len(clean) == 1  # the share that is predicted right
    sorted_bounds = [np.asarray(line.get_ydata()).tolist() for line in margins.lines[:2]]
    assert sorted_bounds == [[-5.0, -2.0, -1.0, 3.0, 900.0], [-1.0, 4.0, 8.0, 30.0]]
    assert relative.lines[0].get_ydata()[0] == pytest.approx(-5 / 9)  # type: ignore[index]
    assert len(rate.lines) >= 2


def test_units_have_rows_of_their_own() -> None:
    figure = draw([votes(), votes("clients", "clients"), bounds()])
    assert all(float(tick).is_integer() for tick in figure.axes[2].get_xticks())
    labels = [axes.get_xlabel() for axes in figure.axes[::2]]
    assert labels == [
        "radius: l2 distance that the released model may be moved", "malicious clients",
        "radius eps: l_inf change of the input", "points, sorted, %",
    ]  # fmt: skip


def test_infinite_radii_stay_at_the_top() -> None:
    file = votes()
    first = dataclasses.replace(file.certificates[0], radius=float("inf"))
    accuracy, _ = draw([dataclasses.replace(file, certificates=(first, *file.certificates[1:]))]).axes
    assert accuracy.lines[0].get_ydata()[-1] == pytest.approx(20)  # type: ignore[index]
    assert np.isfinite(np.asarray(accuracy.lines[0].get_xdata())).all()


def test_the_picture_is_a_png_and_always_the_same(tmp_path: Path) -> None:
    first = plot([votes(), bounds()], tmp_path / "new" / "first").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert plot([votes(), bounds()], tmp_path / "second.png").read_bytes() == first
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["first.png", "second.png"]


def test_unfinished_bounds_count_the_points_that_have_all_radii() -> None:
    file = bounds()
    some = dataclasses.replace(file, certificates=file.certificates[:7])
    accuracy = draw([some]).axes[0]
    steps = next(line for line in accuracy.lines if line.get_drawstyle() == "steps-pre")
    assert [at(steps, radius) for radius in (0.1, 0.2)] == pytest.approx([100, 50])
    with pytest.raises(RecordError, match="no point with all its radii"):
        draw([dataclasses.replace(file, certificates=file.certificates[:4])])


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    empty = dataclasses.replace(votes(), certificates=())
    with pytest.raises(RecordError, match=r"no certificates in: votes\.jsonl"):
        plot([empty], tmp_path / "p.png")
    with pytest.raises(RecordError, match="no file"):
        plot([], tmp_path / "p.png")
    with pytest.raises(RecordError, match=r"NAME\.png"):
        plot([votes()], tmp_path / "p.pdf")
