"""The line between a measured process and the one that measures it: a round's end is reported, then it waits."""

import json
import socket
import time


class Gate:
    """The measured process's end of the line."""

    def __init__(self, descriptor: int) -> None:
        self._line = socket.socket(fileno=descriptor).makefile("rw")

    def end_round(self, number: int, **parts: float) -> None:
        """Report that a round ended, with the seconds of its parts where known, and wait for the word to go on."""
        self._line.write(json.dumps({"round": number, "ended": time.monotonic(), "parts": parts}) + "\n")
        self._line.flush()
        if not self._line.readline():
            raise ConnectionError("the process that measures is gone")
