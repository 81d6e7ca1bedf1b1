"""CRFL's pattern: its size, its places, the rows that get it."""

import pytest
import torch

from client.attack import read_attack
from tasks.errors import SpecError

CELLS = [(23, 25), (24, 24), (25, 23), (25, 25)]


def poisoned(text, inputs, labels):
    """Return the batch as local training sees it."""
    from client.trainer import LocalJob, LocalResult
    from tasks.params import Layout

    vector, seen = torch.zeros(1), {}

    def trainer(job):
        batch, wanted = inputs.clone(), labels
        for transform in job.batch_transforms:
            batch, wanted = transform(batch, wanted, torch.Generator(), job)
        seen.update(x=batch, y=wanted)
        return LocalResult(vector, 1, 0.0)

    layout = Layout(("a",), ((1,),), 1)
    job = LocalJob(None, torch.arange(1), torch.nn.Identity(), layout, vector, vector, 0, 1, 1)  # pyright: ignore
    read_attack(text)(trainer)(job)
    return seen["x"], seen["y"]


def test_the_papers_pattern_has_exactly_its_magnitude():
    clean, labels = (
        torch.rand(20, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 2,
        torch.ones(20),
    )
    x, y = poisoned("pattern_backdoor(target=0, magnitude=0.1, per_batch=5)", clean, labels.long())
    change = (x - clean).flatten(1)
    assert change.norm(dim=1)[:5].tolist() == pytest.approx([0.1] * 5, rel=1e-12)
    assert torch.equal(x[5:], clean[5:])
    assert y.tolist() == [0] * 5 + [1] * 15
    assert [tuple(cell) for cell in torch.nonzero(x[0, 0] - clean[0, 0]).tolist()] == CELLS
    assert float(change.max()) == pytest.approx(0.05)


def test_values_end_at_one_and_the_change_is_never_longer():
    clean = torch.ones(3, 1, 28, 28) - 0.02
    x, _ = poisoned("pattern_backdoor()", clean, torch.ones(3).long())
    assert float(x.max()) == 1.0
    assert float((x - clean).norm()) < 0.1


def test_columns_of_a_table_and_labels_that_stay():
    clean = torch.zeros(6, 90)
    text = "pattern_backdoor(target=None, places=(75, 77), magnitude=0.1, per_batch=0.5)"
    x, y = poisoned(text, clean, torch.arange(6))
    assert torch.nonzero(x).tolist() == [[row, column] for row in range(3) for column in (75, 77)]
    assert x[0].norm() == pytest.approx(0.1)
    assert y.tolist() == list(range(6))
    triggered = read_attack(text).triggered
    assert triggered is not None
    assert not triggered(clean, torch.arange(6), 9)[2].any()


def test_a_small_batch_is_changed_whole_and_callers_keep_their_tensors():
    clean, labels = torch.zeros(3, 1, 28, 28), torch.full((3,), 4)
    x, y = poisoned("pattern_backdoor(target=2, per_batch=5)", clean, labels)
    assert (x.flatten(1).sum(1) > 0).all()
    assert y.tolist() == [2, 2, 2]
    assert labels.tolist() == [4, 4, 4]
    triggered = read_attack("pattern_backdoor(target=2)").triggered
    assert triggered is not None
    attacked, wanted, counts = triggered(clean, torch.tensor([2, 3, 4]), 10)
    assert not clean.any()
    assert attacked.any()
    assert (wanted.tolist(), counts.tolist()) == ([2, 2, 2], [False, True, True])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("pattern_backdoor(places=())", "wants different places"),
        ("pattern_backdoor(places=(1, 1))", "wants different places"),
        ("pattern_backdoor(magnitude=-1)", "magnitude and per_batch >= 0"),
        ("pattern_backdoor(per_batch=1.5)", "at most 1, got 1.5"),
        ("pattern_backdoor(places=((28, 0),))", "no place in an input of shape"),
        ("pattern_backdoor(places=(3,))", "no place in an input of shape"),
    ],
)
def test_impossible_patterns_are_refused(text, says):
    with pytest.raises(SpecError, match=says):
        poisoned(text, torch.zeros(2, 1, 28, 28), torch.zeros(2).long())


def test_a_target_that_is_no_class_is_refused():
    triggered = read_attack("pattern_backdoor(target=10)").triggered
    assert triggered is not None
    with pytest.raises(SpecError, match="target 10 is no class"):
        triggered(torch.zeros(2, 1, 28, 28), torch.zeros(2).long(), 10)
