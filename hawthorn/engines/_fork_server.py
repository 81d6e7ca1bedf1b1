"""The fork server itself: takes requests from launchers, forks, and reports how the forks ended.

See `_warm.py` for the purpose. One thread, one loop over the listening socket, the launchers' connections, the lifeline
and a wake-up for ended children; in a forked process `ForkServer.serve` returns the task to run.
"""

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import sys
from dataclasses import dataclass, field

SOCKET_VARIABLE = "HAWTHORN_WARM_SOCKET"
ROOTS = ("flower-superlink", "flower-supernode")
PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


@dataclass
class Request:
    """A task to run: the program with its arguments, environment, folder and three streams."""

    program: str
    folder: str
    arguments: list[str]
    environment: dict[str, str]
    streams: list[int]


@dataclass
class Child:
    """A forked process: where its end is reported, and the pipe whose closing tells a root's server to end."""

    connection: socket.socket
    lifeline: int | None = None


@dataclass
class ForkServer:
    """Listens on `address`; `lifeline` is a descriptor that reads end-of-file when this server must end."""

    address: str
    lifeline: int
    programs: dict[str, str]
    root: int = 0  # id of the root that this server lives for; 0: the common server
    children: dict[int, Child] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.address)
        self.listener.listen(64)
        self.wake, self.woken = socket.socketpair()
        self.wake.setblocking(False)
        self.woken.setblocking(False)
        self.selector = selectors.DefaultSelector()
        signal.set_wakeup_fd(self.woken.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for readable in (self.listener, self.lifeline, self.wake):
            self.selector.register(readable, selectors.EVENT_READ)

    def serve(self) -> Request | None:
        """Serve until the end (None); in a forked process: return the task that it must run."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj is self.listener:
                    if (task := self._accept()) is not None:
                        return task
                elif key.fileobj is self.wake:
                    self._drain_wake()
                elif not isinstance(key.fileobj, socket.socket) or self._hung_up(key.fileobj):
                    return self.end()  # the lifeline or the root's launcher is gone
            if self._reap():
                return self.end()

    def start(self, request: Request, connection: socket.socket) -> Request | None:
        """Fork a task; return the request in the new process, None in this one."""
        roots_server = not self.root and request.program in ROOTS
        reading, writing = os.pipe() if roots_server else (None, None)
        pid = os.fork()
        if pid == 0:
            self.close(keep=connection)
            if reading is None or writing is None:
                connection.close()
                die_with_parent()
                return request
            os.close(writing)
            return serve_root(request, connection, reading, f"{self.address}-{os.getpid()}", self.programs)
        for number in request.streams:
            os.close(number)
        if reading is not None:
            os.close(reading)
        self.children[pid] = Child(connection, writing)
        if roots_server:
            connection.close()  # the root's own server talks to the root's launcher
        else:
            tell(connection, f"pid {pid}")
            self.selector.register(connection, selectors.EVENT_READ)
        return None

    def end(self) -> None:
        """End every child and, in a root's server, everything in its session: launchers, grandchildren, itself."""
        for pid, child in self.children.items():
            if child.lifeline is None:  # roots' servers end by themselves when their lifeline closes
                os.kill(pid, signal.SIGKILL)
        self.close()
        for pid in self.children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
        if self.root:
            os.killpg(0, signal.SIGKILL)

    def close(self, keep: socket.socket | None = None) -> None:
        """Close everything this server holds but `keep`: what a forked process must not inherit."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.selector.close()
        for held in (self.listener, self.wake, self.woken, *(child.connection for child in self.children.values())):
            if held is not keep:
                held.close()
        os.close(self.lifeline)
        for child in self.children.values():
            if child.lifeline is not None:
                os.close(child.lifeline)

    def _accept(self) -> Request | None:
        connection, _ = self.listener.accept()
        connection.settimeout(10.0)
        try:
            request = receive(connection)
        except (OSError, ValueError):
            connection.close()
            return None
        if request.program not in self.programs:
            for number in request.streams:
                os.close(number)
            connection.close()  # the launcher then starts the real program
            return None
        return self.start(request, connection)

    def _drain_wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self.wake.recv(4096):
                pass

    def _hung_up(self, connection: socket.socket) -> bool:
        """A launcher is gone: its process follows. Return whether that was the root."""
        self.selector.unregister(connection)
        for pid, child in self.children.items():
            if child.connection is connection:
                os.kill(pid, signal.SIGKILL)
                return pid == self.root
        return False

    def _reap(self) -> bool:
        """Report children that ended; return whether the root was among them."""
        for pid in list(self.children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if not found:
                continue
            child = self.children.pop(pid)
            if child.lifeline is not None:
                os.close(child.lifeline)
            if pid == self.root:
                self._clear()
            if child.lifeline is None:
                tell(child.connection, f"exit {os.waitstatus_to_exitcode(status)}")
            with contextlib.suppress(KeyError, ValueError):
                self.selector.unregister(child.connection)
            child.connection.close()
            if pid == self.root:
                return True
        return False

    def _clear(self) -> None:
        """End what the root left behind before its end is reported."""
        for pid in self.children:
            os.kill(pid, signal.SIGKILL)
        for pid in self.children:
            os.waitpid(pid, 0)
        for child in self.children.values():
            child.connection.close()
        self.children.clear()


def serve_root(
    request: Request, connection: socket.socket, lifeline: int, address: str, programs: dict[str, str]
) -> Request | None:
    """Become the server of one root: own session, own socket; fork the root first, then serve what it starts."""
    os.setsid()
    die_with_parent()
    server = ForkServer(address, lifeline, programs, root=-1)
    request.environment[SOCKET_VARIABLE] = address
    if (task := server.start(request, connection)) is not None:
        return task
    server.root = next(iter(server.children))
    return server.serve()


def receive(connection: socket.socket) -> Request:
    """Read a request, as `_launcher.encode` wrote it, with its three streams."""
    data, streams, _, _ = socket.recv_fds(connection, 65536, 3)
    while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
        if not (more := connection.recv(65536)):
            raise ValueError("the launcher hung up")
        data += more
    program, folder, count, *rest = data[4:].decode(errors="surrogateescape").split("\0")
    arguments, variables = rest[: int(count)], rest[int(count) :]
    return Request(program, folder, arguments, dict(v.split("=", 1) for v in variables), list(streams))


def tell(connection: socket.socket, line: str) -> None:
    """Send a line to a launcher; one that is gone needs no answer."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{line}\n".encode())


def die_with_parent() -> None:
    """Ask the kernel to end this process with its parent; elsewhere than on Linux the closed sockets do it alone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
