"""Making files of certificates: with progress, stopped and taken up again without losing or changing anything.

Votes are counted first, their state kept beside the file (`.NAME.votes`), and the file is written whole at the end.
Bounds on inputs are appended point by point as they are found.
"""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from certify.files import recipes
from certify.files.header import Header
from certify.files.lines import Appender, CertificateFile, existing, read, write
from certify.files.recipes import InterruptedWork
from certify.files.settings import ZonotopeSettings
from certify.files.subject import Subject
from certify.smoothing.votes import Votes
from tasks.errors import CertificationError, RecordError

OnProgress = Callable[[int, int], None]
ShouldStop = Callable[[], bool]
_SAVE_SECONDS = 10.0
_AT_ONCE = 16  # points between two writes


def make_file(
    header: Header, subject: Subject, out: Path, *, force: bool = False, device: str | None = None,
    on_progress: OnProgress | None = None, should_stop: ShouldStop | None = None,
) -> CertificateFile:  # fmt: skip
    """Make the certificates of `header` and return the finished file.

    What `out` has of the same work is kept; a file of other work is refused unless `force`. `InterruptedWork` where
    `should_stop` turned true: the same call goes on from there.
    """
    make = _zonotopes if isinstance(header.settings, ZonotopeSettings) else _votes
    make(header, subject, Path(out), force, device, on_progress, should_stop)
    return read(out)


def _votes(
    header: Header, subject: Subject, out: Path, force: bool, device: str | None,
    on_progress: OnProgress | None, should_stop: ShouldStop | None,
) -> None:  # fmt: skip
    earlier = None if force else existing(out, header)
    if earlier is not None and not earlier.missing:
        return
    settings = recipes.vote_settings(header)
    drawn = None
    state = out.with_name(f".{out.name}.votes")
    if settings.way == "sampled":
        out.parent.mkdir(parents=True, exist_ok=True)
        keep = _Keep(state, on_progress)
        start = _saved(state, header)
        try:
            drawn = recipes.draw(
                settings, subject, start=start, device=device, on_progress=keep, should_stop=should_stop
            )
        except InterruptedWork as stopped:
            if stopped.votes is not None:
                stopped.votes.save(state)
            raise
    found = recipes.evidence(header, subject, drawn)
    write(out, header, recipes.from_evidence(header, found, drawn))
    state.unlink(missing_ok=True)


class _Keep:
    """Tells progress and keeps the state of the votes from time to time."""

    def __init__(self, state: Path, on_progress: OnProgress | None) -> None:
        self.state, self.on_progress, self.saved_at = state, on_progress, time.monotonic()

    def __call__(self, votes: Votes) -> None:
        if self.on_progress is not None:
            self.on_progress(votes.num_draws, votes.plan.num_draws)
        if time.monotonic() - self.saved_at >= _SAVE_SECONDS and not votes.complete:
            votes.save(self.state)
            self.saved_at = time.monotonic()


def _saved(state: Path, header: Header) -> Votes | None:
    """Return the kept state if it is of this work; another one is of no use any more."""
    if not state.exists():
        return None
    with contextlib.suppress(RecordError):  # a damaged state: the draws are made again
        votes, wanted = Votes.load(state), recipes.plan(header)
        points = (header.num_points, votes.counts.shape[1])
        if replace(votes.plan, num_draws=wanted.num_draws) == wanted and votes.counts.shape == points:
            return votes if votes.num_draws <= wanted.num_draws else None
    return None


def _zonotopes(
    header: Header, subject: Subject, out: Path, force: bool, device: str | None,
    on_progress: OnProgress | None, should_stop: ShouldStop | None,
) -> None:  # fmt: skip
    settings = header.settings
    assert isinstance(settings, ZonotopeSettings)
    tiles = [range(i, min(i + _AT_ONCE, header.num_points)) for i in range(0, header.num_points, _AT_ONCE)]
    with Appender(out, header, force=force) as file:
        for eps, tile in itertools.product(settings.eps, tiles):
            if all((row, eps) in file.done for row in tile):
                continue
            # the whole tile again where half of it is there: what points share a batch shows in the last bits
            result = _bounds(header, settings, subject, list(tile), eps, device, should_stop, len(file.done))
            found = recipes.from_zonotope(header, [header.points.labels[row] for row in tile], result, tile)
            file.add([certificate for certificate in found if (certificate.sample, eps) not in file.done])
            if on_progress is not None:
                on_progress(len(file.done), header.num_certificates)


def _bounds(
    header: Header, settings: ZonotopeSettings, subject: Subject, rows: list[int], eps: float, device: str | None,
    should_stop: ShouldStop | None, done: int,
) -> recipes.ZonotopeResult:  # fmt: skip
    """Return the bounds of a few points; tells work that was stopped from work that failed."""
    try:
        return recipes.zonotope(settings, subject, rows, eps, device=device, should_stop=should_stop)
    except CertificationError:
        if should_stop is not None and should_stop():
            raise InterruptedWork(f"stopped after {done} of {header.num_certificates} certificates") from None
        raise
