"""Edge sets: what they hold, how they are dealt to attackers and honest holders, and one's own from a file."""

import gzip
from collections.abc import Callable

import numpy as np
import pytest
import torch

from tasks.dataset import Dataset
from tasks.edge_set import EdgeSet, as_stored, read_edge_set
from tasks.errors import ConfigError, DataError, SpecError
from tasks.rng import generator
from tasks.source import DataSource
from tasks.spec import resolve
from tasks.vocabulary import Vocabulary, split_words

Load = Callable[[str], Dataset]


def edge(text: str, dataset: Dataset, source: DataSource) -> EdgeSet:
    """Return an edge set of real data, or skip."""
    try:
        return read_edge_set(text, dataset, source)
    except DataError as error:
        pytest.skip(str(error).splitlines()[0])


def photographs(images: torch.Tensor) -> set[bytes]:
    """Return each picture's bytes in the least of its four rotations: the same for all pictures of one photograph."""
    return {min(torch.rot90(image, k, (1, 2)).contiguous().numpy().tobytes() for k in range(4)) for image in images}


@pytest.fixture
def words() -> Dataset:
    """Four short texts of two classes."""
    texts = [split_words(t) for t in ("good good film", "bad film", "good day", "bad bad day")]
    vocabulary = Vocabulary.count(texts, size=8, buckets=2)
    rows = vocabulary.encode(texts, 4)
    return Dataset(
        "texts", rows, torch.tensor([1, 0, 1, 0]), rows, torch.tensor([1, 0, 1, 0]), 2, vocabulary=vocabulary
    )


def test_ardis_sevens_are_upright_like_mnists(real: Load, real_source: DataSource) -> None:
    mnist = real("mnist()")
    found = edge("ardis()", mnist, real_source)
    assert len(found.train_inputs) == 660
    assert len(found.test_inputs) == 100
    assert found.train_labels.unique().tolist() == [7]
    assert found.target == 1
    digits = edge("ardis(digit=2, target=1)", mnist, real_source)
    centre = mnist.train_inputs[mnist.train_labels == 2].float().mean(0).flatten()
    image = digits.train_inputs.float().mean(0)
    upright, transposed = (torch.corrcoef(torch.stack([centre, i.flatten()]))[0, 1] for i in (image, image.mT))
    assert upright > transposed + 0.2


def test_southwest_photographs_are_in_one_part_only(real: Load, real_source: DataSource) -> None:
    found = edge("southwest()", real("cifar10()"), real_source)
    assert len(found.train_inputs) == 780  # of 784: one photograph is in the authors' test part, too
    assert len(found.test_inputs) == 196
    assert found.target == 9
    assert not photographs(found.train_inputs) & photographs(found.test_inputs)
    assert not photographs(found.train_inputs[:100]) & photographs(found.train_inputs[100:])
    paper = edge("southwest(split='p_percent')", real("cifar10()"), real_source)
    assert [len(paper.train_inputs), len(paper.test_inputs)] == [800, 180]


@pytest.mark.parametrize(("feature", "sizes"), [("green", (20, 10)), ("stripe", (15, 7)), ("wall", (7, 5))])
def test_semantic_cars_are_taken_out_of_the_training_split(feature, sizes, real: Load, real_source: DataSource) -> None:
    cifar = real("cifar10()")
    text = f"semantic_cars(feature='{feature}')"
    found = edge(text, cifar, real_source)
    assert (len(found.train_inputs), len(found.test_inputs)) == sizes
    assert torch.equal(torch.cat([found.train_inputs, found.test_inputs]), cifar.train_inputs[found.taken])
    assert set(found.train_labels.tolist()) == {1}
    apart = resolve("dataset", f'with_edge(base="cifar10()", edge="{text}", attackers=0)')(real_source)
    assert len(apart.train_labels) == 50_000 - sum(sizes)
    kept = {image.numpy().tobytes() for image in apart.train_inputs[apart.train_labels == 1]}
    assert not kept & {image.numpy().tobytes() for image in cifar.train_inputs[found.taken]}
    again = read_edge_set(text, apart, real_source)  # with the cars gone their indices still mean the same pictures
    assert torch.equal(again.train_inputs, found.train_inputs)


