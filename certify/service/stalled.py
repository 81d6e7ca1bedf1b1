"""Ends streams whose client takes nothing: its thread would wait for ever for room in the transport's window."""

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import grpc


class Stalled:
    """Watches streams; one thread for all of them, from the first one on."""

    def __init__(self, idle_seconds: float) -> None:
        self._idle_seconds = idle_seconds
        self._lock = threading.Lock()
        self._since: dict[int, tuple[float, grpc.ServicerContext]] = {}
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None

    def watched(self, messages: Iterable[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        """Yield `messages`; a client that does not take one within the idle time is cut off (CANCELLED)."""
        for message in messages:
            with self._lock:
                self._since[id(context)] = time.monotonic(), context
                self._start()
            try:
                yield message
            finally:
                with self._lock:
                    self._since.pop(id(context), None)

    def close(self) -> None:
        """End the watching thread."""
        self._wake.set()

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="certify-stalled", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while not self._wake.wait(self._idle_seconds / 4):
            late = time.monotonic() - self._idle_seconds
            with self._lock:
                stalled = [context for since, context in self._since.values() if since < late]
            for context in stalled:
                context.cancel()
