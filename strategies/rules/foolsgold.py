"""FoolsGold: clients whose summed updates point the same way count less: sybils share a goal, honest data differ.

Fung, Yoon and Beschastnikh, "The Limitations of Federated Learning in Sybil Settings", RAID 2020, section 5 and
algorithm 1 (the preprint of 2018 is "Mitigating Sybils in Federated Learning Poisoning"). With h_i the sum of all that
client i has sent and cs_ij = cos(h_i, h_j), the steps are:

    v_i = max_j cs_ij, but at least 0;   pardon: cs_ij <- cs_ij v_i / v_j where v_i < v_j
    a_i = 1 - max_j cs_ij, within [0, 1];   a_i <- a_i / max_j a_j
    weight_i = confidence (ln(a_i / (1 - a_i)) + 0.5), within [0, 1];   a_i = 1 counts as 0.99

Deviations: the paper applies the sum of weight_i x_i, which grows with the number of clients; here it is divided by n,
as in the code of Xie et al., "DBA", ICLR 2020, so that honest clients give their mean (a server-lr of n undoes it);
what sybils lose, nobody takes up.
Where all a_i are 0, as when all clients send the same, the paper divides 0 by 0; here nobody counts and the aggregate
is 0. A client that never sent anything but 0 has cosine 0 with all.

Precondition: none on n and f, and no bound either: an attacker alone is as singular as an honest client and counts in
full, however long its update; clip its norm elsewhere. Cost: the history's features are read once, in float64, the
updates once for the sum.
"""

from typing import Literal

import torch
from torch import Tensor

from strategies.rule import Stack, weight_rule
from tasks.errors import AggregationError, ConfigError

BLOCK_COLUMNS = 8192
ALIKE = 1e-10  # 1 - cosine below which directions differ by rounding: sums in float32 do by about 1e-7, squared here
LAWS_NOT_KEPT = {
    "shift": "angles are measured from the global model, the origin, and a shift changes them",
    "unanimity": "equal updates are what sybils send: none of them counts",
    "bounded": "a single attacker resembles nobody, counts in full and is as long as it likes",
}


@weight_rule
def foolsgold(
    updates: Stack, history: Tensor, *, features: Literal["output", "all"] = "output", confidence: float = 1.0
) -> Tensor:
    """Weigh each client by how little the sum of its updates resembles another's, at most 1/n.

    `history` ``[rows, features]`` holds these sums: of the output layer's weight alone, or of "all" parameters.
    """
    if confidence <= 0:
        raise ConfigError(f"foolsgold wants confidence > 0, got {confidence}")
    if history.ndim != 2 or len(history) != len(updates):
        wanted = f"the history of every client, [{len(updates)}, {features} features]"
        raise AggregationError(f"foolsgold wants {wanted}, got {list(history.shape)}")
    return learning_rates(cosines(history), confidence) / len(updates)


def learning_rates(similarities: Tensor, confidence: float = 1.0) -> Tensor:
    """Return weights in [0, 1] (``[clients]``) for pairwise cosines with a diagonal of 0."""
    most = similarities.amax(1)  # at least 0, the diagonal
    pardons = torch.where(most[:, None] < most, most[:, None] / most.where(most > 0, 1.0), 1.0)
    singular = (1 - (similarities * pardons).amax(1)).clamp(0, 1)
    if float(singular.max()) < ALIKE:
        return torch.zeros_like(singular)
    singular = singular / singular.max()
    singular = torch.where(singular == 1, 0.99, singular)
    return (confidence * (torch.log(singular / (1 - singular)) + 0.5)).clamp(0, 1)


def cosines(history: Tensor) -> Tensor:
    """Return cos(h_i, h_j) (``[clients, clients]``, float64), 0 on the diagonal and where a row is 0.

    In float64, in which products of float32 numbers are exact, since what counts is how far from 1 they are.
    Sums that have left the range of numbers count as the largest there is, and where products do, rows are shortened.
    """
    products = _products(history, None)
    if not products.isfinite().all():
        history = history.nan_to_num()
        sizes = history.abs().amax(1, keepdim=True).double()
        products = _products(history, sizes.where(sizes > 0, 1.0))
    lengths = products.diagonal().sqrt()
    both = lengths[:, None] * lengths
    found = torch.where(both > 0, products / both.where(both > 0, 1.0), 0.0)
    return found.clamp(-1, 1).fill_diagonal_(0)


def _products(history: Tensor, sizes: Tensor | None) -> Tensor:
    """Return the inner products (``[clients, clients]``, float64) of the rows, by `sizes` ``[clients, 1]`` if given."""
    products = torch.zeros(len(history), len(history), dtype=torch.float64, device=history.device)
    for block in history.split(BLOCK_COLUMNS, dim=1):
        rows = block.double() if sizes is None else block.double() / sizes
        products += rows @ rows.t()
    return products
