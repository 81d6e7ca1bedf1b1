"""Stand-in for a Flower program that hands its task to a warm fork server (see `_warm.py`).

Runs as ``python -IS _launcher.py PROGRAM REAL [ARGUMENT...]`` in some 20 ms: it imports little, never torch or flwr.
It sends its arguments, environment, working folder and standard streams to the server named by
``HAWTHORN_WARM_SOCKET``, stays alive as long as the forked process, passes signals on to it, and ends as it
ended. Without a server it becomes the real program, so nothing depends on the server being there.
"""

import contextlib
import os
import signal
import socket
import sys

SOCKET_VARIABLE = "HAWTHORN_WARM_SOCKET"
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def encode(program: str, arguments: list[str], environment: dict[str, str], folder: str) -> bytes:
    """Return a request: four bytes of length, then the NUL-separated fields (NUL can be in none of them)."""
    fields = [program, folder, str(len(arguments)), *arguments, *(f"{k}={v}" for k, v in environment.items())]
    payload = "\0".join(fields).encode(errors="surrogateescape")
    return len(payload).to_bytes(4, "big") + payload


def connect(address: str) -> socket.socket | None:
    """Return a connection to the fork server, or None if nobody listens there."""
    connection = socket.socket(socket.AF_UNIX)
    try:
        connection.connect(address)
    except OSError:
        connection.close()
        return None
    return connection


class Forwarder:
    """Passes signals on to the forked process; those that come before its id is known wait."""

    def __init__(self) -> None:
        self.pid = 0
        self.waiting: list[int] = []
        for number in FORWARDED:
            signal.signal(number, self.receive)

    def receive(self, number: int, _frame: object) -> None:
        """Handle a signal of this process."""
        if not self.pid:
            self.waiting.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def aim(self, pid: int) -> None:
        """Set the target and send it what waited."""
        self.pid = pid
        for number in self.waiting:
            self.receive(number, None)


def hand_over(connection: socket.socket, request: bytes) -> int | None:
    """Run the task in the server; return its exit code (minus the signal's number), None if it never started."""
    forwarder = Forwarder()
    try:
        sent = socket.send_fds(connection, [request], [0, 1, 2])
        if sent < len(request):  # sending nothing fails when the task has ended by now, and it would run twice
            connection.sendall(request[sent:])
    except OSError:
        return None
    for line in connection.makefile("r"):
        word, number = line.split()
        if word == "exit":
            return int(number)
        forwarder.aim(int(number))
    return -signal.SIGKILL if forwarder.pid else None  # the server died, and its children with it


def end_as(code: int) -> None:
    """End this process as the task ended: with its exit code, or by the same signal."""
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def main() -> None:
    """Hand the task over, or become the real program."""
    program, real, *arguments = sys.argv[1:]
    connection = connect(os.environ.get(SOCKET_VARIABLE, ""))
    if connection is not None:
        code = hand_over(connection, encode(program, arguments, dict(os.environ), os.getcwd()))
        if code is not None:
            end_as(code)
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
    os.execv(real, [real, *arguments])


if __name__ == "__main__":
    main()
