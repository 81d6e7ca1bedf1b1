"""Adaptive robust clipping (ARC): shorten the longest updates to the length of the longest that is left.

Allouah et al., "Adaptive Gradient Clipping for Robust Federated Learning", ICLR 2025, section 3, algorithm 2 (titled
"Boosting Robustness by Clipping Gradients in Distributed Learning" in its first arXiv version, 2405.14432): the
k = floor(2 f (n - f) / n) updates of largest norm are clipped to the norm of the (k + 1)-th largest. No deviation;
k is computed in whole numbers, so that rounding never loses one. Needs n >= 2f + 1. Costs one reading: O(n d).
"""

from torch import Tensor

from strategies.mixing.clip_norms import shortened
from strategies.rule import Stack, claimable, count_byzantine, mixing, require_clients

LAWS_NOT_KEPT = {
    "shift": "norms are measured from the global model, the origin, and a shift changes them",
    "rows_sum_to_one": "a clipped row counts for less and nothing takes up the rest",
}


@claimable
@mixing
def arc(updates: Stack, *, num_byzantine: int | float) -> Tensor:
    """Return the diagonal matrix that clips the 2 f (n - f) / n longest rows; needs n >= 2f + 1."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("arc", "2f + 1", 2 * f + 1, num_clients, f)
    num_clipped = 2 * f * (num_clients - f) // num_clients
    lengths = updates.norms
    return shortened(lengths, lengths.sort(descending=True).values[num_clipped])
