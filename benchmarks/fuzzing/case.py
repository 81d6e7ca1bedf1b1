"""What the kinds share: what a case comes to, what breaks a promise, odd numbers and texts, a folder for files."""

import math
import tempfile
from pathlib import Path

from tasks.errors import HawthornError

Outcome = str  # what became of a case, for the count
NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 5e-324, 1e-45, 1e-30, 3.4e38, -3.4e38, 1e300, 1e30, -1.0, 1.0)
TEXTS = ("", "a", "conv.weight", "fc.weight", "x" * 300, "\x00", "\x1b[31m", "../../etc/passwd", "‮", "e" * 9, "True")


class Broken(Exception):
    """A case that broke its promise."""


class Place:
    """The folder that cases write files to; the caller names one of its own."""

    folder = Path(tempfile.gettempdir())


def refused(error: HawthornError) -> Outcome:
    """Return the outcome of a refusal; one without a word breaks the promise."""
    if not str(error).strip():
        raise Broken("refused without a word") from error
    return "refused"
