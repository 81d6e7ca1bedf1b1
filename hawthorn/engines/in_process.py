"""The in-process engine: a Flower Grid that calls the ClientApp directly, on a pool of forked workers.

No Ray, no network, no process start per message: each worker is forked once, after the data set is loaded, and shares
its pages. A round's content is sent to each worker once; each client's message is a few numbers. With one worker
nothing is forked and breakpoints work. The result does not depend on the number of workers: every client's work is a
function of the message and of generators derived from the seed.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any, cast

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.app.metadata import Metadata
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from client.app import app as client_app
from client.app import workspace
from client.state import read_state, write_state
from hawthorn.engines._client_states import ClientStates
from server.federation import OnRound, run_federation
from tasks.config import RunConfig
from tasks.task import load

IN_FLIGHT = 2  # messages a worker has at once, so that it never waits for the next one
SMALL = 16384  # bytes that a pipe takes whether or not the other side reads
CLIENT_EXCEPTION, CLIENT_CRASHED = 2, 8  # Flower's error codes for what a strategy sees


def run(config: RunConfig, on_round: OnRound | None = None, on_message: Callable[[str], None] | None = None) -> None:
    """Run a federation in this process and its forked workers."""
    sizes = [len(share) for share in load(config).partition]
    with InProcessGrid(client_app, config, cost=sizes, kept=ClientStates(config.run_folder / "clients")) as grid:
        run_federation(config, grid, on_round)


@dataclass
class Worker:
    """A forked process, its pipe, and the messages it was given, the one it works on first."""

    process: ForkProcess
    pipe: Connection
    given: deque[Message] = field(default_factory=deque)
    holds: int | None = None  # id of the content it got last in this round


class InProcessGrid(Grid):
    """Runs the messages of `send_and_receive` on clients 0 to num_clients - 1, which are nodes 1 to num_clients."""

    def __init__(
        self, app: ClientApp, config: RunConfig, cost: list[int] | None = None, kept: ClientStates | None = None
    ) -> None:
        self.app, self.config, self.kept = app, config, kept
        self.restored = kept is None  # whether the states of an interrupted run were looked for
        self.changed: set[int] = set()  # nodes whose state is newer than what is on disk
        self.cost = cost or [1] * config.num_clients
        self.states: dict[int, bytes] = {}  # node -> its pickled context state, when not empty
        self.inline: dict[int, Context] = {}
        self.num_workers = config.workers or os.cpu_count() or 1
        self.pool: list[Worker] = []
        self.replies: dict[str, Message] = {}  # to pushed messages, not pulled yet
        self._run = Run.create_empty(1)
        self._next_id = 0

    def __enter__(self) -> "InProcessGrid":
        if self.num_workers > 1:
            workspace(self.config)  # loaded before the fork, so that the workers share its pages
            for _ in range(self.num_workers):
                self.pool.append(self._fork())
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.pool:
            self._end(worker)
        self.pool = []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Run every message, the costliest clients first; replies that miss the timeout are absent.

        What clients keep is on disk before the replies are returned, so before the round's checkpoint.
        """
        queue = [self._stamp(message) for message in messages]
        number = _round(queue)
        self._restore(number)
        if not self.pool:
            replies = [self._reply_inline(message) for message in queue]
        else:
            queue.sort(key=lambda m: self.cost[m.metadata.dst_node_id - 1])
            replies = self._run_pool(queue, None if timeout is None else time.monotonic() + timeout)
        self._keep(number)
        return replies

    def _restore(self, number: int | None) -> None:
        """Before the first round: give the clients of an interrupted run their states back."""
        if self.restored or number is None or self.kept is None:
            return
        self.restored = True
        for client, state in self.kept.load(number).items():
            context = _context(client + 1, self.config)
            write_state(context.state, state)
            if self.pool:
                self.states[client + 1] = pickle.dumps(context.state, protocol=5)
            else:
                self.inline[client + 1] = context

    def _keep(self, number: int | None) -> None:
        """After a round: write the states that changed in it."""
        if self.kept is None or number is None:
            return
        states = {}
        for node in sorted(self.changed):
            record = pickle.loads(self.states[node]) if self.pool else self.inline[node].state  # noqa: S301 - our workers'
            states[node - 1] = read_state(record)
        self.kept.store(number, states)
        self.changed.clear()

    def _run_pool(self, queue: list[Message], deadline: float | None) -> list[Message]:
        packed: dict[int, bytes] = {}
        replies: list[Message] = []
        for worker in self.pool:
            worker.holds = None
        for worker in self.pool * IN_FLIGHT:
            self._give(worker, queue, packed)
        while busy := {w.pipe: w for w in self.pool if w.given}:
            ready = wait(list(busy), None if deadline is None else max(0.0, deadline - time.monotonic()))
            if not ready:
                for worker in busy.values():
                    self._replace(worker)
                break
            for pipe in ready:
                worker = busy[cast(Connection, pipe)]
                replies.append(self._take(worker, queue))
                while self._give(worker, queue, packed):
                    pass
        return replies

    def _give(self, worker: Worker, queue: list[Message], packed: dict[int, bytes]) -> bool:
        """Send a worker the next message; False if there is none, or it must not be sent while the worker is busy.

        A busy worker is sent only what the pipe's buffer takes: with both sides writing, nobody would read.
        """
        if not queue or len(worker.given) >= IN_FLIGHT:
            return False
        key, meta = id(queue[-1].content), queue[-1].metadata
        if key not in packed:
            packed[key] = pickle.dumps(queue[-1].content, protocol=5)
        content, state = None if key == worker.holds else packed[key], self.states.get(meta.dst_node_id)
        if worker.given and len(content or b"") + len(state or b"") > SMALL:
            return False
        worker.given.append(queue.pop())
        worker.holds = key
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # a dead worker shows when its reply is read
            worker.pipe.send((content, _fields(meta), state))
        return True

    def _take(self, worker: Worker, queue: list[Message]) -> Message:
        """Return a worker's next reply; if it died, its first message failed and the others go back to the queue."""
        message = worker.given.popleft()
        try:
            content, error, state = worker.pipe.recv()
        except (EOFError, OSError):  # OSError: it died in the middle of a reply
            queue.extend(reversed(worker.given))
            code = self._replace(worker)
            return Message(Error(CLIENT_CRASHED, f"the client's process ended with exit code {code}"), reply_to=message)
        if state is not None:
            self.states[message.metadata.dst_node_id] = state
            self.changed.add(message.metadata.dst_node_id)
        return _reply(content, error, message)

    def _reply_inline(self, message: Message) -> Message:
        node = message.metadata.dst_node_id
        context = self.inline.setdefault(node, _context(node, self.config))
        content, error = _call(self.app, message, context)
        if len(context.state):
            self.changed.add(node)
        return _reply(content, error, message)

    def _fork(self) -> Worker:
        here, there = multiprocessing.Pipe()
        others = [here, *(w.pipe for w in self.pool)]
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(there, others, self.app, self.config), daemon=True
        )
        process.start()
        there.close()
        return Worker(process, here)

    def _replace(self, worker: Worker) -> int | None:
        code = self._end(worker)
        fresh = self._fork()
        worker.process, worker.pipe, worker.given, worker.holds = fresh.process, fresh.pipe, deque(), None
        return code

    def _end(self, worker: Worker) -> int | None:
        worker.pipe.close()
        if worker.given:
            worker.process.kill()
        worker.process.join(5)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
        return worker.process.exitcode

    def _stamp(self, message: Message) -> Message:
        self._next_id += 1
        message.metadata.__dict__["_message_id"] = str(self._next_id)
        message.metadata.__dict__["_run_id"] = self._run.run_id
        return message

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return range(1, self.config.num_clients + 1)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Run the messages now and keep the replies for `pull_messages`; return the messages' ids."""
        sent = list(messages)
        replies = self.send_and_receive(sent, timeout=self.config.round_timeout)
        self.replies.update({reply.metadata.reply_to_message_id: reply for reply in replies})
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return kept replies; a client that missed a deadline was ended, which frees it, as the error reply says."""
        return [self.replies.pop(i, None) or _ended_reply(i) for i in message_ids]


def _ended_reply(message_id: str) -> Message:
    """An error that says a client was ended at its deadline, and so is free for the next message."""
    message = Message(RecordDict(), 0, "train")
    message.metadata.__dict__["_message_id"] = message_id
    return Message(Error(CLIENT_CRASHED, "the client was ended at the deadline"), reply_to=message)


def _reply(content: RecordDict | None, error: Error | None, message: Message) -> Message:
    if content is not None:
        return Message(content, reply_to=message)
    return Message(error or Error(CLIENT_EXCEPTION, "no content"), reply_to=message)


def _round(messages: list[Message]) -> int | None:
    """Return the round that messages to train are of; None for other messages."""
    if not messages or messages[0].metadata.message_type != "train" or "config" not in messages[0].content:
        return None
    number = messages[0].content["config"].get("server-round")  # type: ignore[union-attr]
    return number if isinstance(number, int) else None


def _fields(meta: Metadata) -> dict[str, Any]:
    names = (
        "run_id",
        "message_id",
        "src_node_id",
        "dst_node_id",
        "reply_to_message_id",
        "group_id",
        "created_at",
        "ttl",
    )
    return {**{name: getattr(meta, name) for name in names}, "message_type": meta.message_type}


def _context(node: int, config: RunConfig) -> Context:
    node_config = {"partition-id": node - 1, "num-partitions": config.num_clients}
    return Context(1, node, node_config, RecordDict(), dict(config.settings()))  # type: ignore[arg-type]


def _call(app: ClientApp, message: Message, context: Context) -> tuple[RecordDict | None, Error | None]:
    """Call the ClientApp as Flower does: an exception becomes an error reply."""
    try:
        return app(message, context).content, None
    except Exception as error:  # whatever a client does wrong is its reply's business, not the engine's
        return None, Error(CLIENT_EXCEPTION, f"{type(error).__name__}: {error}")


def _work(pipe: Connection, others: list[Connection], app: ClientApp, config: RunConfig) -> None:
    """A worker's life: answer messages until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, whose closed pipe ends this process
    for other in others:
        other.close()
    torch.set_num_threads(1)
    contexts: dict[int, Context] = {}
    content = RecordDict()
    for packed, fields, state in _tasks(pipe):
        if packed is not None:
            content = pickle.loads(packed)  # noqa: S301 - from our own parent process
        message = Message(content, metadata=Metadata(**fields))  # type: ignore[call-overload]
        node = fields["dst_node_id"]
        context = contexts.setdefault(node, _context(node, config))
        if state is not None:
            context.state = pickle.loads(state)  # noqa: S301 - packed by a sibling worker
        answer, error = _call(app, message, context)
        pipe.send((answer, error, pickle.dumps(context.state, protocol=5) if len(context.state) else None))


def _tasks(pipe: Connection) -> Iterator[tuple[bytes | None, dict[str, Any], bytes | None]]:
    while True:
        try:
            yield pipe.recv()
        except (EOFError, ConnectionResetError):
            os._exit(0)
