"""CFAT's acceptance policy: every accuracy at least 0.9 times, every loss within 10% of, the last accepted model's.

The certified federated adversarial training paper ("CFAT", NFFL 2021), section 4; what it leaves open is decided in
`certify.gate`. The loss counts both ways, so a model that still learns quickly is rejected for getting better: start
such a run near convergence (`from-model`), or let the first `warmup_rounds` models pass.
"""

from certify.gate import Policy, policy


def paper(
    *,
    accuracy_share: float = 0.9,
    loss_share: float = 0.1,
    loss_floor: float = 0.0,
    two_sided: bool = True,
    warmup_rounds: int = 0,
) -> Policy:
    """Return the policy; `loss_floor` is what a loss near 0 may change besides, in units of the loss."""
    return policy(
        "paper",
        accuracy_share=accuracy_share,
        loss_share=loss_share,
        loss_floor=loss_floor,
        two_sided=two_sided,
        warmup_rounds=warmup_rounds,
    )
