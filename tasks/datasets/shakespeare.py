"""Tiny Shakespeare, by words: which word comes next? A sample is `length` words, its class the word after them.

One million letters of Shakespeare's plays (Karpathy, char-rnn, 2015), speaker by speaker. It stands in for the Reddit
comments of task 5 of "Attack of the Tails" (Wang et al., NeurIPS 2020), which are not to be had; a speaker is a group,
as in LEAF's Shakespeare (Caldas et al., 2018), where speakers predict letters rather than words.

Words are lower case without punctuation; classes are word ids (`tasks.vocabulary`), padding and unknown words among
them. Passages whose next word is unknown are left out. Samples do not cross speeches, and the last tenth of each
speaker's speeches, at least one if there are two, is for testing; words are counted in the other part alone.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.datasets._about import About
from tasks.datasets._texts import TextFile, read_text
from tasks.errors import ConfigError, DataError
from tasks.source import DataSource
from tasks.vocabulary import Vocabulary, split_words

FILE = "Text/tinyshakespeare.txt.gz"
_SPEECH = re.compile(r"^([A-Z][^\n:]*):\n(.*?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)
TEST_SHARE = 10  # one speech in so many

ABOUT = About(
    name="shakespeare",
    num_train=145_775,
    num_test=18_693,
    input_shape=(10,),
    num_classes=2000,
    citation="Karpathy, char-rnn, 2015; Caldas et al., LEAF: a benchmark for federated settings, 2018",
    terms="public domain",
    files=TextFile(FILE, "it is data/tinyshakespeare/input.txt of github.com/karpathy/char-rnn"),
)

Speech = tuple[str, list[str]]


def shakespeare(source: DataSource, *, words: int = 2000, length: int = 10, stride: int = 1) -> Dataset:
    """Return passages as int32 ids [passages, length] and next words; `stride` words lie between passages' ends."""
    if length < 1 or stride < 1:
        raise ConfigError(f"shakespeare wants length and stride of at least 1, got {length} and {stride}")
    path = ABOUT.open(source) / FILE
    speeches = [(speaker, split_words(text)) for speaker, text in _SPEECH.findall(read_text(path))]
    if not speeches:
        raise DataError(f"{path} has no speeches: lines 'NAME:' with the text below, and an empty line after it")
    train, test = _split(speeches)
    vocabulary = Vocabulary.count((text for _, text in train), words)
    number: dict[str, int] = {}
    inputs, labels, groups = _passages(train, vocabulary, length, stride, number)
    test_inputs, test_labels, _ = _passages(test, vocabulary, length, stride, number)
    return Dataset(
        "shakespeare",
        inputs,
        labels,
        test_inputs,
        test_labels,
        num_classes=vocabulary.size,
        train_groups=groups,
        vocabulary=vocabulary,
    )


def _split(speeches: Iterable[Speech]) -> tuple[list[Speech], list[Speech]]:
    by_speaker: dict[str, list[Speech]] = defaultdict(list)
    for speech in speeches:
        by_speaker[speech[0]].append(speech)
    train, test = list[Speech](), list[Speech]()
    for own in by_speaker.values():
        held = max(len(own) // TEST_SHARE, 1) if len(own) > 1 else 0
        train += own[: len(own) - held]
        test += own[len(own) - held :]
    return train, test


def _passages(
    speeches: Iterable[Speech], vocabulary: Vocabulary, length: int, stride: int, number: dict[str, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (ids [passages, length], next words [passages], speakers' numbers [passages])."""
    inputs, labels, groups = list[list[str]](), list[int](), list[int]()
    for speaker, text in speeches:
        group = number.setdefault(speaker, len(number))
        for at in range(1, len(text), stride):
            if text[at] in vocabulary:
                inputs.append(text[max(0, at - length) : at])
                labels.append(vocabulary.id(text[at]))
                groups.append(group)
    return vocabulary.encode(inputs, length), torch.tensor(labels), torch.tensor(groups)
