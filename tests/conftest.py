"""Shared by all tests: one thread, quiet Flower, and real data only where the environment offers it."""

import os
import signal
from pathlib import Path

import pytest
import torch

from hawthorn.engines import QUIET
from tasks.config import RunConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")
for key, value in QUIET.items():
    os.environ.setdefault(key, value)

torch.set_num_threads(1)

TRIGGER = "patch_backdoor(target=0, grid=(1, 1), size=(2, 2), per_batch=0.5)"


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A federation of 6 clients on digits that takes a fraction of a second."""
    return RunConfig.read(
        {
            "runs-dir": str(tmp_path),
            "name": "test",
            "num-clients": 6,
            "num-rounds": 3,
            "training": "sgd(lr=0.5, batch_size=32)",
            "workers": 1,
        }
    )


def pytest_configure() -> None:
    """Let Ctrl-C arrive: a suite that a shell starts in the background inherits that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
