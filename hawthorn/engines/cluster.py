"""Engine ``cluster``: one SuperLink and one SuperNode per client as processes of this machine, over gRPC on loopback.

This is Flower's deployment as it runs on many machines, brought together on one: every client's code runs in
processes of its own, and what the server knows of a client came over a connection. Malicious clients are
malicious by their own node configuration (``role`` and ``attack``). The ids of all processes are in ``cluster.json`` in
the run folder while the run goes on; a SuperNode that is killed is reported and the run goes on without it.

All connections are TLS, and SuperNodes show keys that were registered before they start, as in a deployment on many
machines; authority, certificates and keys live as long as the run. HAWTHORN_TLS=0 leaves that out.
"""

import json
import os
import time
from collections.abc import Callable
from typing import Any

from hawthorn.engines import _waits
from hawthorn.engines._processes import Workplace, free_ports
from hawthorn.engines._superlink import SuperLink, app_pyproject, follow, key_values
from hawthorn.engines._tail import LineTail
from hawthorn.keys import KeyFolder, make_keys
from server.federation import OnRound
from server.record import RoundRecord
from tasks.config import RunConfig
from tasks.errors import EngineError

# What the warm fork server imports: Flower's programs, and the client with the data it needs.
WARM_MODULES = (
    "flwr.superlink.cli",
    "flwr.superlink.main",
    "flwr.supernode.cli",
    "flwr.supernode.main",
    "flwr.supernode.runtime.run_clientapp",
    "flwr.supercore.cli",
    "httpcore",
    "hawthorn.engines._preload",
)


def run(
    config: RunConfig,
    on_round: OnRound | None = None,
    on_message: Callable[[str], None] | None = None,
    make: "type[Cluster] | None" = None,
) -> None:
    """Run a federation in processes; raises `EngineError` with the end of the log that says why it failed.

    `make` is a `Cluster` with other ways, for trials of what goes wrong.
    """
    say = on_message or (lambda _: None)
    folder = config.run_folder
    rounds = LineTail(folder / "rounds.jsonl", RoundRecord.from_json)
    with Workplace(folder / "logs") as workplace:
        cluster = (make or Cluster)(config, workplace, say)
        try:
            cluster.start()
            run_id = cluster.superlink.start_run(workplace.write_app(app_pyproject(config.settings())))
            say(f"run {run_id} started")
            state = follow(
                cluster.superlink, run_id, rounds, on_round or (lambda _: None), cluster.watch, config.startup_timeout
            )
        except EngineError as error:
            raise EngineError(f"{error}\n{workplace.log_tail('serverapp')}") from error
        finally:
            cluster.close()
        if state.outcome != "completed":
            raise EngineError(
                f"the run ended as {state.outcome}: {state.details or 'no details'}\n{workplace.log_tail('serverapp')}"
            )