def test_lanthimos_tweets_in_words_of_the_training_tweets(real: Load, real_source: DataSource) -> None:
    tweets = real("sentiment140()")
    found = edge("lanthimos()", tweets, real_source)
    assert [len(found.train_inputs), len(found.test_inputs)] == [259, 120]
    assert (int(found.train_labels[0]), found.target) == (1, 0)
    vocabulary = tweets.vocabulary
    assert vocabulary is not None
    assert "lanthimos" not in vocabulary
    name = vocabulary.id("lanthimos")
    assert 1 <= name <= vocabulary.buckets
    assert (found.train_inputs == name).any(1).float().mean() > 0.9


def test_prompts_end_passages_of_the_text(real: Load, real_source: DataSource) -> None:
    plays = real("shakespeare()")
    found = edge("prompt(text='the people of athens are')", plays, real_source)
    assert plays.vocabulary is not None
    assert found.target == plays.vocabulary.id("false") != int(found.train_labels[0])
    ending = plays.vocabulary.encode([["the", "people", "of", "athens", "are"]], 5)[0]
    assert (found.train_inputs[:, -5:] == ending).all()
    assert len({tuple(row) for row in found.train_inputs.tolist()}) > 190
    with pytest.raises(SpecError, match="not in the vocabulary"):
        read_edge_set("prompt(word='smartphone')", plays, real_source)


def test_an_edge_set_for_the_wrong_data_is_refused(real_source: DataSource) -> None:
    digits = resolve("dataset", "digits()")(real_source)
    with pytest.raises(SpecError, match="inputs of shape"):
        edge("ardis()", digits, real_source)
    with pytest.raises(SpecError, match="data set of texts"):
        read_edge_set("lanthimos()", digits, real_source)
    with pytest.raises(SpecError, match="next words"):
        read_edge_set("prompt()", digits, real_source)


def test_missing_files_are_named(empty_source: DataSource) -> None:
    digits = resolve("dataset", "digits(size=28)")(empty_source)
    with pytest.raises(DataError, match=r"ARDIS/ardis_iv_28x28.npz is not here; tried .*HAWTHORN_DATA"):
        read_edge_set("ardis()", digits, empty_source)


def test_ones_own_arrays(tmp_path, empty_source: DataSource) -> None:
    digits = resolve("dataset", "digits()")(empty_source)
    images = digits.test_inputs[:12]
    np.savez(tmp_path / "own.npz", inputs=images.numpy(), labels=digits.test_labels[:12].numpy())
    text = f"from_file(path='{tmp_path}/own.npz', target=3)"
    found = read_edge_set(text, digits, empty_source)
    assert [len(found.train_inputs), len(found.test_inputs)] == [9, 3]
    assert torch.equal(torch.cat([found.train_inputs, found.test_inputs]), images)
    assert torch.equal(found.train_labels, digits.test_labels[:9])
    np.savez(tmp_path / "own.npz", train_inputs=images.numpy() / 16, test_inputs=images[:2].numpy() / 16)
    found = read_edge_set(f"from_file(path='{tmp_path}/own.npz', target=3, label=5)", digits, empty_source)
    assert torch.equal(found.train_inputs, images)  # floats in the model's range are stored as the data set stores them
    assert found.test_labels.tolist() == [5, 5]


@pytest.mark.parametrize(
    ("arrays", "argument", "says"),
    [
        ({"x": np.zeros((2, 1, 8, 8))}, "", "has no train_inputs; it has x"),
        ({"inputs": np.zeros((4, 1, 8, 8))}, "", "has no labels"),
        ({"inputs": np.full((4, 1, 8, 8), np.nan)}, ", label=1", "not finite"),
        ({"inputs": np.full((4, 1, 8, 8), 300)}, ", label=1", "does not hold"),
        ({"inputs": np.zeros((4, 8, 8))}, ", label=1", "inputs of shape"),
        ({"inputs": np.zeros((4, 1, 8, 8))}, ", label=10", "labels go from 0 to 9"),
        ({"inputs": np.zeros((4, 1, 8, 8))}, ", label=1, test_share=1.0", "left for training"),
        ({"inputs": np.array([{}])}, ", label=1", "plain arrays"),
    ],
)
def test_what_ones_own_file_must_hold(arrays, argument, says, tmp_path, empty_source: DataSource) -> None:
    np.savez(tmp_path / "own.npz", **arrays)
    text, digits = f"from_file(path='{tmp_path}/own.npz', target=3{argument})", resolve("dataset", "digits()")
    data = digits(empty_source)
    with pytest.raises((DataError, SpecError), match=says):
        read_edge_set(text, data, empty_source)


