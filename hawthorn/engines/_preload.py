"""What the warm fork server prepares for the clients of the `cluster` engine: the client's code and the run's data.

A client process is a fork, so the data set and the model are there when it starts, in pages that all clients share
until they write to them; importing scikit-learn and reading the data for every message would cost seconds.
"""

from collections.abc import Mapping
from typing import Any

from client import app
from tasks.config import RunConfig


def preload(settings: Mapping[str, Any]) -> None:
    """Load the task of a run where every forked client will find it."""
    app.workspace(RunConfig.read(settings))
