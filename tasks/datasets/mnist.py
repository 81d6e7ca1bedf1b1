"""MNIST: 60,000 + 10,000 handwritten digits, 28x28 grey, white on black.

LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998.
"""

from tasks.dataset import Dataset
from tasks.datasets._about import About
from tasks.datasets._idx import IdxFiles, read_split
from tasks.source import DataSource

ABOUT = About(
    name="mnist",
    num_train=60_000,
    num_test=10_000,
    input_shape=(1, 28, 28),
    num_classes=10,
    citation="LeCun, Bottou, Bengio, Haffner, Gradient-based learning applied to document recognition, 1998",
    terms="no licence stated by the authors",
    files=IdxFiles(
        "MNIST",
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
    ),
)


def mnist(source: DataSource) -> Dataset:
    """Return MNIST as uint8 [samples, 1, 28, 28] in the original order; raises `DataError` when it is missing."""
    raw = ABOUT.open(source) / "MNIST" / "raw"
    train = read_split(raw, "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test = read_split(raw, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    return Dataset("mnist", *train, *test, num_classes=10, scale=1 / 255)
