"""Zonotopes that travel forwards: a centre and one generator per input pixel and per unstable ReLU so far.

As Singh et al. (NeurIPS 2018) describe it, one sample at a time. Its work grows with the number of generators, so
it is the cheaper way where few neurons are unstable and layers are wide.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.zonotope.graph import Graph
from certify.zonotope.relaxation import Box, relax, widen


@dataclass(frozen=True, eq=False)
class Zonotope:
    """All points center + sum of e_j * generators[j] with every e_j in [-1, 1]; one symbol e_j means one thing."""

    center: Tensor  # [*shape]
    generators: Tensor  # [symbols, *shape]

    @property
    def radius(self) -> Tensor:
        """Half the width of the smallest box around it."""
        return self.generators.abs().sum(0)

    def grown(self, symbols: int) -> "Zonotope":
        """Return it with generators of 0 for symbols that it does not have."""
        missing = symbols - self.generators.shape[0]
        if not missing:
            return self
        return Zonotope(
            self.center, torch.cat([self.generators, self.generators.new_zeros(missing, *self.center.shape)])
        )


def forward_zonotope(graph: Graph, box: Box) -> Zonotope:
    """Return the zonotope of the logits for a box of one sample (batch of 1)."""
    center, radius = box.center[0], box.radius[0].flatten()
    values = {0: Zonotope(center, torch.diag(radius).view(-1, *center.shape))}
    symbols = radius.numel()
    for index, node in enumerate(graph.nodes[1:], start=1):
        if node.kind == "linear" and node.map is not None:
            before = values[node.parents[0]]
            values[index] = Zonotope(node.map.values(before.center[None])[0], node.map.generators(before.generators))
        elif node.kind == "sum":
            first, second = (values[parent].grown(symbols) for parent in node.parents)
            values[index] = Zonotope(first.center + second.center, first.generators + second.generators)
        elif node.kind == "relu":
            values[index] = _relu(values[node.parents[0]], symbols)
            symbols = values[index].generators.shape[0]
        for parent in [known for known in values if all(known not in n.parents for n in graph.nodes[index + 1 :])]:
            if parent != index:
                del values[parent]  # nothing later looks at it
    return values[len(graph.nodes) - 1]


def _relu(before: Zonotope, symbols: int) -> Zonotope:
    radius = before.radius
    lines = relax(*widen(before.center - radius, before.center + radius), "equal")
    kept = before.grown(symbols).generators * lines.lower
    places = lines.unstable.flatten().nonzero()[:, 0]
    fresh = kept.new_zeros(places.numel(), before.center.numel())
    fresh[torch.arange(places.numel(), device=places.device), places] = lines.mu.flatten()[places]
    center = before.center * lines.lower + lines.mu
    return Zonotope(center, torch.cat([kept, fresh.view(-1, *before.center.shape)]))


def zonotope_margins(zonotope: Zonotope, label: int) -> Tensor:
    """Return upper bounds of z_q - z_y [classes] of the zonotope of the logits, exact for it; 0 at q = y."""
    difference = zonotope.center - zonotope.center[label]
    return difference + (zonotope.generators - zonotope.generators[:, label : label + 1]).abs().sum(0)
