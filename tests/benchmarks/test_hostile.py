"""Every kind of hostile reply under every rule: dropped with a reason, or bounded; never a crash, never NaN."""

import pytest

from benchmarks.hostile import HOSTILE, KINDS, NUM_CLIENTS, counts_claims, rule_text, try_kind
from tasks import spec

USED = {"100x boost", "extra metric"}  # well-formed: only the rule can tell
UNBOUNDED = {"mean", "foolsgold", "rlr"}  # no bound against a few long updates; their files say so


@pytest.mark.parametrize("name", spec.names("rule"))
def test_every_cell_of_the_table(name: str) -> None:
    for kind in KINDS:
        cell = try_kind(name, kind)
        unclaimed = "claim" in kind and not counts_claims(name)
        if kind == "zero claims" and not unclaimed:
            assert cell.outcome == "skipped"
        elif kind in USED or unclaimed:
            assert cell.outcome == "used", f"{kind}: {cell}"
        else:
            assert cell.outcome == "dropped", f"{kind}: {cell} {cell.reason}"
            assert cell.reason
        if cell.moved is not None and not (kind == "100x boost" and name in UNBOUNDED):
            f = len(HOSTILE)
            assert cell.moved <= 2 * (NUM_CLIENTS - f) / (NUM_CLIENTS - 2 * f), f"{rule_text(name)}, {kind}: {cell}"
