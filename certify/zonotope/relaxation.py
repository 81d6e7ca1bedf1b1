"""Lines around a ReLU on an interval, and the box of inputs: where soundness is decided.

Zonotopes (Singh, Gehr, Mirman, Püschel, Vechev, "Fast and Effective Robustness Certification", NeurIPS 2018) put the
ReLU on [l, u], l < 0 < u, between two parallel lines: slope * x and slope * x + 2 mu, slope = u / (u - l). Any slope
in [0, 1] is sound with 2 mu = max(-slope l, (1 - slope) u); mu is computed like that from the slope as rounded, so no
rounding of the slope can make it wrong. Adaptive slopes (Zhang, Weng, Chen, Hsieh, Daniel, "CROWN", NeurIPS 2018)
take 1 or 0 for the lower line, whichever leaves the smaller area. An upper end of exactly 0 is inactive.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tasks.errors import CertificationError

Slopes = Literal["equal", "adaptive"]
# Bounds of a layer are widened by this many units in the last place of their magnitude: sums of many rounded terms.
WIDENING = 32


@dataclass(frozen=True, eq=False)
class Relaxation:
    """Lines [samples, *shape] with lower * x <= relu(x) <= upper * x + 2 mu; equal slopes have lower is upper."""

    lower: Tensor
    upper: Tensor
    mu: Tensor
    unstable: Tensor  # bool

    @property
    def equal(self) -> bool:
        return self.lower is self.upper

    def __getitem__(self, some: slice) -> "Relaxation":
        """Return the lines of some samples."""
        lower = self.lower[some]
        return Relaxation(lower, lower if self.equal else self.upper[some], self.mu[some], self.unstable[some])


@dataclass(frozen=True, eq=False)
class Box:
    """Centre and radius [samples, *input_shape] of the inputs considered, in the type bounds are computed in."""

    center: Tensor
    radius: Tensor

    @property
    def low(self) -> Tensor:
        return self.center - self.radius

    @property
    def high(self) -> Tensor:
        return self.center + self.radius

    def __getitem__(self, index: slice | Tensor) -> "Box":
        return Box(self.center[index], self.radius[index])


def input_box(inputs: Tensor, eps: float, input_range: tuple[float, float], dtype: torch.dtype) -> Box:
    """Return the l_inf ball around `inputs` inside `input_range`, rounded outwards; clipping moves the centre."""
    exact = inputs.double()
    low, high = exact, exact
    if eps > 0:
        low = torch.nextafter(exact - eps, exact.new_tensor(-torch.inf)).clamp(min=input_range[0])
        high = torch.nextafter(exact + eps, exact.new_tensor(torch.inf)).clamp(max=input_range[1])
    center = ((low + high) / 2).to(dtype)
    radius = torch.maximum(high - center.double(), center.double() - low)
    rounded = radius.to(dtype)
    up = torch.nextafter(rounded, rounded.new_tensor(torch.inf))
    return Box(center, torch.where(radius > 0, up, torch.zeros_like(up)))


def relax(low: Tensor, high: Tensor, slopes: Slopes) -> Relaxation:
    """Return the lines for pre-activations in [low, high]; NaN stays NaN. Differentiable in both."""
    unstable = ~((low >= 0) | (high <= 0))  # NaN counts as unstable, so that it shows in every bound
    below, above = low.clamp(max=0), high.clamp(min=0)  # NaN passes through, here and below
    width = above - below
    upper = (above / (width + (width == 0))).clamp(0, 1)  # exactly 1 or 0 where stable
    mu = (
        torch.maximum(-upper * below, (1 - upper) * above) / 2
    )  # also the upper line's of adaptive slopes: it is the same
    if slopes == "equal":
        return Relaxation(upper, upper, mu, unstable)
    # ties (differences of two inputs have them) go to slope 0, whichever way they were rounded
    lower = torch.where(unstable, (high > -low * (1 + 1e-5)).to(low.dtype), upper)
    return Relaxation(lower, upper, mu, unstable)


def hull(low: Tensor, high: Tensor, lines: Relaxation) -> tuple[Tensor, Tensor]:
    """Return the interval that the relaxed ReLU covers (not [relu(low), relu(high)]): what rows cannot leave."""
    return lines.lower * low, lines.upper * high + 2 * lines.mu


def widen(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval widened by `WIDENING` units in the last place of its magnitude."""
    slack = WIDENING * torch.finfo(low.dtype).eps * torch.maximum(low.abs(), high.abs())
    return low - slack, high + slack


def check_box(inputs: Tensor, eps: float, input_range: tuple[float, float], input_shape: tuple[int, ...]) -> None:
    """Raise `CertificationError` unless inputs are finite, inside `input_range` and of `input_shape`, and eps >= 0."""
    if tuple(inputs.shape[1:]) != input_shape or not inputs.is_floating_point():
        wanted = f"floating-point inputs [samples, {', '.join(map(str, input_shape))}]"
        raise CertificationError(f"wanted {wanted}, got {tuple(inputs.shape)} of {inputs.dtype}")
    if isinstance(eps, bool) or not (isinstance(eps, int | float) and 0 <= eps < float("inf")):
        raise CertificationError(f"eps must be a finite number from 0, got {eps!r}")
    if not -float("inf") < input_range[0] < input_range[1] < float("inf"):
        raise CertificationError(f"input_range must be two finite ends, the lower first, got {input_range}")
    if not bool(((inputs >= input_range[0]) & (inputs <= input_range[1])).all()):
        raise CertificationError(f"every input must be a number inside input_range {input_range}")
