"""The work of the service: a bounded queue in front of a few workers, one piece of work per distinct question.

Clients that ask the same question share one piece of work. It ends early when the last of them is gone (cancelled,
past its deadline, killed), and gives its place in the queue or its worker free at once.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tasks.errors import HawthornError

_REPORT_SECONDS = 0.05
CLOSED = "the service is shutting down; ask again once it is back, or another one"


@dataclass(frozen=True)
class Tick:
    """How far a piece of work is."""

    done: int
    total: int
    phase: str = ""


class QueueFullError(HawthornError):
    """As many requests wait as may wait."""


class ClosedError(HawthornError):
    """The service is shutting down."""


class StoppedError(HawthornError):
    """The work was given up before it was done."""


class Control:
    """What a piece of work sees of the service: whether to go on, and where to report."""

    def __init__(self, job: "Job") -> None:
        self._job, self._reported = job, -math.inf

    def should_stop(self) -> bool:
        """True once nobody waits for the result any more; the work then raises `StoppedError`."""
        return self._job.stopping

    def report(self, done: int, total: int, phase: str = "") -> None:
        """Tell those who wait how far the work is; not more often than they care to know."""
        if done >= total or time.monotonic() - self._reported >= _REPORT_SECONDS:
            self._reported = time.monotonic()
            self._job.tick(Tick(done, total, phase))


Work = Callable[[Control], bytes]


class Job:
    """One piece of work and those who wait for it."""

    def __init__(self, key: str, work: Work) -> None:
        self.key, self.work = key, work
        self.changed = threading.Condition()
        self.progress: Tick | None = None
        self.version = 0
        self.num_waiting = 0
        self.stopping = self.done = False
        self.result: bytes | None = None
        self.error: BaseException | None = None

    def tick(self, progress: Tick) -> None:
        with self.changed:
            self.progress = progress
            self.version += 1
            self.changed.notify_all()

    def finish(self, result: bytes | None, error: BaseException | None) -> None:
        with self.changed:
            if not self.done:
                self.result, self.error, self.done = result, error, True
            self.changed.notify_all()


class Ticket:
    """A place among those who wait for a job; `leave` may be called from any thread and any number of times."""

    def __init__(self, queue: "WorkQueue", job: Job, ahead: int) -> None:
        self._queue, self._job, self.ahead = queue, job, ahead
        self._left = False

    def follow(self) -> Iterator[Tick]:
        """Yield progress, the newest only, until the work is done; raises what the work raised."""
        seen = 0
        while True:
            with self._job.changed:
                self._job.changed.wait_for(lambda seen=seen: self._job.done or self._left or self._job.version > seen)
                if self._left:
                    raise StoppedError("nobody waits for this result any more")
                if self._job.done:
                    break
                seen, progress = self._job.version, self._job.progress
            if progress is not None:
                yield progress
        if self._job.error is not None:
            raise self._job.error

    def result(self) -> bytes:
        """Return the finished result."""
        if self._job.result is None:
            raise StoppedError("the work was not finished")
        return self._job.result

    def leave(self) -> None:
        """Wait no longer; work that nobody waits for stops."""
        self._queue.leave(self)

    def _depart(self) -> bool:
        """Count this ticket out; True for the first call."""
        with self._job.changed:
            first, self._left = not self._left, True
            if first:
                self._job.num_waiting -= 1
                if not self._job.num_waiting and not self._job.done:
                    self._job.stopping = True
            self._job.changed.notify_all()
        return first


class WorkQueue:
    """Workers, and a queue of `size` jobs in front of them."""

    def __init__(self, *, size: int, workers: int) -> None:
        self.size = size
        self._jobs: dict[str, Job] = {}  # the newest job of every question that is waiting or running
        self._waiting: deque[Job] = deque()
        self._running: set[str] = set()
        self._lock = threading.Condition()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._serve, name=f"certify-worker-{index}", daemon=True)
            for index in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def closed(self) -> bool:
        """True once no new work is taken."""
        return self._closed

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def submit(self, key: str, work: Work) -> Ticket:
        """Queue `work` or join the same work under way; raises `QueueFullError` or `ClosedError`."""
        with self._lock:
            if self._closed:
                raise ClosedError(CLOSED)
            job = self._jobs.get(key)
            if job is not None:
                with job.changed:
                    if not job.stopping and not job.done:
                        job.num_waiting += 1
                        ahead = self._waiting.index(job) if job in self._waiting else 0
                        return Ticket(self, job, ahead)
            job = Job(key, work)
            job.num_waiting = 1
            free = [waiting for waiting in (*self._waiting, job) if waiting.key not in self._running]
            taken = min(len(free), len(self._threads) - len(self._running))  # by idle workers, in a moment
            if len(self._waiting) + 1 - taken > self.size:
                raise QueueFullError(f"{self.size} requests wait already, as many as may; try again later")
            self._jobs[key] = job
            self._waiting.append(job)
            self._lock.notify()
            return Ticket(self, job, len(self._waiting) - 1)

    def leave(self, ticket: Ticket) -> None:
        """Count a ticket out; a job in the queue that nobody waits for gives its place free."""
        with self._lock:
            job = ticket._job
            if ticket._depart() and job.stopping and job in self._waiting:
                self._waiting.remove(job)
                self._forget(job)
                job.finish(None, StoppedError("nobody waits for this result any more"))

    def close(self, grace: float) -> bool:
        """Refuse new work, give up what waits, let what runs finish for `grace` seconds, then stop it.

        Returns True where all running work was finished.
        """
        with self._lock:
            self._closed = True
            for job in self._waiting:
                job.finish(None, ClosedError(CLOSED))
                self._forget(job)
            self._waiting.clear()
            self._lock.notify_all()
            finished = self._lock.wait_for(lambda: not self._running, grace)
            for key in self._running:
                if (job := self._jobs.get(key)) is not None:
                    job.stopping = True
        for thread in self._threads:
            thread.join(5.0)
        return finished

    def _forget(self, job: Job) -> None:
        if self._jobs.get(job.key) is job:
            del self._jobs[job.key]

    def _next(self) -> Job | None:
        """Return the next job whose question no other worker is still giving up; None where the queue closed."""
        with self._lock:
            while True:
                for job in self._waiting:
                    if job.key not in self._running:
                        self._waiting.remove(job)
                        self._running.add(job.key)
                        return job
                if self._closed:
                    return None
                self._lock.wait()

    def _serve(self) -> None:
        while (job := self._next()) is not None:
            result: bytes | None = None
            error: BaseException | None = None
            try:
                result = job.work(Control(job))
            except BaseException as raised:  # whatever the work raises belongs to those who wait, not to the worker
                error = raised
            with self._lock:
                if isinstance(error, StoppedError) and self._closed:
                    error = ClosedError(CLOSED)
                self._running.discard(job.key)
                self._forget(job)
                self._lock.notify_all()
            job.finish(result, error)
