"""What the machine allows: reading the stack once, and its Gram matrix by the fastest library routines."""

from collections.abc import Callable
from typing import Any

import torch
from scipy.linalg import get_blas_funcs

from benchmarks.rule_peers import Call, Case

ROWS = ("read", "sgemm", "ssyrk")


def prepare(row: str, case: Case) -> Call | str:
    """Return the call of a limit; none of them centres the updates or adds up in float64."""
    updates = case.updates
    columns = updates.numpy().T  # in Fortran's order: no copy
    ssyrk: Any = get_blas_funcs("syrk", [columns])
    work: dict[str, Callable[[], object]] = {
        "read": lambda: torch.sum(updates),
        "sgemm": lambda: updates @ updates.t(),
        "ssyrk": lambda: ssyrk(1.0, columns, trans=1),
    }

    def run(_: None) -> None:
        work[row]()

    return Call(run, lambda: None)
