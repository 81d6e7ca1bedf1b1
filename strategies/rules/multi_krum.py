"""Multi-Krum: the mean of the updates with the lowest Krum scores.

Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017,
section 5 ("m-Krum"). Deviation: the paper leaves the number of updates m open; the default is n - f, as is usual.
"""

from torch import Tensor

from strategies.rule import Stack, claimable, count_byzantine, require_clients, uniform_weights, weight_rule
from strategies.rules.krum import krum_scores
from tasks.errors import AggregationError


@claimable
@weight_rule
def multi_krum(updates: Stack, *, num_byzantine: int | float, num_selected: int | None = None) -> Tensor:
    """Weigh the `num_selected` (n - f) updates of lowest score equally and all others 0; needs n >= 2f + 3."""
    num_clients = len(updates)
    f = count_byzantine(num_byzantine, num_clients)
    require_clients("multi_krum", "2f + 3", 2 * f + 3, num_clients, f)
    num_selected = num_clients - f if num_selected is None else num_selected
    if not 1 <= num_selected <= num_clients:
        raise AggregationError(f"multi_krum wants 1 <= num_selected <= n = {num_clients}, got {num_selected}")
    scores = krum_scores(updates.squared_distances, num_clients - f - 2)
    return uniform_weights(updates, scores.argsort(stable=True)[:num_selected])
