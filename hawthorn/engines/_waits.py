"""Shorter waits in Flower's own processes; the only place where Hawthorn reaches into Flower.

Flower 1.36 is built for clients far away: a SuperNode sleeps 3 s after it found no message and 0.5 s between looks for
its ClientApp's reply, the ServerApp's grid sleeps 3 s between looks for replies, whoever pulls an object that is
still on its way tries again after 1 s, and a node or a ClientApp that was killed is missed after 60 s. No option or
variable changes that, and on one machine these waits are most of a round. Processes forked by `_warm.py` therefore
set two constants before Flower's modules read them, and the two modules that hold those loops see a `time` whose
`sleep` is capped. If Flower no longer looks as expected, nothing is changed and rounds are slower.
"""

import importlib
import os
import sys
import time
import traceback
from collections.abc import Mapping
from types import ModuleType
from typing import Any

POLL_VARIABLE = "HAWTHORN_LONGEST_POLL"  # longest sleep of the two loops, in seconds
# Constants of Flower, in seconds: the first retry of a pull (later ones double), and the interval of heartbeats, two of
# which may be missed (10 s is the smallest that a SuperLink accepts).
CONSTANTS = {
    "flwr.supercore.constant": {"PULL_INITIAL_BACKOFF": 0.05},
    "flwr.common.constant": {"HEARTBEAT_DEFAULT_INTERVAL": 10},
}


class CappedSleep:
    """The `time` module with `sleep` cut to at most `longest` seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest

    def sleep(self, seconds: float) -> None:
        """Sleep `seconds`, but at most the cap."""
        time.sleep(min(seconds, self.longest))

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def cap_sleeps(module: ModuleType, longest: float) -> bool:
    """Cap the sleeps of a module that says ``time.sleep``; return whether it does."""
    if getattr(module, "time", None) is not time:
        return False
    module.time = CappedSleep(longest)  # type: ignore[attr-defined]
    return True


def shorten_constants(constants: Mapping[str, Mapping[str, float]] = CONSTANTS) -> list[str]:
    """Set those constants that exist; return their names. Call it before Flower's other modules are imported."""
    changed = []
    for module_name, values in constants.items():
        module = importlib.import_module(module_name)
        for name, value in values.items():
            if isinstance(getattr(module, name, None), int | float):
                setattr(module, name, value)
                changed.append(name)
    return changed


def flower_supernode() -> object:
    """Run ``flower-supernode``, the sleeps of its loop capped as the environment asks for.

    A SuperNode that is refused fails in its main thread while its HTTP server goes on: the process would stay, doing
    nothing. It ends here, so that whoever started it sees that it did.
    """
    try:
        return _with_capped_sleeps("flwr.supernode.start_client_internal", "flwr.supernode.cli", "flower_supernode")
    except Exception:
        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def flwr_serverapp() -> object:
    """Run ``flwr-serverapp``, the sleeps of its grid capped as the environment asks for."""
    return _with_capped_sleeps("flwr.superlink.grid.http_grid", "flwr.superlink.cli", "flwr_serverapp")


def _with_capped_sleeps(loop: str, module: str, function: str) -> object:
    if longest := os.environ.get(POLL_VARIABLE):
        cap_sleeps(importlib.import_module(loop), float(longest))
    return getattr(importlib.import_module(module), function)()
