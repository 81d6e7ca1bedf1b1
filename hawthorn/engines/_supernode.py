"""One SuperNode by itself: what `hawthorn client` runs, by hand or in a container, against a federation elsewhere.

Its ClientApps are forks of a process that has imported torch and flwr (see `_warm.py`). The identity it shows is a key;
which client it is, it says itself, so that several containers of one kind can share a range of ids: each takes the
lowest one that no other holds, by a lock that ends with the process.
"""

import fcntl
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hawthorn.engines import _waits
from hawthorn.engines._processes import Workplace, free_ports
from hawthorn.engines._superlink import key_values
from hawthorn.engines.cluster import WARM_MODULES
from tasks.errors import ConfigError, EngineError

POLL = 0.25  # seconds between looks for work
WARM = (*(module for module in WARM_MODULES if module != "hawthorn.engines._preload"), "client.app")
START_SECONDS = 180.0


@dataclass(frozen=True)
class Node:
    """A SuperNode to start: where the federation is, which client this is, and what it shows and trusts."""

    superlink: str  # HOST:PORT of the fleet API
    client: int
    num_clients: int = 0  # 0: not told
    attack: str = ""
    ca: Path | None = None  # None: no TLS
    key: Path | None = None
    health: str = ""  # HOST:PORT of a gRPC health service

    def command(self, port: int) -> list[str]:
        """Return the command of the SuperNode; `port` is for its own ClientApps, on loopback."""
        security = ["--insecure"] if self.ca is None else ["--root-certificates", str(self.ca)]
        if self.key is not None:
            security += ["--auth-supernode-private-key", str(self.key)]
        command = ["flower-supernode", *security, "--superlink", self.superlink]
        command += ["--host", "127.0.0.1", "--port", str(port), "--node-config", key_values(self.config())]
        return [*command, "--health-server-address", self.health] if self.health else command

    def config(self) -> dict[str, int | str]:
        """Return what the SuperNode knows of itself."""
        result: dict[str, int | str] = {"partition-id": self.client}
        if self.num_clients:
            result["num-partitions"] = self.num_clients
        if self.attack:
            result |= {"role": "malicious", "attack": self.attack}
        return result


def run_node(node: Node, logs: Path, on_message: Callable[[str], None]) -> int:
    """Run a SuperNode until it ends or this process is told to; return its exit code."""
    for path in (node.ca, node.key):
        if path is not None and not os.access(path, os.R_OK):
            raise ConfigError(f"cannot read {path}; hawthorn keys makes authorities and keys")
    variables = {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(POLL), _waits.POLL_VARIABLE: str(POLL)}
    with Workplace(logs) as workplace:
        on_message(f"client {node.client}: importing torch, flwr and the client once")
        workplace.start_warm(WARM, {}, START_SECONDS)
        variables["FLWR_HOME"] = str(workplace.folder / "home")
        workplace.start("supernode", node.command(free_ports(1)[0]), variables, shown=True)
        on_message(f"client {node.client}: connecting to {node.superlink}")
        while (code := workplace.exit_code("supernode")) is None:
            if "warm" in workplace.processes and workplace.exit_code("warm") is not None:
                raise EngineError(f"the warm fork server ended\n{workplace.log_tail('warm')}")
            time.sleep(0.2)
    return code


def parse_partitions(text: str) -> list[int]:
    """Read a client id, or a range of them as 0-5."""
    if not (match := re.fullmatch(r"\s*(\d{1,7})(?:\s*-\s*(\d{1,7}))?\s*", text)):
        raise ConfigError(f"cannot read the partition {text!r}: write a client id as 7, or a range as 0-5")
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ConfigError(f"the partitions {text.strip()} go backwards; write the smaller id first")
    return list(range(first, last + 1))


def claim(ids: list[int], folder: Path) -> tuple[int, TextIO]:
    """Take the lowest id that no other process holds; it is held until the returned file is closed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for client in ids:
            file = os.fdopen(os.open(folder / f"client-{client}.lock", os.O_RDWR | os.O_CREAT, 0o666), "w")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            return client, file
    except OSError as error:
        raise ConfigError(f"cannot lock client ids in {folder}: {error.strerror}") from None
    raise ConfigError(f"the partitions {ids[0]}-{ids[-1]} are all taken: start fewer clients or name more partitions")


def print_line(text: str) -> None:
    """Print a line at once: logs of containers are read while they grow."""
    print(text, file=sys.stderr, flush=True)
