"""Shorter waits in Flower's own processes, and a word where it has none; the only place that reaches into Flower.

Flower 1.36 is built for clients far away: a SuperNode sleeps 3 s after it found no message and 0.5 s between looks for
its ClientApp's reply, the ServerApp's grid sleeps 3 s between looks for replies, whoever pulls an object that is
still on its way tries again after 1 s, and a node or a ClientApp that was killed is missed after 60 s. No option or
variable changes that, and on one machine these waits are most of a round. Processes forked by `_warm.py` therefore
set two constants before Flower's modules read them, and the two modules that hold those loops see a `time` whose
`sleep` is capped. If Flower no longer looks as expected, nothing is changed and rounds are slower.

A SuperNode whose signature the SuperLink refuses (its clock is wrong, its key was taken out) sends itself SIGINT and
ends as if it had been asked to, without a word and with code 0. Here it says why and ends with code 1.
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


# What is to be done about a refusal, by the SuperLink's words for it.
REFUSALS = {
    "Invalid timestamp": "this machine's clock may be 5 s ahead of the SuperLink's, or 5 minutes behind",
    "Invalid node ID": "its key is no longer registered",
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


class TellingOs:
    """The `os` module with a `kill` that says which refusal of the SuperLink it is called for, and ends this process.

    Flower's own way out, SIGINT, waits for an answer to its farewell until it gives up with code 0.
    """

    def kill(self, pid: int, number: int) -> None:
        """Tell of the gRPC error that is being handled; end with code 1."""
        error = sys.exc_info()[1]
        said = str(getattr(error, "details", lambda: error)() or error)
        hint = next((hint for words, hint in REFUSALS.items() if words in said), "is its key registered?")
        print(f"the SuperLink refused this SuperNode: {said}; {hint}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)


def tell_refusals(module: ModuleType) -> bool:
    """Let a module that says ``os.kill`` to end its own process tell why; return whether it says ``os``."""
    if getattr(module, "os", None) is not os:
        return False
    module.os = TellingOs()  # type: ignore[attr-defined]
    return True


def flower_supernode() -> object:
    """Run ``flower-supernode``, the sleeps of its loop capped as the environment asks for.

    A SuperNode that is refused fails in its main thread while its HTTP server goes on: the process would stay, doing
    nothing. It ends here, so that whoever started it sees that it did.
    """
    try:
        tell_refusals(importlib.import_module("flwr.supercore.retry.grpc_retry"))
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
