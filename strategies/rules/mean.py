"""The plain mean: every client counts the same. No defence; the baseline of every table.

McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017
(FedAvg), algorithm 1. Deviation: FedAvg weighs clients by the number of samples they claim, which one client
can lie about; here all weights are equal.
"""

from torch import Tensor

from strategies.rule import Stack, claimable, uniform_weights, weight_rule

LAWS_NOT_KEPT = {"bounded": "one client moves the mean as far as it likes"}


@claimable
@weight_rule
def mean(updates: Stack) -> Tensor:
    """Weigh every client 1/n."""
    return uniform_weights(updates)
