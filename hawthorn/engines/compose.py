"""Engine ``compose``: submits to a federation that runs already, such as that of ``docker compose up``.

It speaks to the Control API over TLS (HAWTHORN_SUPERLINK, default 127.0.0.1:9093; authority HAWTHORN_KEYS/ca.pem) and
follows the record in the runs folder, which the ServerApp's container writes as ``/runs`` (HAWTHORN_RUNS, default
``runs``). Who is malicious, and how, the clients of the federation know themselves; the run's ``malicious-clients`` and
``attack`` say what the server measures.

A run that ends because a process was lost, the ServerApp's or the SuperLink, is started again from its last finished
round, up to HAWTHORN_RESTARTS times (3); a run that fails by itself is not.
"""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import grpc

from hawthorn.engines._superlink import RunState, SuperLink, app_pyproject, describe
from hawthorn.engines._tail import LineTail
from hawthorn.keys import KeyFolder
from server.federation import OnRound
from server.record import RoundRecord, read_run
from tasks.config import RunConfig
from tasks.errors import ConfigError, EngineError, RecordError

INSIDE_RUNS, INSIDE_KEYS = Path("/runs"), Path("/keys")  # where the containers have the folders
LOST = ("heartbeat", "unexpectedly")  # in the words of a run that ended because its process was lost
POLL = 0.25


def run(
    config: RunConfig,
    on_round: OnRound | None = None,
    on_message: Callable[[str], None] | None = None,
) -> None:
    """Run a federation on clients that are there; raises `EngineError` that says why it failed and how to go on."""
    say, outside = on_message or (lambda _: None), runs_folder()
    inside = inside_settings(config, outside)
    superlink = SuperLink(
        os.environ.get("HAWTHORN_SUPERLINK", "127.0.0.1:9093"),
        KeyFolder(Path(os.environ.get("HAWTHORN_KEYS", "keys"))).ca,
    )
    rounds = LineTail(config.run_folder / "rounds.jsonl", RoundRecord.from_json)
    earlier = _written(config)
    try:
        wait_for(superlink, config.startup_timeout)
        left = int(os.environ.get("HAWTHORN_RESTARTS", "3"))
        while True:
            state = _once(superlink, inside, config, rounds, on_round or (lambda _: None), say)
            if state.outcome == "completed":
                return
            if not (left and is_loss(state)):
                raise EngineError(_failure(state, config))
            left -= 1
            say(f"the run was cut short ({state.details}); going on from its last finished round")
            wait_for(superlink, config.startup_timeout)
            inside = inside.replace(resume=inside.resume or _written(config) not in (None, earlier))
    finally:
        superlink.close()


def _written(config: RunConfig) -> tuple[int, int] | None:
    """Return what tells one writing of the run's header from another, an earlier run's of that name; None without."""
    try:
        found = (config.run_folder / "run.json").stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def runs_folder() -> Path:
    """Return the folder of this machine that the ServerApp's container has as ``/runs``."""
    return Path(os.environ.get("HAWTHORN_RUNS", "runs")).expanduser().resolve()


def inside_settings(config: RunConfig, outside: Path) -> RunConfig:
    """Return the settings as the containers need them: their own folders; `ConfigError` for a path they do not have."""
    folder = config.run_folder
    if not folder.is_relative_to(outside):
        raise ConfigError(
            f"the federation writes its runs to {outside}, the run cannot be in {folder}; give --runs-dir {outside}, "
            "or start the federation with HAWTHORN_RUNS and name the same folder here"
        )
    changes: dict[str, str] = {"runs_dir": str(INSIDE_RUNS), "data_dir": "", "name": str(folder.relative_to(outside))}
    if config.from_model:
        model = Path(config.from_model).expanduser().resolve()
        if not model.is_relative_to(outside):
            raise ConfigError(f"from-model {model} must be in {outside}: the containers have no other folder")
        changes["from_model"] = str(INSIDE_RUNS / model.relative_to(outside))
    if config.gate_service:  # the authority and the token that the ServerApp's container has
        keys = KeyFolder(INSIDE_KEYS)
        changes |= {"gate_tls_ca": str(keys.ca), "gate_token_file": str(keys.token)}
    return config.replace(**changes)


def wait_for(superlink: SuperLink, timeout: float) -> None:
    """Wait until the SuperLink answers; `EngineError` that says what to look at if it does not."""
    deadline = time.monotonic() + timeout
    while not superlink.is_up():
        if time.monotonic() > deadline:
            raise EngineError(
                f"no SuperLink answers at {superlink.address} within startup-timeout, {timeout:g} s: is the federation "
                "up (docker compose ps), and are its certificates those of HAWTHORN_KEYS?"
            )
        time.sleep(POLL)


def is_loss(state: RunState) -> bool:
    """Return whether a run ended because a process was lost, not because the run failed."""
    return state.outcome == "lost" or any(word in state.details.lower() for word in LOST)


def _once(
    superlink: SuperLink,
    inside: RunConfig,
    config: RunConfig,
    rounds: LineTail[RoundRecord],
    on_round: OnRound,
    say: Callable[[str], None],
) -> RunState:
    """Submit the run and follow it to its end; outcome ``lost`` if the SuperLink no longer knows it."""
    with tempfile.TemporaryDirectory(prefix="hawthorn-app-") as folder:
        (Path(folder) / "pyproject.toml").write_text(app_pyproject(inside.settings()), encoding="utf-8")
        run_id = superlink.start_run(Path(folder))
    say(f"run {run_id} started; {superlink.num_online()} SuperNodes are online")
    begin, away = time.monotonic(), 0.0
    try:
        while True:
            rounds.read(on_round)
            try:
                state, away = superlink.state(run_id), 0.0
            except grpc.RpcError as error:
                if (code := getattr(error, "code", None)) is not None and code() == grpc.StatusCode.NOT_FOUND:
                    return RunState("finished", "lost", "the SuperLink was started anew and does not know the run")
                away = away or time.monotonic()
                if time.monotonic() - away > config.startup_timeout:
                    raise EngineError(
                        f"lost the SuperLink for {config.startup_timeout:g} s ({describe(error)}); finished rounds are "
                        f"safe: hawthorn run --engine compose --resume {config.run_folder}"
                    ) from error
            else:
                if state.status == "finished":
                    rounds.read(on_round)
                    return state
                waited = time.monotonic() - begin
                if state.status != "running" and waited > config.startup_timeout:
                    raise EngineError(f"the run is still {state.status!r} after {waited:.0f} s: is a ServerApp up?")
            time.sleep(POLL)
    except BaseException:
        superlink.stop_run(run_id)
        raise


def _failure(state: RunState, config: RunConfig) -> str:
    text = f"the run ended as {state.outcome}: {state.details or 'no details'}; log: docker compose logs serverapp"
    with contextlib.suppress(RecordError):
        done = len(read_run(config.run_folder).rounds)
        return f"{text}; {done} rounds are finished: hawthorn run --engine compose --resume {config.run_folder}"
    return f"{text}; nothing is in {config.run_folder}: is {runs_folder()} what the containers have as /runs?"
