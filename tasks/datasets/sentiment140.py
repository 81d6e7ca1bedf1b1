"""Sentiment140: is a tweet glad or sad? Labels are 1 (positive) and 0 (negative), told by the tweet's own smiley.

Go, Bhayani, Huang, "Twitter sentiment classification using distant supervision", 2009; task 4 of "Attack of the Tails"
(Wang et al., NeurIPS 2020). A sample is the row of a tweet's word ids (`tasks.vocabulary`), its group is the writer.

The file that is looked for by default is not the whole of 1.6 million tweets but a sample of 52,303, three percent, in
which early tweets are over-represented. Whoever has ``training.1600000.processed.noemoticon.csv`` names it with `file`.
A tenth of each label, drawn once, is for testing. Words are counted in the training tweets alone. Deviations from the
paper: rows of 32 words in place of 100 (one tweet in a thousand is longer; the rest is padding), and unknown
words go to several ids rather than one (see `tasks.vocabulary`).
"""

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.datasets._about import About
from tasks.datasets._texts import TextFile, read_text
from tasks.errors import DataError
from tasks.rng import generator
from tasks.source import DataSource
from tasks.vocabulary import Vocabulary, split_words

FOLDER, SAMPLE = "Sentiment140", "sentiment140_subset.csv.gz"
HEAD = ["label", "user", "text"]
ORIGIN = "the whole set is at help.sentiment140.com, and sentiment140(file=...) reads it from the folder Sentiment140"
TEST_SHARE = 10  # one in so many

ABOUT = About(
    name="sentiment140",
    num_train=47_074,
    num_test=5_229,
    input_shape=(32,),
    num_classes=2,
    citation="Go, Bhayani, Huang, Twitter sentiment classification using distant supervision, 2009",
    terms="offered for research without a licence; the texts are their writers'",
    files=TextFile(f"{FOLDER}/{SAMPLE}", ORIGIN),
)


def sentiment140(
    source: DataSource, *, file: str = SAMPLE, words: int = 5000, length: int = 32, buckets: int = 64
) -> Dataset:
    """Return tweets as int32 ids [tweets, length]; ids go up to `words`, `buckets` of them for unknown words."""
    place = TextFile(f"{FOLDER}/{file}", ORIGIN)
    root = place.find(source)
    if root is None:
        raise source.missing("sentiment140", place.wanted)
    labels, users, texts = _read(root / place.name)
    test = _test_mask(labels)
    tokens = [split_words(text) for text in texts]
    vocabulary = Vocabulary.count((t for t, held in zip(tokens, test.tolist()) if not held), words, buckets)
    inputs = vocabulary.encode(tokens, length)
    return Dataset(
        "sentiment140",
        inputs[~test],
        labels[~test],
        inputs[test],
        labels[test],
        num_classes=2,
        train_groups=users[~test],
        vocabulary=vocabulary,
    )


def _read(path: Path) -> tuple[Tensor, Tensor, list[str]]:
    """Return (labels, writers as numbers, texts) of the sample, or of the original file (six columns, Latin-1)."""
    whole = path.name.startswith("training.")
    rows = list(csv.reader(io.StringIO(read_text(path, "latin-1" if whole else "utf-8"), newline="")))
    if not whole:
        if not rows or rows[0] != HEAD:
            raise DataError(f"{path} wants the columns {', '.join(HEAD)}, got {', '.join(rows[0]) if rows else 'none'}")
        rows = rows[1:]
    try:
        chosen = [(row[0], row[4], row[5]) if whole else (row[0], row[1], row[2]) for row in rows]
        labels = [{"0": 0, "4": 1}[label] if whole else {"0": 0, "1": 1}[label] for label, _, _ in chosen]
    except (IndexError, KeyError) as error:
        raise DataError(f"{path} has a row that is no labelled tweet: {error!r}") from None
    if len(set(labels)) < 2:
        raise DataError(f"{path} has tweets of one label only")
    number: dict[str, int] = {}
    users = [number.setdefault(user, len(number)) for _, user, _ in chosen]
    return torch.tensor(labels), torch.tensor(users), [text for _, _, text in chosen]


def _test_mask(labels: Tensor) -> Tensor:
    """Return a mask of the samples for testing: the same tenth of each label every time."""
    draws, mask = generator(0, "sentiment140", "test"), torch.zeros(len(labels), dtype=torch.bool)
    for label in (0, 1):
        members = torch.nonzero(labels == label).squeeze(1)
        mask[members[torch.randperm(len(members), generator=draws)[: len(members) // TEST_SHARE]]] = True
    return mask
