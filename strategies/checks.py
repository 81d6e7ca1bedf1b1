"""What a reply must be before a rule sees it; one bad client never stops a round.

Checked: an error or no content, a record named "arrays", array names, shapes, dtype and size, finite values, the norm
of the update, and (only where the setting trusts it) the claimed sample count.
"""

import math

import torch
from flwr.app import ArrayRecord, Message, MetricRecord
from torch import Tensor

from tasks.params import Layout
from tasks.wire import WireError, from_record

MAX_CLAIM = 10**9  # a claimed sample count above this is a lie or an error


def read_update(reply: Message, layout: Layout, start: Tensor, max_norm: float, out: Tensor) -> float | str:
    """Write the update (client model minus `start`, [params]) into `out`; return its l2 norm, or why it is dropped."""
    if reply.has_error():
        return f"error {reply.error.code}: {shorten(reply.error.reason)}"
    if not reply.has_content():
        return "empty reply"
    record = reply.content.get("arrays")
    if not isinstance(record, ArrayRecord):
        return "reply has no arrays"
    try:
        from_record(record, layout, out)
    except WireError as error:
        return str(error)
    out.sub_(start)
    norm = update_norm(out)
    if not math.isfinite(norm):
        return "values are not finite"
    if norm > max_norm:
        return f"update norm {norm:.3g} is above max-update-norm {max_norm:.3g}"
    return norm


def update_norm(update: Tensor) -> float:
    """Return the l2 norm of an update in float64; NaN or inf exactly when some value is not finite."""
    return float(torch.linalg.vector_norm(update, dtype=torch.float64))


def claimed_examples(reply: Message) -> float | str:
    """Return the sample count that a client claims, or the reason why it is not usable."""
    metrics = reply.content.get("metrics")
    if not isinstance(metrics, MetricRecord) or "num-examples" not in metrics:
        return "reply claims no num-examples"
    claim = metrics["num-examples"]
    if isinstance(claim, list) or not math.isfinite(claim) or not 1 <= claim <= MAX_CLAIM:
        return f"claimed num-examples {shorten(str(claim))} is not in 1 to {MAX_CLAIM}"
    return float(claim)


def shorten(text: str | None, length: int = 160) -> str:
    """Return foreign text on one line of printable characters (no terminal escapes, no bidi marks), cut to `length`."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(text or "")).split())
    return line if len(line) <= length else line[: length - 1] + "…"
