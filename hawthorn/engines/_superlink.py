"""The SuperLink as an engine sees it: the app it is given, its Control API (gRPC), and following a run to its end.

The app is not the repository: it is a folder with nothing but a ``pyproject.toml`` that names ``server.app:app``,
``client.app:app`` and the run's settings, so that every process imports the installed packages.
"""

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from flwr.cli.build import build_fab_from_disk
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.control_pb2_grpc import ControlStub
from flwr.proto.federation_config_pb2 import SimulationConfig
from flwr.supercore.fab import Fab

from hawthorn.engines._tail import LineTail
from server.federation import OnRound
from server.record import RoundRecord
from tasks.errors import ConfigError, EngineError

POLL = 0.1  # seconds between looks at a run
KNOWN_KEY = "already in use"  # in what a SuperLink says of a key that it has, or has shut out
LOOPBACK = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
]


def toml_value(value: bool | int | float | str) -> str:
    """Return a scalar as TOML; text never holds a bare double quote, so that Flower's key=value reader takes it too."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return '"' + re.sub(r'[\\"\x00-\x1f\x7f]', lambda match: f"\\u{ord(match[0]):04x}", value) + '"'


def key_values(settings: Mapping[str, bool | int | float | str]) -> str:
    """Return settings as ``key=value key="text"``, the form of ``--node-config`` and ``--run-config``."""
    return " ".join(f"{key}={toml_value(value)}" for key, value in settings.items())


def app_pyproject(
    settings: Mapping[str, bool | int | float | str],
    serverapp: str = "server.app:app",
    clientapp: str = "client.app:app",
) -> str:
    """Return the ``pyproject.toml`` of an app without code: its two components and the run's settings."""
    lines = ["[project]", 'name = "hawthorn-run"', 'version = "1.0.0"', 'description = "A run of Hawthorn"']
    lines += ['license = "Apache-2.0"', "", "[tool.flwr.app]", 'publisher = "hawthorn"', ""]
    lines += ["[tool.flwr.app.components]", f"serverapp = {toml_value(serverapp)}"]
    lines += [f"clientapp = {toml_value(clientapp)}", "", "[tool.flwr.app.config]"]
    lines += [f"{json.dumps(key)} = {toml_value(value)}" for key, value in settings.items()]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class RunState:
    """Where a run stands: ``pending``, ``starting``, ``running`` or ``finished``; how it finished; why."""

    status: str
    outcome: str
    details: str


class SuperLink:
    """Client of a SuperLink's Control API; `ca` is the PEM file of the authority to trust, None: no TLS."""

    def __init__(self, address: str, ca: Path | None = None) -> None:
        self.address = address
        if ca is None:
            self.channel = grpc.insecure_channel(address, options=LOOPBACK)
        else:
            credentials = grpc.ssl_channel_credentials(read_authority(ca))
            self.channel = grpc.secure_channel(address, credentials, options=LOOPBACK)
        self.stub: Any = ControlStub(self.channel)

    def close(self) -> None:
        """Close the connection."""
        self.channel.close()

    def is_up(self) -> bool:
        """Return whether the Control API answers."""
        try:
            self.stub.ListRuns(ListRunsRequest(), timeout=1.0)
        except grpc.RpcError:
            return False
        return True

    def num_online(self) -> int:
        """Return how many SuperNodes are online."""
        return sum(node.status == "online" for node in self.stub.ListNodes(ListNodesRequest(), timeout=10.0).nodes_info)

    def nodes(self) -> dict[bytes, tuple[int, str]]:
        """Return the SuperNodes that are registered: public key -> (node id, status)."""
        found = self.stub.ListNodes(ListNodesRequest(), timeout=10.0).nodes_info
        return {n.public_key: (n.node_id, n.status) for n in found if n.status != "unregistered"}

    def register(self, keys: Iterable[bytes]) -> int:
        """Let SuperNodes with these public keys in; return how many were new.

        A key that was shut out stays out: the SuperLink takes no key twice, so its client needs a new one.
        """
        new = 0
        try:
            known = self.nodes()
            for key in keys:
                if key not in known:
                    new += self._register(key)
        except grpc.RpcError as error:
            raise EngineError(
                f"the SuperLink at {self.address} registered {new} keys, then none: {describe(error)}"
            ) from error
        return new

    def _register(self, key: bytes) -> bool:
        try:
            self.stub.RegisterNode(RegisterNodeRequest(public_key=key), timeout=10.0)
        except grpc.RpcError as error:
            if KNOWN_KEY in describe(error).lower():
                return False
            raise
        return True

    def unregister(self, key: bytes) -> bool:
        """Let a SuperNode with this public key in no longer; return whether it was registered."""
        try:
            if (found := self.nodes().get(key)) is None:
                return False
            self.stub.UnregisterNode(UnregisterNodeRequest(node_id=found[0]), timeout=10.0)
        except grpc.RpcError as error:
            raise EngineError(f"the SuperLink at {self.address} removed no key: {describe(error)}") from error
        return True

    def start_run(self, app: Path, simulation: Mapping[str, Any] | None = None) -> int:
        """Submit the app in a folder, with settings of the simulation if there is one; return the run's id."""
        content = build_fab_from_disk(app)
        config = SimulationConfig(**simulation) if simulation is not None else None
        request = StartRunRequest(fab=fab_to_proto(Fab("", content, {})), override_federation_config=config)
        try:
            response = self.stub.StartRun(request, timeout=30.0)
        except grpc.RpcError as error:
            raise EngineError(f"the SuperLink refused the run: {error}") from error
        if not response.HasField("run_id"):
            raise EngineError(f"the SuperLink refused the run: {response.note or 'no reason given'}")
        return response.run_id

    def stop_run(self, run_id: int) -> None:
        """End a run; one that ended already needs nothing."""
        with contextlib.suppress(grpc.RpcError):
            self.stub.StopRun(StopRunRequest(run_id=run_id), timeout=10.0)

    def state(self, run_id: int) -> RunState:
        """Return where a run stands."""
        status = self.stub.ListRuns(ListRunsRequest(run_id=run_id), timeout=10.0).run_dict[run_id].status
        return RunState(status.status, status.sub_status, status.details)


def read_authority(path: Path) -> bytes:
    """Return the PEM file of an authority; `ConfigError` if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the authority {path}: {error.strerror}; hawthorn keys makes one") from None


def describe(error: grpc.RpcError) -> str:
    """Return a gRPC error as one line: its code and its details."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    return f"{code().name}: {details()}" if code and details else str(error)


def follow(
    superlink: SuperLink,
    run_id: int,
    rounds: LineTail[RoundRecord],
    on_round: OnRound,
    watch: Callable[[], None],
    startup_timeout: float,
) -> RunState:
    """Report finished rounds until the run ends; `watch` is called at every look and may raise `EngineError`."""
    deadline = time.monotonic() + startup_timeout
    while True:
        watch()
        try:
            state = superlink.state(run_id)
        except grpc.RpcError as error:
            watch()  # says it better if the SuperLink died
            raise EngineError(f"lost the SuperLink: {error}") from error
        rounds.read(on_round)
        if state.status == "finished":
            return state
        if state.status != "running" and time.monotonic() > deadline:
            raise EngineError(f"the run is still {state.status!r} after {startup_timeout:g} s")
        time.sleep(POLL)