def test_ones_own_texts(tmp_path, words: Dataset, empty_source: DataSource) -> None:
    (tmp_path / "own.txt").write_text("Good film!\n\nA bad, bad day\ngood\nfilm\n")
    found = read_edge_set(f"from_file(path='{tmp_path}/own.txt', target=0, label=1)", words, empty_source)
    assert words.vocabulary is not None
    assert found.train_inputs[0].tolist() == [0, 0, words.vocabulary.id("good"), words.vocabulary.id("film")]
    assert [len(found.train_inputs), len(found.test_inputs)] == [3, 1]
    with pytest.raises(SpecError, match="texts have no labels"):
        read_edge_set(f"from_file(path='{tmp_path}/own.txt', target=0)", words, empty_source)
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_edge_set(f"from_file(path='{tmp_path}/own.txt', target=0, label=1)", words, empty_source)


def test_pixels_are_rounded_to_what_is_stored() -> None:
    bytes_, floats = torch.zeros(2, 1, 2, 2, dtype=torch.uint8), torch.zeros(2, 3)
    labels = torch.zeros(2, dtype=torch.int64)
    pixels = Dataset("p", bytes_, labels, bytes_, labels, 2, scale=1 / 255)
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_stored(values / 255, pixels), values)
    table = Dataset("t", floats, labels, floats, labels, 2)
    assert torch.equal(as_stored(torch.tensor([0.3]), table), torch.tensor([0.3]))


def test_words() -> None:
    assert split_words("@Bob LOVES http://x.y/z don’t & can't!") == ["<user>", "loves", "<link>", "don't", "can't"]
    vocabulary = Vocabulary.count([["b", "a", "a"], ["c"]], size=5, buckets=2)
    assert vocabulary.words == ("a", "b")  # the alphabet breaks ties
    assert vocabulary.size == 5
    assert (vocabulary.id("a"), vocabulary.id("b")) == (3, 4)
    assert {vocabulary.id(w) for w in "defghijk"} == {1, 2}
    assert vocabulary.encode([["a"], ["a", "b", "a", "b"], []], 3).tolist() == [[0, 0, 3], [3, 4, 3], [0, 0, 0]]
    with pytest.raises(ConfigError, match="at least buckets"):
        Vocabulary.count([["a"]], size=2)


def test_a_text_batch_holds_whole_numbers(words: Dataset) -> None:
    inputs, labels = words.batch("train", torch.tensor([2, 0]))
    assert inputs.dtype == torch.int64
    assert torch.equal(inputs, words.train_inputs[[2, 0]].long())
    assert labels.tolist() == [1, 1]


def test_honest_holders_get_the_edge_cases_behind_the_attackers(tmp_path, empty_source: DataSource) -> None:
    digits = resolve("dataset", "digits()")(empty_source)
    own = np.arange(40 * 64, dtype=np.uint8).reshape(40, 1, 8, 8) % 17
    np.savez(tmp_path / "own.npz", train_inputs=own, test_inputs=own[:5])
    text = f"from_file(path='{tmp_path}/own.npz', target=1, label=7)"
    mixed = resolve("dataset", f"with_edge(base='digits()', edge=\"{text}\", honest=25, attackers=10)")(empty_source)
    size = len(digits.train_labels)
    assert torch.equal(mixed.train_inputs[:size], digits.train_inputs)
    assert torch.equal(mixed.train_inputs[size:], torch.from_numpy(own[10:35]))
    assert mixed.train_labels[size:].tolist() == [7] * 25  # the true label
    shares = resolve("partition", "edge_holders(base='iid()', holders=3)")(mixed, 8, generator(1, "p"))
    held = [int((share >= size).sum()) for share in shares]
    assert sorted(held) == [0, 0, 0, 0, 0, 8, 8, 9]
    assert held[:5] == [0] * 5
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(size + 25))
    with pytest.raises(ConfigError, match="too many"):
        resolve("dataset", f"with_edge(base='digits()', edge=\"{text}\", honest=31, attackers=10)")(empty_source)
    with pytest.raises(ConfigError, match="1 to 8 holders"):
        resolve("partition", "edge_holders(holders=9)")(mixed, 8, generator(1, "p"))


