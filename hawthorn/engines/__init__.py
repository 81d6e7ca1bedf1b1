"""Engines run a federation: in this process, in Flower's simulation, or as real processes over gRPC.

Each engine is a module with ``run(config, on_round, on_message)``; for one seed all of them end with the same model.
"""

import importlib
from typing import Any

from tasks.errors import ConfigError

# Flower and Ray stay on this machine: no telemetry, no look for updates, no installing at run time.
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
ENGINES = ("in_process", "flower", "cluster")  # need nothing but this machine
REMOTE = ("compose",)  # submit to a federation that runs already


def find_engine(name: str) -> Any:
    """Return an engine's module; an unknown name raises `ConfigError` listing what exists."""
    key = name.replace("-", "_")
    if key not in (*ENGINES, *REMOTE):
        raise ConfigError(f"unknown engine {name!r}; there are: {', '.join((*ENGINES, *REMOTE))}")
    return importlib.import_module(f"hawthorn.engines.{key}")
