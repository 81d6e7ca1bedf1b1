"""Fashion-MNIST: 60,000 + 10,000 articles of clothing, 28x28 grey, white on black.

Xiao, Rasul, Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms", 2017.
"""

from tasks.dataset import Dataset
from tasks.datasets._about import About
from tasks.datasets._idx import IdxFiles, read_split
from tasks.source import DataSource

ABOUT = About(
    name="fashion_mnist",
    num_train=60_000,
    num_test=10_000,
    input_shape=(1, 28, 28),
    num_classes=10,
    citation="Xiao, Rasul, Vollgraf, Fashion-MNIST: a novel image dataset for benchmarking, 2017",
    terms="MIT, Copyright (c) 2017 Zalando SE",
    files=IdxFiles(
        "FashionMNIST",
        {
            "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
            "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
            "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
            "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
        },
    ),
)


def fashion_mnist(source: DataSource) -> Dataset:
    """Return Fashion-MNIST as uint8 [samples, 1, 28, 28] in the original order; raises `DataError` when missing."""
    raw = ABOUT.open(source) / "FashionMNIST" / "raw"
    train = read_split(raw, "train-images-idx3-ubyte", "train-labels-idx1-ubyte")
    test = read_split(raw, "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
    return Dataset("fashion_mnist", *train, *test, num_classes=10, scale=1 / 255)
