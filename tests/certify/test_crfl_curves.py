"""Certified accuracy and rate against the radius: counts by hand, bands that cover, order."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certify.crfl.curves import certified_accuracy, certified_rate
from certify.record import Certificate
from tasks.errors import CertificationError

SHA = "0123456789abcdef" * 4


def certificates(radii: Any, labels: Any = None) -> list[Certificate]:
    """Return certificates of these radii; label None where the radius is 0."""
    found = labels if labels is not None else [0] * len(radii)
    shared: dict[str, Any] = {
        "level": "feature",
        "method": "test",
        "unit": "l2",
        "model_sha256": SHA,
        "data_sha256": SHA,
    }
    return [Certificate(label=c if r > 0 else None, radius=r, **shared) for r, c in zip(radii, found, strict=True)]


def test_shares_by_hand() -> None:
    found = certificates([0.0, 0.5, 1.0, 1.0, 2.0], [1, 1, 1, 0, 1])
    rate = certified_rate(found, [0, 0.5, 0.75, 1.0, 1.5, 2.0, 2.1])
    assert rate.share.tolist() == [1.0, 0.8, 0.6, 0.6, 0.2, 0.2, 0.0], "an abstention has radius 0, so rate(0) is 1"
    accuracy = certified_accuracy(found, [1] * 5, [0, 0.5, 0.75, 1.0, 1.5, 2.0, 2.1])
    assert accuracy.share.tolist() == [0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.0], "an abstention is never correct"


@given(st.lists(st.floats(0, 10), min_size=1, max_size=60), st.integers(0, 10**6))
def test_curves_fall_within_their_bands(radii: list[float], seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = certificates(radii, rng.integers(0, 3, len(radii)).tolist())
    truth, grid = rng.integers(0, 3, len(radii)), np.linspace(0, 11, 23)
    for band in ("pointwise", "uniform"):
        rate = certified_rate(found, grid, band=band)
        accuracy = certified_accuracy(found, truth, grid, band=band)
        assert (accuracy.share <= rate.share).all()
        for curve in (rate, accuracy):
            assert (np.diff(curve.share) <= 0).all()
            assert (curve.lower <= curve.share).all() and (curve.share <= curve.upper).all()  # noqa: PT018
            assert curve.lower.min() >= 0 and curve.upper.max() <= 1  # noqa: PT018
    slow = [np.mean([r >= g for r in radii]) for g in grid]
    assert certified_rate(found, grid).share == pytest.approx(slow)


def test_bands_cover_the_population() -> None:
    """Radii of an exponential law, 400 test sets of 50 points: the truth is inside for 80 % of them at least."""
    rng = np.random.default_rng(1)
    grid = np.linspace(0, 3, 31)
    truth = np.exp(-grid)
    inside = {"pointwise": 0, "uniform": 0}
    for _ in range(400):
        found = certificates(rng.exponential(size=50).tolist())
        at_one = certified_rate(found, [1.0], alpha=0.2)
        inside["pointwise"] += bool(at_one.lower[0] <= np.exp(-1) <= at_one.upper[0])
        whole = certified_rate(found, grid, alpha=0.2, band="uniform")
        inside["uniform"] += bool(((whole.lower <= truth) & (truth <= whole.upper)).all())
    assert min(inside.values()) >= 0.8 * 400 - 3 * np.sqrt(400 * 0.16)
    assert inside["uniform"] < 400, "bands are not so wide that they could not fail"


def test_refusals() -> None:
    with pytest.raises(CertificationError, match="at least one certificate"):
        certified_rate([], [0.0])
    with pytest.raises(CertificationError, match="labels must be one per certificate, 2"):
        certified_accuracy(certificates([1.0, 2.0]), [1], [0.0])
    with pytest.raises(CertificationError, match="band must be"):
        certified_rate(certificates([1.0]), [0.0], band="wald")  # type: ignore[arg-type]
    with pytest.raises(CertificationError, match="radii from 0"):
        certified_rate(certificates([1.0]), [-1.0])
