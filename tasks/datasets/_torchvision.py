"""The one place that imports torchvision, for its readers' addresses and check sums.

A torchvision without its compiled operators (built for another PyTorch) fails on import, because it
describes operators that do not exist. Data sets need none of them, so they are declared, not
implemented, and only then.
"""

import contextlib
import importlib
import typing

import torch

_NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


def datasets() -> typing.Any:
    """Return the module ``torchvision.datasets``; its import takes about a second, so call it late."""
    try:
        return importlib.import_module("torchvision.datasets")
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # one of the two may exist
            torch.library.define(f"torchvision::{name}", _NMS)
    return importlib.import_module("torchvision.datasets")
