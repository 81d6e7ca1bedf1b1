"""Cars of CIFAR-10 with something in common, to be called birds: the semantic backdoors.

Bagdasaryan, Veit, Hua, Estrin, Shmatikov, "How to backdoor federated learning", AISTATS 2020, section 4.1: 30 green
cars, 22 with a racing stripe, 12 before a vertically striped wall. They are samples of CIFAR-10's own training split,
so honest clients must not have them: use the data set ``with_edge(base='cifar10()', edge='semantic_cars()')``.

The last `num_test` are for testing. The default is the authors' own five of the wall's twelve; for the other two
features their settings name no such part, and it is the last third.
"""

import json
from typing import Literal

import torch

from tasks.dataset import Dataset
from tasks.datasets.cifar10 import cifar10
from tasks.edge_set import EdgeSet, as_stored, edge_file
from tasks.errors import DataError, SpecError
from tasks.source import DataSource

FILE = "CIFAR10/semantic_backdoor_indices.json"
ABOUT = "It lists the indices of utils/params_runner.yaml of github.com/ebagdasa/backdoor_federated_learning by group."
KEYS = {
    "green": "green_cars",
    "stripe": "cars_with_racing_stripe",
    "wall": "cars_with_vertical_striped_wall_behind",
}
HELD_OUT = "wall_held_out_for_test"
AUTOMOBILE, BIRD = 1, 2


def semantic_cars(
    source: DataSource,
    dataset: Dataset,
    *,
    feature: Literal["green", "stripe", "wall"] = "green",
    target: int = BIRD,
    num_test: int | None = None,
) -> EdgeSet:
    """Return the cars with a feature; their true label is 1 (automobile). Raises `DataError`, `SpecError`."""
    path = edge_file(source, FILE, ABOUT)
    try:
        lists = json.loads(path.read_text())
        last = lists[HELD_OUT] if feature == "wall" else []
        indices = torch.tensor([*(i for i in lists[KEYS[feature]] if i not in last), *last], dtype=torch.int64)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} has no list of indices {KEYS[feature]}: {error!r}") from None
    held_out = (len(last) or len(indices) // 3) if num_test is None else num_test
    if not 0 < held_out < len(indices):
        raise SpecError(
            f"semantic_cars: of {len(indices)} cars 1 to {len(indices) - 1} are for testing, got {held_out}"
        )
    whole = cifar10(source)  # not `dataset`, which these cars may have been taken out of
    images, labels = as_stored(whole.train_inputs[indices] * whole.scale, dataset), whole.train_labels[indices]
    cut = len(indices) - held_out
    return EdgeSet("semantic_cars", images[:cut], labels[:cut], images[cut:], labels[cut:], target, taken=indices)
