"""Words as numbers: a vocabulary counted in training texts, and texts as rows of word ids.

Id 0 is padding, ids 1 to `buckets` stand for words that are not in the vocabulary, the others are the most frequent
words. With more than one bucket an unknown word is hashed, so that two of them can be told apart: the names in an edge
case are, as a rule, words that the training texts do not have.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tasks.errors import ConfigError

PADDING = 0
_WORD = re.compile(r"https?://\S+|www\.\S+|@\w+|[^\W_]+(?:'[^\W_]+)*")


def split_words(text: str) -> list[str]:
    """Return the lower-case words of a text; links become ``<link>``, mentions ``<user>``, punctuation goes."""
    return [_plain(word) for word in _WORD.findall(text.lower().replace("’", "'"))]


def _plain(word: str) -> str:
    if word.startswith(("http://", "https://", "www.")):
        return "<link>"
    return "<user>" if word.startswith("@") else word


@dataclass(frozen=True)
class Vocabulary:
    """The ids of words; `size` ids in all."""

    words: tuple[str, ...]  # the known ones, the most frequent first
    buckets: int = 1
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", {word: 1 + self.buckets + i for i, word in enumerate(self.words)})

    @staticmethod
    def count(texts: Iterable[Sequence[str]], size: int, buckets: int = 1) -> "Vocabulary":
        """Return the vocabulary of `size` ids from texts that are split into words; ties are broken by the alphabet."""
        if buckets < 1 or size < buckets + 2:
            raise ConfigError(f"a vocabulary wants buckets >= 1 and at least buckets + 2 ids, got {buckets} and {size}")
        counts = Counter(word for text in texts for word in text)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return Vocabulary(tuple(ranked[: size - 1 - buckets]), buckets)

    @property
    def size(self) -> int:
        """Number of ids, padding and buckets included."""
        return 1 + self.buckets + len(self.words)

    def __contains__(self, word: str) -> bool:
        return word in self._ids

    def id(self, word: str) -> int:
        """Return a word's id; an unknown word's is its bucket, by its CRC-32."""
        known = self._ids.get(word)
        return 1 + zlib.crc32(word.encode()) % self.buckets if known is None else known

    def encode(self, texts: Sequence[Sequence[str]], length: int) -> Tensor:
        """Return int32 ids ``[texts, length]``: the first `length` words, padded on the left."""
        rows = torch.zeros(len(texts), length, dtype=torch.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.id(word) for word in text[:length]]
            if ids:
                row[length - len(ids) :] = torch.tensor(ids, dtype=torch.int32)
        return rows
