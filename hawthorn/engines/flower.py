"""Engine ``flower``: Flower's own simulation with its Ray backend, under a SuperLink of its own.

What ``flwr run`` does with a local connection, without what it leaves behind: the SuperLink listens on free loopback
ports, lives in a private Flower home, and ends with the run, together with Ray.
"""

import os
import time
from collections.abc import Callable
from typing import Any

from hawthorn.engines._processes import Workplace, free_ports
from hawthorn.engines._superlink import SuperLink, app_pyproject, follow
from hawthorn.engines._tail import LineTail
from server.federation import OnRound
from server.record import RoundRecord
from tasks.config import RunConfig
from tasks.errors import EngineError

# What the warm fork server imports: Flower's programs, but neither torch nor Ray, which the simulation loads itself.
WARM_MODULES = ("flwr.superlink.cli", "flwr.superlink.main", "flwr.supercore.cli", "flwr.simulation.app")


def run(
    config: RunConfig,
    on_round: OnRound | None = None,
    on_message: Callable[[str], None] | None = None,
) -> None:
    """Run a federation in Flower's simulation; raises `EngineError` with the end of the log that says why it failed."""
    say = on_message or (lambda _: None)
    folder = config.run_folder
    rounds = LineTail(folder / "rounds.jsonl", RoundRecord.from_json)
    with Workplace(folder / "logs") as workplace:
        runtime, control = free_ports(2)
        superlink = SuperLink(f"127.0.0.1:{control}")

        def watch() -> None:
            if (code := workplace.exit_code("superlink")) is not None:
                raise EngineError(f"the SuperLink ended with code {code}\n{workplace.log_tail('superlink')}")

        try:
            workplace.start_warm(WARM_MODULES, {}, config.startup_timeout)
            workplace.start("superlink", superlink_command(runtime, control), superlink_variables(workplace))
            wait_until_up(superlink, watch, config.startup_timeout)
            app = workplace.write_app(app_pyproject(config.settings()))
            run_id = superlink.start_run(app, simulation_settings(config.num_clients))
            say(f"run {run_id} started with {config.num_clients} simulated SuperNodes")
            state = follow(superlink, run_id, rounds, on_round or (lambda _: None), watch, config.startup_timeout)
        finally:
            superlink.close()
        if state.outcome != "completed":
            raise EngineError(
                f"the run ended as {state.outcome}: {state.details or 'no details'}\n{workplace.log_tail('serverapp')}"
            )


def superlink_command(runtime: int, control: int) -> list[str]:
    """Return the command of a SuperLink in simulation mode with its state in memory."""
    command = ["flower-superlink", "--insecure", "--simulation", "--disable-runtime-dependency-installation"]
    command += ["--host", "127.0.0.1", "--port", str(runtime)]
    return [*command, "--control-api-address", f"127.0.0.1:{control}"]


def superlink_variables(workplace: Workplace) -> dict[str, str]:
    """Return the SuperLink's own variables: a private home, and quick looks for a task to start."""
    return {"FLWR_HOME": str(workplace.folder / "superlink"), "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1"}


def simulation_settings(num_clients: int) -> dict[str, Any]:
    """Return the settings of the simulation: one core per client at work, no more Ray workers than there is work."""
    cores = min(os.cpu_count() or 1, num_clients)
    return {"num_supernodes": num_clients, "client_resources_num_cpus": 1, "init_args_num_cpus": cores}


def wait_until_up(superlink: SuperLink, watch: Callable[[], None], timeout: float) -> None:
    """Wait until the SuperLink answers; `EngineError` if it ends or takes longer than `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not superlink.is_up():
        watch()
        if time.monotonic() > deadline:
            raise EngineError(f"the SuperLink did not answer within startup-timeout, {timeout:g} s")
        time.sleep(0.05)
