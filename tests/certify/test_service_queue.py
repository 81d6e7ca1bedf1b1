"""The queue: one piece of work per question, an end for what nobody waits for, and nothing left behind."""

import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from certify.service.queue import ClosedError, Control, QueueFullError, StoppedError, Tick, Work, WorkQueue


@pytest.fixture
def queue() -> Iterator[WorkQueue]:
    made = WorkQueue(size=2, workers=1)
    yield made
    made.close(0.0)


class Held:
    """Work that runs until it is released or stopped."""

    def __init__(self, result: bytes = b"held") -> None:
        self.started, self.released, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.result = result

    def __call__(self, control: Control) -> bytes:
        self.started.set()
        while not self.released.wait(0.001):
            if control.should_stop():
                self.ended.set()
                raise StoppedError("stopped")
        return self.result


def quick(result: bytes) -> Work:
    return lambda control: result


def finished(queue: WorkQueue, key: str, work: Work) -> bytes:
    ticket = queue.submit(key, work)
    for _ in ticket.follow():
        pass
    return ticket.result()


def test_work_is_done_in_order_and_its_result_given(queue: WorkQueue) -> None:
    assert finished(queue, "a", quick(b"1")) == b"1"
    assert finished(queue, "a", quick(b"2")) == b"2"  # the first is over: asked again is worked out again


def test_who_asks_the_same_at_a_time_shares_one_piece_of_work(queue: WorkQueue) -> None:
    held = Held()
    tickets = [queue.submit("a", held), queue.submit("a", quick(b"other"))]
    assert held.started.wait(60)
    tickets[0].leave()
    assert not held.ended.is_set()  # one still waits
    held.released.set()
    list(tickets[1].follow())
    assert tickets[1].result() == b"held"


def test_work_stops_when_the_last_is_gone_and_can_be_asked_for_again(queue: WorkQueue) -> None:
    held = Held()
    ticket = queue.submit("a", held)
    assert held.started.wait(60)
    ticket.leave()
    ticket.leave()  # as often as one likes
    assert finished(queue, "a", quick(b"again")) == b"again"
    assert held.ended.is_set()
    with pytest.raises(StoppedError):
        list(ticket.follow())
    with pytest.raises(StoppedError):
        ticket.result()


def test_the_same_question_never_runs_twice_at_a_time() -> None:
    queue, slow, entered = WorkQueue(size=4, workers=2), threading.Event(), threading.Event()

    def stubborn(control: Control) -> bytes:
        entered.set()
        slow.wait(60)  # does not look whether it should stop
        return b"first"

    ticket = queue.submit("a", stubborn)
    assert entered.wait(60)
    ticket.leave()
    second = Held()
    queue.submit("a", second)
    assert finished(queue, "b", quick(b"b")) == b"b"  # the other worker is not held up
    assert not second.started.wait(0.05)
    slow.set()
    assert second.started.wait(60)
    queue.close(0.0)


def test_a_place_that_is_left_is_free_at_once(queue: WorkQueue) -> None:
    held = Held()
    queue.submit("a", held)
    assert held.started.wait(60)
    waiting = [queue.submit(key, quick(b"x")) for key in "bc"]
    assert [ticket.ahead for ticket in waiting] == [0, 1]
    with pytest.raises(QueueFullError, match="2 requests wait already"):
        queue.submit("d", quick(b"x"))
    waiting[0].leave()
    last = queue.submit("d", quick(b"d"))
    held.released.set()
    list(last.follow())
    assert last.result() == b"d"


def test_a_burst_is_not_refused_while_a_worker_is_idle() -> None:
    for _ in range(50):
        queue = WorkQueue(size=2, workers=1)
        held = [Held() for _ in range(4)]
        for key, work in zip("abc", held, strict=False):  # faster than the worker takes the first
            queue.submit(key, work)
        with pytest.raises(QueueFullError):
            queue.submit("d", held[3])
        queue.close(0.0)


def test_an_idle_worker_that_can_take_a_question_is_room_for_it() -> None:
    queue, slow = WorkQueue(size=1, workers=3), threading.Event()
    entered = [threading.Event() for _ in range(2)]

    def stubborn(control: Control, event: threading.Event) -> bytes:
        event.set()
        slow.wait(60)  # does not look whether it should stop
        return b""

    for key, event in zip("ab", entered, strict=True):
        ticket = queue.submit(key, lambda control, event=event: stubborn(control, event))
        assert event.wait(60)
        ticket.leave()
    queue.submit("a", quick(b"a"))  # waits until the first of its key is over, whoever is idle
    with pytest.raises(QueueFullError):
        queue.submit("b", quick(b"b"))
    assert finished(queue, "c", quick(b"c")) == b"c"  # the third worker takes it
    slow.set()
    queue.close(60.0)


def test_errors_belong_to_those_who_wait_and_the_worker_lives_on(queue: WorkQueue) -> None:
    def broken(_: Control) -> bytes:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finished(queue, "a", broken)
    assert finished(queue, "a", quick(b"fine")) == b"fine"


def test_only_the_newest_progress_is_told(queue: WorkQueue) -> None:
    go = threading.Event()

    def work(control: Control) -> bytes:
        for done in range(1000):
            control.report(done, 1000)
        control.report(1000, 1000, "done")
        go.wait(60)
        return b""

    ticket = queue.submit("a", work)
    seen = []
    for tick in ticket.follow():
        seen.append(tick)
        if tick.done == 1000:
            go.set()
    assert seen[-1] == Tick(1000, 1000, "done")
    assert len(seen) < 100


def test_closing_gives_up_what_waits_and_lets_finish_what_runs(queue: WorkQueue) -> None:
    held = Held()
    running = queue.submit("a", held)
    assert held.started.wait(60)
    waiting = queue.submit("b", quick(b"x"))
    with ThreadPoolExecutor(1) as pool:
        closing = pool.submit(queue.close, 10.0)
        with pytest.raises(ClosedError):
            list(waiting.follow())
        with pytest.raises(ClosedError):
            queue.submit("c", quick(b"x"))
        held.released.set()
        assert closing.result(60) is True
    list(running.follow())
    assert running.result() == b"held"


def test_nothing_is_left_behind_by_many_who_come_and_go() -> None:
    queue = WorkQueue(size=8, workers=2)
    stopped, running, most = [0], [0], [0]
    lock = threading.Lock()

    def work_of(key: str) -> Work:
        def work(control: Control) -> bytes:
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            try:
                for step in range(5):
                    if control.should_stop():
                        stopped[0] += 1
                        raise StoppedError("stopped")
                    control.report(step, 5)
                    time.sleep(0.0005)
                return key.encode()
            finally:
                with lock:
                    running[0] -= 1

        return work

    def come_and_go(number: int) -> int:
        random_, right = random.Random(number), 0
        for _ in range(60):
            key = str(random_.randrange(6))
            try:
                ticket = queue.submit(key, work_of(key))
            except QueueFullError:
                continue
            if random_.random() < 0.5:
                threading.Timer(random_.random() * 0.004, ticket.leave).start()
            try:
                list(ticket.follow())
                assert ticket.result() == key.encode()
                right += 1
            except StoppedError:
                pass
            ticket.leave()
        return right

    with ThreadPoolExecutor(12) as pool:
        right = sum(pool.map(come_and_go, range(12)))
    end: Any = time.monotonic() + 60
    while queue.num_running and time.monotonic() < end:
        time.sleep(0.01)
    assert right > 100
    assert stopped[0] > 0
    assert most[0] <= 2
    assert queue.num_running == queue.num_waiting == 0
    assert not queue._jobs
    assert queue.close(1.0)
