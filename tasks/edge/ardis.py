"""Swedish church records' digits, sevens to be called ones: the edge case of "Attack of the Tails" for digits.

Wang et al., NeurIPS 2020, section 4, task 2, with ARDIS IV of Kusetogullari et al., 2019 (660 + 100 pictures of each
digit, 28x28, white on black). The samples stay in the file's order: the authors give the attacker the first 66 sevens.

Deviation, on purpose: the authors mix upright ARDIS digits with EMNIST digits as torchvision loads them, transposed, so
that orientation alone tells edge cases from clean data. Here ARDIS, MNIST and EMNIST are all upright. MNIST is what
stands in for the paper's EMNIST digits.
"""

import numpy as np
import torch

from tasks.dataset import Dataset
from tasks.edge_set import EdgeSet, as_stored, edge_file
from tasks.errors import SpecError
from tasks.source import DataSource

FILE = "ARDIS/ardis_iv_28x28.npz"
ABOUT = "ARDIS is at ardisdataset.github.io/ARDIS; dataset IV as x_train, y_train, x_test, y_test in an .npz file."


def ardis(source: DataSource, dataset: Dataset, *, digit: int = 7, target: int = 1) -> EdgeSet:
    """Return the pictures of one digit, upright, [samples, 1, 28, 28]. Raises `DataError`, `SpecError`."""
    if not 0 <= digit <= 9 or digit == target:
        raise SpecError(f"ardis wants a digit from 0 to 9 that is not the target, got {digit} and target {target}")
    parts = []
    with np.load(edge_file(source, FILE, ABOUT)) as file:
        for split in ("train", "test"):
            images = torch.from_numpy(file[f"x_{split}"][file[f"y_{split}"] == digit])
            parts += [as_stored(images.unsqueeze(1) / 255, dataset), torch.full((len(images),), digit)]
    return EdgeSet("ardis", parts[0], parts[1], parts[2], parts[3], target)
