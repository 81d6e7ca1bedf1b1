"""Certified accuracy and certified rate against the radius, with bands for the population behind the test points.

Xie et al., "CRFL" (ICML 2021), section 6: rate(r) is the share of points with radius r or more, accuracy(r) the share
of those that are correct as well. A point that abstained counts as radius 0, as in the paper, so rate(0) is 1.

Bands treat test points as independent draws. They say how far the share is from the population's, given the votes;
that certificates themselves may be wrong is their own alpha, which `num_points` of the bounds makes joint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from certify.bounds import Floats, clopper_pearson_lower, clopper_pearson_upper, hoeffding_margin_upper
from certify.record import Certificate
from tasks.errors import CertificationError

Band = Literal["pointwise", "uniform"]


@dataclass(frozen=True, eq=False)
class Curve:
    """A share per radius, and a band that holds the population's share with probability 1 - alpha."""

    radii: Floats
    share: Floats
    lower: Floats
    upper: Floats
    alpha: float
    band: Band


def certified_rate(
    certificates: Sequence[Certificate], radii: Any, *, alpha: float = 0.05, band: Band = "pointwise"
) -> Curve:
    """Return the share of points whose radius is at least r, for each r of `radii`."""
    return _curve(np.array([c.radius for c in certificates]), radii, alpha, band)


def certified_accuracy(
    certificates: Sequence[Certificate], labels: Any, radii: Any, *, alpha: float = 0.05, band: Band = "pointwise"
) -> Curve:
    """Return the share of points whose radius is at least r and whose label is that of `labels` [points]."""
    true = np.asarray(labels)
    if true.shape != (len(certificates),):
        raise CertificationError(f"labels must be one per certificate, {len(certificates)}, got shape {true.shape}")
    right = [c.label is not None and c.label == label for c, label in zip(certificates, true.tolist())]
    return _curve(np.where(right, [c.radius for c in certificates], -np.inf), radii, alpha, band)


def _curve(found: Floats, radii: Any, alpha: float, band: Band) -> Curve:
    """Return the share of `found` that is at least r; "uniform" is the band of Dvoretzky, Kiefer and Wolfowitz.

    Its constant is Massart's (1990): both sides over all radii at once, at alpha / 2 each.
    """
    asked = np.asarray(radii, dtype=np.float64)
    if not len(found) or asked.ndim != 1 or not (asked >= 0).all():
        raise CertificationError("a curve wants at least one certificate and a list of radii from 0")
    counts = len(found) - np.searchsorted(np.sort(found), asked, side="left")
    share = counts / len(found)
    if band == "uniform":
        margin = hoeffding_margin_upper(len(found), alpha / 2)
        lower, upper = np.maximum(share - margin, 0.0), np.minimum(share + margin, 1.0)
    elif band == "pointwise":
        lower = clopper_pearson_lower(counts, len(found), alpha / 2)
        upper = clopper_pearson_upper(counts, len(found), alpha / 2)
    else:
        raise CertificationError(f"band must be pointwise or uniform, got {band!r}")
    return Curve(asked, share, lower, upper, alpha, band)
