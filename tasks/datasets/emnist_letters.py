"""EMNIST, split "letters": 124,800 + 20,800 handwritten letters, upper and lower case merged, 28x28 grey.

Cohen, Afshar, Tapson, van Schaik, "EMNIST: an extension of MNIST to handwritten letters", 2017 (arXiv:1702.05373).

Deviations from the files, both on purpose: the files (and torchvision) hold every image transposed,
here images are upright; the files count labels from 1, here ``a`` is 0 and ``z`` is 25.
"""

from pathlib import Path

from torch import Tensor

from tasks.dataset import Dataset
from tasks.datasets._about import About
from tasks.datasets._idx import IdxFiles, read_split
from tasks.source import DataSource

ABOUT = About(
    name="emnist_letters",
    num_train=124_800,
    num_test=20_800,
    input_shape=(1, 28, 28),
    num_classes=26,
    citation="Cohen, Afshar, Tapson, van Schaik, EMNIST: an extension of MNIST to handwritten letters, 2017",
    terms="derived from NIST Special Database 19, a work of the US government",
    files=IdxFiles(
        "EMNIST",
        {
            "emnist-letters-train-images-idx3-ubyte": "6b7a6cdb4e8ae8838780bb5aeda8ab2a",
            "emnist-letters-train-labels-idx1-ubyte": "49ecae16ee4c7ab14dcf3e8d8c39090b",
            "emnist-letters-test-images-idx3-ubyte": "811ee95d607652077616dbaaea581e1d",
            "emnist-letters-test-labels-idx1-ubyte": "dd1687ca8200da91c0dfd6321518806d",
        },
    ),
)


def emnist_letters(source: DataSource) -> Dataset:
    """Return the letters as uint8 [samples, 1, 28, 28], upright, labels 0..25; raises `DataError` when missing."""
    raw = ABOUT.open(source) / "EMNIST" / "raw"
    return Dataset("emnist_letters", *_upright(raw, "train"), *_upright(raw, "test"), num_classes=26, scale=1 / 255)


def _upright(raw: Path, split: str) -> tuple[Tensor, Tensor]:
    images, labels = read_split(
        raw, f"emnist-letters-{split}-images-idx3-ubyte", f"emnist-letters-{split}-labels-idx1-ubyte"
    )
    return images.transpose(2, 3).contiguous(), labels - 1
