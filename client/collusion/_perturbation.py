"""The family mean + gamma p in which Min-Max and Min-Sum look for their update, and the perturbations p.

Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021: the inverse unit vector -mean / ||mean||, the
inverse standard deviation -std and the inverse sign -sign(mean). The length of p cancels against gamma, so -mean
stands for the unit vector here.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from client.collusion._geometry import Known, centre, deviation, shared

Perturbation: TypeAlias = Literal["unit", "std", "sign"]


def centre_along(block: Tensor, perturbation: Perturbation) -> tuple[Tensor, Tensor]:
    """Subtract the mean from a block of columns in place; return the mean and p (``[width]`` each)."""
    mean = centre(block)
    if perturbation == "std":
        return mean, deviation(block).neg_()
    return mean, -mean if perturbation == "unit" else mean.sign().neg_()


@dataclass(frozen=True)
class Line:
    """All that distances to mean + gamma p depend on, with d_i = x_i - mean: every one is a quadratic in gamma."""

    products: Tensor  # <d_i, d_j>, [k, k]
    slopes: Tensor  # <d_i, p>, [k]
    square: float  # ||p||^2

    @classmethod
    def through(cls, known: Known, perturbation: Perturbation) -> "Line":
        """Measure the line in one reading of the stack."""
        products = torch.zeros(len(known), len(known), dtype=torch.float64, device=known.updates.device)
        slopes, square = products.new_zeros(len(known)), products.new_zeros(())
        for _, block in known.blocks():
            _, direction = centre_along(block, perturbation)
            products += block @ block.t()
            slopes += block @ direction
            square += direction @ direction
        return cls(products, slopes, float(square))


def at(known: Known, perturbation: Perturbation, gamma: float, num_attackers: int) -> Tensor:
    """Return mean + gamma p as the update of every attacker (``[num_attackers, params]``)."""

    def values(block: Tensor) -> Tensor:
        mean, direction = centre_along(block, perturbation)
        return mean.add_(direction, alpha=gamma)

    return shared(known.craft(values), num_attackers)
