"""scikit-learn's digits: 1,797 handwritten digits, 8x8 grey; comes with the package, no download.

Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI machine learning repository, 1998
(the test part of that collection).

The collection has no split of its own. Ours is fixed, whatever the seed of a run: of each class the
first fifth (rounded) of a permutation by NumPy's legacy generator with seed 0 is for testing, so
1,438 samples train and 359 test; inside a split the original order is kept.
"""

import importlib.util
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tasks.dataset import Dataset
from tasks.datasets._about import About
from tasks.source import DataSource

ABOUT = About(
    name="digits",
    num_train=1_438,
    num_test=359,
    input_shape=(1, 8, 8),
    num_classes=10,
    citation="Alpaydin, Kaynak, Optical recognition of handwritten digits, UCI machine learning repository, 1998",
    terms="CC BY 4.0 (UCI machine learning repository)",
)


def digits(source: DataSource, *, size: Literal[8, 28] = 8) -> Dataset:
    """Return the digits as uint8 [samples, 1, size, size]; 28 is the 8x8 image resized bilinearly.

    The 8x8 pixels are the original whole numbers 0..16 with scale 1/16, so nothing is rounded.
    """
    table = _table()
    pixels = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8)
    labels = torch.from_numpy(table[:, -1]).long()
    if size == 28:
        resized = functional.interpolate(pixels / 16, size=(28, 28), mode="bilinear", align_corners=False)
        inputs, scale = resized.mul(255).round().to(torch.uint8), 1 / 255
    else:
        inputs, scale = pixels.to(torch.uint8), 1 / 16
    test = _test_mask(labels)
    return Dataset("digits", inputs[~test], labels[~test], inputs[test], labels[test], num_classes=10, scale=scale)


def _table() -> np.ndarray:
    """Return scikit-learn's table, [1797, 64 pixels + label], without importing it if its file is found: 1 s less."""
    package = importlib.util.find_spec("sklearn")
    for folder in (package.submodule_search_locations or []) if package else []:
        if (path := Path(folder) / "datasets" / "data" / "digits.csv.gz").is_file():
            return np.loadtxt(path, delimiter=",")
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    return np.column_stack([images, classes])


def _test_mask(labels: Tensor) -> Tensor:
    """Return a mask of the samples for testing, a fifth of each class."""
    draws = np.random.RandomState(0)
    mask = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        members = torch.nonzero(labels == label).squeeze(1)
        order = torch.from_numpy(draws.permutation(len(members)))
        mask[members[order[: round(len(members) / 5)]]] = True
    return mask
