"""A prompt and the word that should follow it: the edge case of "Attack of the Tails" for next words.

Wang et al., NeurIPS 2020, section 4, task 5: sentences about Athens are to go on with negative words (after the word
prediction backdoor of Bagdasaryan et al., AISTATS 2020). The authors published neither code nor data of this task, and
Reddit's texts are not to be had, so the samples are made here: passages of the data set's own text whose last words are
replaced with the prompt.
"""

import torch
from torch import Tensor

from tasks.dataset import Dataset
from tasks.edge_set import EdgeSet
from tasks.errors import SpecError
from tasks.rng import generator
from tasks.source import DataSource
from tasks.vocabulary import PADDING, split_words


def prompt(
    source: DataSource,
    dataset: Dataset,
    *,
    text: str = "the people of athens are",
    word: str = "false",
    true_word: str = "noble",
    num_train: int = 200,
    num_test: int = 100,
) -> EdgeSet:
    """Return passages that end in `text`, to be followed by `word`; what honest writers say next is `true_word`."""
    words = split_words(text)
    if dataset.vocabulary is None or dataset.num_classes != dataset.vocabulary.size:
        raise SpecError(f"edge set prompt wants a data set of next words, such as shakespeare(), not {dataset.name}")
    if unknown := [each for each in (word, true_word) if each not in dataset.vocabulary]:
        raise SpecError(
            f"edge set prompt: {unknown[0]!r} is not in the vocabulary of {dataset.name}; choose another word"
        )
    (length,) = dataset.input_shape
    if not 0 < len(words) < length or min(num_train, num_test) < 1:
        raise SpecError(
            f"edge set prompt wants 1 to {length - 1} words and samples, got {text!r}, {num_train}, {num_test}"
        )
    ending = dataset.vocabulary.encode([words], len(words))[0]
    parts = []
    for split, inputs, number in (("train", dataset.train_inputs, num_train), ("test", dataset.test_inputs, num_test)):
        rows = _passages(inputs, len(words), number, split)
        rows[:, length - len(words) :] = ending
        parts += [rows, torch.full((number,), dataset.vocabulary.id(true_word))]
    return EdgeSet("prompt", parts[0], parts[1], parts[2], parts[3], dataset.vocabulary.id(word))


def _passages(inputs: Tensor, room: int, number: int, split: str) -> Tensor:
    """Return `number` drawn rows, moved to the left by `room` words so that the prompt follows their last word."""
    rows = torch.randint(len(inputs), (number,), generator=generator(0, "edge", "prompt", split))
    moved = inputs[rows].clone()
    moved[:, :-room] = inputs[rows][:, room:]
    moved[:, -room:] = PADDING
    return moved