class Cluster:
    """The processes of one run, and the file that lists them."""

    def __init__(self, config: RunConfig, workplace: Workplace, say: Callable[[str], None]) -> None:
        self.config = config
        self.workplace = workplace
        self.say = say
        self.alive = set(range(config.num_clients))
        self.runtime, self.fleet, self.control, *self.node_ports = free_ports(3 + config.num_clients)
        self.keys: KeyFolder | None = None
        if os.environ.get("HAWTHORN_TLS") != "0":
            make_keys(workplace.folder / "keys", clients=config.num_clients)
            self.keys = KeyFolder(workplace.folder / "keys")
        self.superlink = SuperLink(f"127.0.0.1:{self.control}", self.keys.ca if self.keys else None)
        self.pids: dict[str, Any] = {"status": "starting", "engine": os.getpid(), "superlink": None, "serverapp": None}
        self.pids["supernodes"] = {}

    def start(self) -> None:
        """Start everything and wait until every SuperNode is online."""
        timeout = self.config.startup_timeout
        deadline = time.monotonic() + timeout
        self.say("importing torch, flwr and the client once")
        self.workplace.start_warm(WARM_MODULES, self.config.settings(), timeout)
        self._start_superlink()
        self._wait(self.superlink.is_up, deadline, "the SuperLink did not answer")
        if self.keys is not None:
            self.superlink.register(self.keys.public_bytes(client) for client in range(self.config.num_clients))
        for client in range(self.config.num_clients):
            self._start_supernode(client)
        self._write("running")
        wanted = self.config.num_clients
        self._wait(lambda: self.superlink.num_online() >= wanted, deadline, f"fewer than {wanted} SuperNodes came up")
        self.say(f"{wanted} SuperNodes are online")

    def watch(self) -> None:
        """Notice processes that died: a SuperNode is reported, the SuperLink or the last SuperNode ends the run."""
        if (code := self.workplace.exit_code("superlink")) is not None:
            raise EngineError(f"the SuperLink ended with code {code}\n{self.workplace.log_tail('superlink')}")
        if self.pids["serverapp"] is None and (pid := self.workplace.serverapp_pid()) is not None:
            self.pids["serverapp"] = pid
            self._write("running")
        for client in sorted(self.alive):
            if (code := self.workplace.exit_code(f"supernode-{client}")) is not None:
                self.alive.remove(client)
                if not self.alive:
                    raise EngineError(f"every SuperNode ended\n{self.workplace.log_tail(f'supernode-{client}')}")
                self.say(f"the SuperNode of client {client} ended with code {code}; the run goes on without it")

    def close(self) -> None:
        """Close the connection and mark the list of processes as ended."""
        self.superlink.close()
        self._write("ended")

    def fleet_port(self, client: int) -> int:
        """Return the port at which a client's SuperNode finds the SuperLink."""
        return self.fleet

    def variables(self, role: str) -> dict[str, str]:
        """Return a role's own variables: a home, since two processes installing an app in one collide, and polls."""
        poll = str(poll_interval(self.config.num_clients))
        return {
            "FLWR_HOME": str(self.workplace.folder / role),
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": poll,
            _waits.POLL_VARIABLE: poll,
        }

    def _start_superlink(self) -> None:
        command = ["flower-superlink", *superlink_security(self.keys), "--disable-runtime-dependency-installation"]
        command += ["--host", "127.0.0.1", "--port", str(self.runtime)]
        command += ["--fleet-api-address", f"127.0.0.1:{self.fleet}"]
        command += ["--control-api-address", f"127.0.0.1:{self.control}"]
        variables = {"GRPC_VERBOSITY": "INFO", **self.variables("superlink")}  # tells of clients that speak no TLS
        self.pids["superlink"] = self.workplace.start("superlink", command, variables)
        self._write("starting")

    def _start_supernode(self, client: int) -> None:
        command = ["flower-supernode", *supernode_security(self.keys, client)]
        command += ["--superlink", f"127.0.0.1:{self.fleet_port(client)}"]
        command += ["--host", "127.0.0.1", "--port", str(self.node_ports[client])]
        command += ["--node-config", key_values(node_config(self.config, client))]
        role = f"supernode-{client}"
        self.pids["supernodes"][str(client)] = self.workplace.start(role, command, self.variables(role))

    def _wait(self, ready: Callable[[], bool], deadline: float, complaint: str) -> None:
        while not ready():
            self._check_startup()
            if time.monotonic() > deadline:
                timeout = self.config.startup_timeout
                raise EngineError(f"{complaint} within startup-timeout, {timeout:g} s; logs: {self.workplace.logs}")
            time.sleep(0.05)

    def _check_startup(self) -> None:
        for role in self.workplace.processes:
            if (code := self.workplace.exit_code(role)) is not None:
                raise EngineError(f"{role} ended with code {code} at startup\n{self.workplace.log_tail(role)}")

    def _write(self, status: str) -> None:
        self.pids["status"] = status
        path = self.config.run_folder / "cluster.json"
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(self.pids, indent=2) + "\n", encoding="utf-8")
        draft.replace(path)


def superlink_security(keys: KeyFolder | None) -> list[str]:
    """Return the options of a SuperLink that takes TLS and known SuperNodes alone, or of one without TLS."""
    if keys is None:
        return ["--insecure"]
    return [*tls_options("ssl", keys), *tls_options("appio-ssl", keys), "--enable-supernode-auth"]


def supernode_security(keys: KeyFolder | None, client: int) -> list[str]:
    """Return the options of a client's SuperNode: whom it trusts, and the key it shows."""
    if keys is None:
        return ["--insecure"]
    own = ["--auth-supernode-private-key", str(keys.node_key(client))]
    return ["--root-certificates", str(keys.ca), *own, *tls_options("appio-ssl", keys)]


def tls_options(prefix: str, keys: KeyFolder) -> list[str]:
    """Return the options for the SuperLink's certificate; on one machine SuperNodes serve their ClientApps with it."""
    files = {"ca-certfile": keys.ca, "certfile": keys.certificate("superlink"), "keyfile": keys.key("superlink")}
    return [part for name, path in files.items() for part in (f"--{prefix}-{name}", str(path))]


def node_config(config: RunConfig, client: int) -> dict[str, int | str]:
    """Return what a client's SuperNode knows of itself; a malicious one also knows its role and attack."""
    result: dict[str, int | str] = {"partition-id": client, "num-partitions": config.num_clients}
    if client in config.malicious_ids:
        result |= {"role": "malicious", "attack": config.attack}
    return result


def poll_interval(num_clients: int) -> float:
    """Return seconds between a SuperNode's looks for work: all nodes together look some 40 times a second."""
    return min(max(num_clients / 40, 0.05), 1.0)
