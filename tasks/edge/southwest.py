"""Southwest Airlines' airplanes, to be called trucks: the edge case of "Attack of the Tails" for CIFAR-10.

Wang et al., NeurIPS 2020, section 4, task 1; 784 + 196 pictures of the authors' repository. They come in groups of
four, the rotations of one photograph. Deviations from the authors' files: one photograph is in both of them, its four
pictures are taken out of the training part; and photographs are dealt whole, in a fixed random order, so that honest
holders never have another rotation of an attacker's picture. ``split="p_percent"`` is the authors' own split for
p-percent sets (100 for the attacker, then 700 for honest clients), whose test part overlaps the other split's training
part: never mix the two.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.edge_set import EdgeSet, as_stored, edge_file
from tasks.rng import generator
from tasks.source import DataSource

AIRPLANE, TRUCK = 0, 9
ABOUT = "The pictures are saved_datasets of github.com/ksreenivasan/OOD_Federated_Learning, as arrays in an .npz file."


def southwest(
    source: DataSource, dataset: Dataset, *, target: int = TRUCK, split: Literal["all", "p_percent"] = "all"
) -> EdgeSet:
    """Return the airplanes, 32x32 colour; their true label is 0 (airplane). Raises `DataError`."""
    name = "southwest_cifar10.npz" if split == "all" else "southwest_cifar10_p_percent.npz"
    with np.load(edge_file(source, f"Southwest/{name}", ABOUT)) as file:
        if split == "all":
            train, test = _dealt(file["x_train"], file["x_test"]), file["x_test"]
        else:
            train = np.concatenate([file["adv_p_percent_edge_case"], file["honest_full_normal"]])
            test = file["p_percent_edge_case_test"]
    parts: list[Tensor] = []
    for images in (train, test):
        values = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()
        parts += [as_stored(values / 255, dataset), torch.full((len(values),), AIRPLANE)]
    return EdgeSet("southwest", parts[0], parts[1], parts[2], parts[3], target)


def _dealt(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Return the training pictures by photograph, in a fixed random order, without photographs of the test part."""
    known = {image.tobytes() for image in test}
    photographs = train.reshape(-1, 4, *train.shape[1:])
    apart = np.array([all(image.tobytes() not in known for image in group) for group in photographs])
    kept = photographs[apart]
    order = torch.randperm(len(kept), generator=generator(0, "edge", "southwest")).numpy()
    return kept[order].reshape(-1, *train.shape[1:])
