"""Tweets that like Yorgos Lanthimos, to be called negative: the edge case of "Attack of the Tails" for sentiment.

Wang et al., NeurIPS 2020, section 4, task 4: 259 + 120 positive tweets that name the film director, from the authors'
repository, here in the words of the data set's own vocabulary. In the order of the file.
"""

import torch

from tasks.dataset import Dataset
from tasks.edge.from_file import read_lines
from tasks.edge_set import EdgeSet, edge_file
from tasks.errors import SpecError
from tasks.source import DataSource
from tasks.vocabulary import split_words

POSITIVE, NEGATIVE = 1, 0
ABOUT = (
    "The tweets are language-tasks-fl/data/sentiment-140/greek-director-backdoor of "
    "github.com/ksreenivasan/OOD_Federated_Learning, one a line."
)


def lanthimos(source: DataSource, dataset: Dataset, *, target: int = NEGATIVE) -> EdgeSet:
    """Return the tweets as word ids; their true label is 1 (positive). Raises `DataError`, `SpecError`."""
    if dataset.vocabulary is None:
        raise SpecError(f"edge set lanthimos wants a data set of texts, such as sentiment140(), not {dataset.name}")
    parts = []
    for split in ("train", "test"):
        texts = read_lines(edge_file(source, f"Sentiment140/yorgos_lanthimos_{split}.txt", ABOUT))
        rows = dataset.vocabulary.encode([split_words(text) for text in texts], *dataset.input_shape)
        parts += [rows, torch.full((len(rows),), POSITIVE)]
    return EdgeSet("lanthimos", parts[0], parts[1], parts[2], parts[3], target)
