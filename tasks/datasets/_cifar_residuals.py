"""CIFAR-10 in a compact lossless form: residuals of a predictor, compressed with xz (97 MB instead of 186 MB).

``BATCH.res.xz`` holds uint8 [images, 3, 32, 32]: the planes g, r - g + 128 and b - g + 128 (modulo
256), each pixel less its prediction from the pixels to the left, above and above left, by the
median edge predictor of LOCO-I (Weinberger, Seroussi, Sapiro, 2000, section III-A).
``index.tsv.xz`` holds batch, label and file name of each image, in order. From both come the very
bytes of the original batches, which are pickles written by Python 2 (protocol 2).
"""

import lzma
import pickle
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from tasks.errors import DataError

BATCHES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
FILES = (*(f"{name}.res.xz" for name in BATCHES), "index.tsv.xz")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CHUNK = 1000  # images at a time: three rows of all planes stay in the processor's cache


def batches(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) of the seven original files, decoded from the compact form in `folder`."""
    try:
        index = lzma.decompress((folder / "index.tsv.xz").read_bytes()).decode("ascii")
        rows = [line.split("\t") for line in index.splitlines()]
        with ThreadPoolExecutor(2) as pool:  # xz and NumPy let go of the interpreter; each batch holds about 150 MB
            for name, images in zip(BATCHES, pool.map(partial(_images, folder), BATCHES), strict=True):
                labels = [int(label) for batch, label, _ in rows if batch == name]
                files = [file for batch, _, file in rows if batch == name]
                yield name, _batch_bytes(name, images, labels, files)
    except (lzma.LZMAError, EOFError, ValueError) as error:
        raise DataError(f"the compact CIFAR-10 in {folder} cannot be read: {error}") from None
    yield "batches.meta", _meta_bytes()


def _images(folder: Path, name: str) -> np.ndarray:
    residuals = np.frombuffer(lzma.decompress((folder / f"{name}.res.xz").read_bytes()), np.uint8)
    return decode(residuals.reshape(-1, 3, 32, 32))


def decode(residuals: np.ndarray) -> np.ndarray:
    """Return RGB uint8 [images, 3, rows, columns] from residuals of the same shape and type."""
    return np.concatenate([_decode(residuals[i : i + _CHUNK]) for i in range(0, len(residuals), _CHUNK)])


def _decode(residuals: np.ndarray) -> np.ndarray:
    count, _, rows, columns = residuals.shape
    steps = np.ascontiguousarray(residuals.transpose(2, 3, 1, 0))  # images last: each pixel is one vector operation
    # A border of zeros above and to the left makes the predictor right there without a special case.
    out = np.zeros((rows + 1, columns + 1, 3, count), np.int16)
    for y in range(rows):
        for x in range(columns):
            left, above, corner = out[y + 1, x], out[y, x + 1], out[y, x]
            low, high = np.minimum(left, above), np.maximum(left, above)
            guess = np.minimum(np.maximum(left + above - corner, low), high)
            out[y + 1, x + 1] = (steps[y, x] + guess) & 255
    green, red, blue = (out[1:, 1:, plane] for plane in range(3))
    colours = np.stack([red + green - 128, green, blue + green - 128])  # modulo 256 by the cast
    return np.ascontiguousarray(colours.astype(np.uint8).transpose(3, 0, 1, 2))


class _Python2Pickle:
    """Writes pickle protocol 2 as Python 2's cPickle did: short byte strings, memo numbers from 1."""

    def __init__(self) -> None:
        self.parts = [pickle.PROTO, b"\x02", pickle.EMPTY_DICT]
        self.num_remembered = 0
        self.remember()
        self.parts.append(pickle.MARK)

    def put(self, *parts: bytes) -> None:
        self.parts.extend(parts)

    def remember(self) -> None:
        self.num_remembered += 1
        number = self.num_remembered
        self.put(pickle.BINPUT + bytes([number]) if number < 256 else pickle.LONG_BINPUT + struct.pack("<I", number))

    def text(self, value: str, *, remember: bool = True) -> None:
        self.put(pickle.SHORT_BINSTRING, bytes([len(value)]), value.encode("ascii"))
        if remember:
            self.remember()

    def number(self, value: int) -> None:
        self.put(pickle.BININT1 + bytes([value]) if value < 256 else pickle.BININT2 + struct.pack("<H", value))

    def items(self, values: list[int] | list[str]) -> None:
        self.put(pickle.EMPTY_LIST)
        self.remember()
        for start in range(0, len(values), 1000):  # cPickle appends a thousand at a time
            self.put(pickle.MARK)
            for value in values[start : start + 1000]:
                self.text(value) if isinstance(value, str) else self.number(value)
            self.put(pickle.APPENDS)

    def name(self, module: str, name: str) -> None:
        self.put(pickle.GLOBAL, f"{module}\n{name}\n".encode("ascii"))
        self.remember()

    def array(self, values: np.ndarray) -> None:
        """Write a uint8 matrix: an empty array, then its state (version, shape, dtype, Fortran order, bytes)."""
        self.name("numpy.core.multiarray", "_reconstruct")
        self.name("numpy", "ndarray")
        self.number(0)
        self.put(pickle.TUPLE1)
        self.text("b", remember=False)
        self.put(pickle.TUPLE3, pickle.REDUCE)
        self.remember()
        self.put(pickle.MARK)
        self.number(1)
        for length in values.shape:
            self.number(length)
        self.put(pickle.TUPLE2)
        self._dtype()
        raw = values.tobytes()
        self.put(pickle.NEWFALSE, pickle.BINSTRING, struct.pack("<I", len(raw)), raw, pickle.TUPLE, pickle.BUILD)

    def _dtype(self) -> None:
        self.name("numpy", "dtype")
        self.text("u1", remember=False)
        self.number(0)
        self.number(1)
        self.put(pickle.TUPLE3, pickle.REDUCE)
        self.remember()
        self.put(pickle.MARK)
        self.number(3)
        self.text("|", remember=False)
        unset = pickle.BININT + struct.pack("<i", -1)
        self.put(pickle.NONE, pickle.NONE, pickle.NONE, unset, unset)
        self.number(0)
        self.put(pickle.TUPLE, pickle.BUILD)

    def finish(self) -> bytes:
        return b"".join([*self.parts, pickle.SETITEMS, pickle.STOP])


def _batch_bytes(name: str, images: np.ndarray, labels: list[int], files: list[str]) -> bytes:
    out = _Python2Pickle()
    out.text("batch_label")
    out.text("testing batch 1 of 1" if name == "test_batch" else f"training batch {name[-1]} of 5")
    out.text("labels")
    out.items(labels)
    out.text("data")
    out.array(images.reshape(len(images), -1))
    out.text("filenames")
    out.items(files)
    return out.finish()


def _meta_bytes() -> bytes:
    out = _Python2Pickle()
    out.text("num_cases_per_batch")
    out.number(10_000)
    out.text("label_names")
    out.items(list(CLASSES))
    out.text("num_vis")
    out.number(3_072)
    return out.finish()