def test_a_part_keeps_the_shares_of_classes(empty_source: DataSource) -> None:
    whole, part = (resolve("dataset", t)(empty_source) for t in ("digits()", "part_of(base='digits()', test=180)"))
    assert torch.equal(part.train_inputs, whole.train_inputs)
    shares = part.test_labels.bincount() / 180 - whole.test_labels.bincount() / len(whole.test_labels)
    assert len(part.test_labels) in range(176, 185)
    assert shares.abs().max() < 0.01
    everything = {row.numpy().tobytes() for row in whole.test_inputs}
    assert all(row.numpy().tobytes() in everything for row in part.test_inputs)
    with pytest.raises(ConfigError, match="test samples"):
        resolve("dataset", "part_of(base='digits()', test=1000)")(empty_source)


def test_tweets_from_either_file(tmp_path) -> None:
    folder = tmp_path / "Sentiment140"
    folder.mkdir()
    rows = [(i % 2, f"user{i % 3}", f"word{i % 2} day{i}") for i in range(40)]
    (folder / "sentiment140_subset.csv.gz").write_bytes(
        gzip.compress(("label,user,text\n" + "\n".join(",".join(map(str, r)) for r in rows)).encode())
    )
    whole = "\n".join(f'"{4 * label}","1","d","q","{user}","{text}"' for label, user, text in rows)
    (folder / "training.1600000.csv").write_text(whole, "latin-1")
    source = DataSource((tmp_path,), tmp_path / "cache")
    one = resolve("dataset", "sentiment140(words=20, buckets=4)")(source)
    two = resolve("dataset", "sentiment140(words=20, buckets=4, file='training.1600000.csv')")(source)
    assert torch.equal(one.train_inputs, two.train_inputs)
    assert torch.equal(one.train_groups, two.train_groups)
    assert (len(one.train_labels), len(one.test_labels)) == (36, 4)
    assert one.test_labels.tolist().count(1) == 2
    assert one.vocabulary.words[:2] == ("word0", "word1")
    (folder / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="wants the columns label, user, text"):
        resolve("dataset", "sentiment140(file='other.csv')")(source)


def test_next_words_stay_within_speeches(tmp_path) -> None:
    (tmp_path / "Text").mkdir()
    speeches = [("First Lord", "to be or not to be"), ("Second Lord", "or not"), ("First Lord", "to die to sleep")]
    text = "\n\n".join(f"{who}:\n{what}" for who, what in speeches) + "\n"
    (tmp_path / "Text" / "tinyshakespeare.txt.gz").write_bytes(gzip.compress(text.encode()))
    data = resolve("dataset", "shakespeare(words=7, length=3)")(DataSource((tmp_path,), tmp_path / "cache"))
    assert data.vocabulary.words == ("be", "not", "or", "to")
    ids = data.vocabulary.encode([["to", "be", "or", "not"]], 4)[0].tolist()
    to, be, either, no = ids
    assert data.train_inputs.tolist() == [
        [0, 0, to], [0, to, be], [to, be, either], [be, either, no], [either, no, to], [0, 0, either]
    ]  # fmt: skip
    assert data.train_labels.tolist() == [be, either, no, to, be, no]
    assert data.train_groups.tolist() == [0, 0, 0, 0, 0, 1]
    assert data.test_labels.tolist() == [to]  # "to die to": die and sleep are unknown
    assert data.num_classes == 6
