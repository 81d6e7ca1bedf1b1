"""The acceptance policy against what walks around the paper's: probes for masked gradients, anchors against drift.

Deviates from CFAT (NFFL 2021), section 4, as `certify.gate` says: a loss may fall freely, every metric is also held
against the best accepted one, margin-loss and temperature PGD count, and the relative margin, which no scaling of the
logits changes, is judged beside the loss.
"""

from certify.gate import HARDENED, Policy, policy


def hardened(
    *,
    accuracy_share: float = HARDENED.accuracy_share,
    loss_share: float = HARDENED.loss_share,
    loss_floor: float = HARDENED.loss_floor,
    warmup_rounds: int = HARDENED.warmup_rounds,
    accuracy_floor: float = HARDENED.accuracy_floor,
    anchor_share: float = HARDENED.anchor_share,
    anchor_loss_share: float = HARDENED.anchor_loss_share,
    anchor_loss_floor: float = HARDENED.anchor_loss_floor,
    anchor_margin_slack: float = HARDENED.anchor_margin_slack,
    max_masking_gap: float = HARDENED.max_masking_gap,
    margin_slack: float = HARDENED.margin_slack,
) -> Policy:
    """Return the policy; shares are of the metric compared with, floors and slacks are in the metric's own units."""
    return policy(
        "hardened",
        accuracy_share=accuracy_share,
        loss_share=loss_share,
        loss_floor=loss_floor,
        warmup_rounds=warmup_rounds,
        accuracy_floor=accuracy_floor,
        anchor_share=anchor_share,
        anchor_loss_share=anchor_loss_share,
        anchor_loss_floor=anchor_loss_floor,
        anchor_margin_slack=anchor_margin_slack,
        max_masking_gap=max_masking_gap,
        margin_slack=margin_slack,
    )
