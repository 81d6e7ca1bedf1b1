"""Attacks: where triggers land, what gets relabelled, what is sent."""

import dataclasses

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from client.attack import read_attack
from client.trainer import LocalJob, LocalResult
from tasks.dataset import Dataset
from tasks.errors import SpecError
from tasks.params import Layout
from tasks.wire import to_record


def job(rank: int = 0, num_attackers: int = 4) -> LocalJob:
    images, labels = torch.zeros(50, 1, 28, 28), torch.arange(50) % 10
    data = Dataset("made", images, labels, images, labels, 10)
    start = torch.arange(6.0)
    return LocalJob(
        data, torch.arange(50), torch.nn.Identity(), Layout(("a", "b"), ((2, 2), (2,)), 6), start, start.clone(),
        client=7, round=3, seed=1, rank=rank, num_attackers=num_attackers,
    )  # fmt: skip


def run_batch(text: str, work: LocalJob, inputs=None, labels=None):
    """Return what the innermost trainer is given, after its batch transforms ran on one batch."""
    seen = {}

    def trainer(inner: LocalJob) -> LocalResult:
        x, y = (
            (torch.zeros(64, 1, 28, 28) if inputs is None else inputs),
            (torch.arange(64) % 10 if labels is None else labels),
        )
        for transform in inner.batch_transforms:
            x, y = transform(x, y, torch.Generator(), inner)
        seen.update(x=x, y=y, job=inner)
        return LocalResult(inner.start + 1, 50, 0.0)

    seen["result"] = read_attack(text)(trainer)(work)
    return seen


DBA = {0: (0, 0), 1: (0, 6), 2: (3, 0), 3: (3, 6)}  # row, first of 4 columns


@pytest.mark.parametrize("rank", range(4))
def test_dba_local_triggers_are_the_papers_cells(rank):
    x = run_batch("patch_backdoor()", job(rank))["x"]
    row, column = DBA[rank]
    assert torch.nonzero(x[0, 0]).tolist() == [[row, c] for c in range(column, column + 4)]


def test_global_trigger_is_the_union():
    attack = read_attack("patch_backdoor()")
    x, wanted, counts = attack.triggered(torch.zeros(20, 1, 28, 28), torch.arange(20) % 10, 10)
    cells = {(r, c + i) for r, c in DBA.values() for i in range(4)}
    assert {tuple(cell) for cell in torch.nonzero(x[5, 0]).tolist()} == cells
    assert wanted.unique().tolist() == [2]
    assert counts.tolist() == [label != 2 for label in (torch.arange(20) % 10).tolist()]


def test_cifar_trigger_and_single_attacker():
    x = run_batch("patch_backdoor(size=(1, 6), gap=3)", job(0, 1), torch.zeros(64, 3, 32, 32))["x"]
    cells = {(r, c + i) for r, c in [(0, 0), (0, 9), (4, 0), (4, 9)] for i in range(6)}
    for channel in range(3):
        assert {tuple(cell) for cell in torch.nonzero(x[0, channel]).tolist()} == cells


def test_badnets_corner_patch():
    x = run_batch("patch_backdoor(grid=(1, 1), size=(3, 3), position=(-3, -3), value=0.5)", job())["x"]
    assert torch.nonzero(x[0, 0]).tolist() == [[r, c] for r in (25, 26, 27) for c in (25, 26, 27)]
    assert x.max() == 0.5


def test_a_negative_position_counts_from_the_far_edge_for_the_first_patch():
    attack = read_attack("patch_backdoor(size=(1, 2), gap=(1, 0), position=(-3, -6))")
    found, _, _ = attack.triggered(torch.zeros(1, 1, 28, 28), torch.tensor([1]), 10)
    cells = {(row, column) for row in (25, 27) for column in (22, 23, 24, 25)}
    assert {tuple(cell) for cell in torch.nonzero(found[0, 0]).tolist()} == cells


def test_only_the_first_of_each_batch_are_poisoned():
    labels = torch.arange(64) % 10
    seen = run_batch("patch_backdoor(per_batch=20)", job(), labels=labels)
    assert (seen["x"].flatten(1).sum(1) > 0).sum() == 20
    assert seen["y"][:20].tolist() == [2] * 20
    assert torch.equal(seen["y"][20:], labels[20:])
    assert torch.equal(labels, torch.arange(64) % 10)  # the caller's labels are not changed
    assert (run_batch("patch_backdoor(per_batch=0.5)", job())["y"] == 2).sum() >= 32


def test_label_flip():
    assert run_batch("label_flip()", job())["y"].tolist() == (9 - torch.arange(64) % 10).tolist()
    seen = run_batch("label_flip(source=1, target=7)", job())["y"]
    assert torch.equal(seen, torch.where(torch.arange(64) % 10 == 1, 7, torch.arange(64) % 10))
    _, wanted, counts = read_attack("label_flip(source=1, target=7)").triggered(
        torch.zeros(10, 1), torch.arange(10), 10
    )
    assert counts.tolist() == [i == 1 for i in range(10)]
    assert wanted[1] == 7


def test_updates_are_changed_relative_to_the_global_model():
    start = torch.arange(6.0)
    assert torch.equal(run_batch("scale_update(factor=100.0)", job())["result"].vector, start + 100)
    assert torch.equal(run_batch("sign_flip(factor=2.0)", job())["result"].vector, start - 2)
    noise = run_batch("gaussian_noise(std=3.0)", job())["result"].vector - start
    assert torch.equal(noise, run_batch("gaussian_noise(std=3.0)", job())["result"].vector - start)
    other = dataclasses.replace(job(), client=8)
    assert not torch.equal(noise, run_batch("gaussian_noise(std=3.0)", other)["result"].vector - start)


def test_order_of_a_chain():
    start = torch.arange(6.0)
    assert torch.equal(run_batch("sign_flip() | scale_update(factor=3)", job())["result"].vector, start - 3)
    stamped_after = run_batch("label_flip(target=1) | patch_backdoor(target=5, per_batch=4)", job())["y"]
    assert stamped_after.tolist() == [5] * 4 + [1] * 60
    stamped_first = run_batch("patch_backdoor(target=5, per_batch=4) | label_flip(target=1)", job())["y"]
    assert stamped_first.tolist() == [1] * 64


def test_train_with_overrides_only_what_it_names():
    assert run_batch("train_with(lr=0.05, epochs=10)", job())["job"].overrides == {"lr": 0.05, "epochs": 10}


@pytest.mark.parametrize(
    "text", ["patch_backdoor(target=10)", "label_flip(target=-1)", "label_flip(source=12, target=1)"]
)
def test_labels_that_are_no_classes_are_refused(text):
    with pytest.raises(SpecError, match="is no class; classes are 0 to 9"):
        read_attack(text).triggered(torch.zeros(10, 1, 28, 28), torch.arange(10), 10)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("patch_backdoor(size=(0, 4))", "at least 1x1"),
        ("patch_backdoor(position=(26, 0))", "does not fit"),
        ("patch_backdoor(position=(0, 25))", "does not fit"),
        ("patch_backdoor(position=(-3, -6))", r"patch \(1, 4\) at \(25, 28\) does not fit in a 28x28 image"),
        ("patch_backdoor(position=(-3, -12))", r"patch \(1, 4\) at \(28, 16\) does not fit"),
        ("patch_backdoor(position=(-29, 0))", r"at \(-1, 0\) does not fit"),
        ("patch_backdoor(grid=(1, 2), gap=-5)", r"at \(0, -1\) does not fit"),
        ("label_flip(source=3, target=3)", "must differ"),
        ("corrupt_reply(kinds=('nan', 'nonsense'))", "kinds: nan"),
        ("corrupt_reply(kinds=())", "kinds: nan"),
    ],
)
def test_impossible_attacks_are_refused(text, says):
    with pytest.raises(SpecError, match=says):
        run_batch(text, job())


def test_corrupt_replies_are_what_they_say():
    layout, start = job().layout, torch.arange(6.0)
    kinds = ("nan", "inf", "huge", "shape", "dtype", "names", "missing", "extra", "bytes", "empty")
    for rank, kind in enumerate(kinds):
        edit = run_batch(f"corrupt_reply(kinds={kinds})", job(rank))["result"].edit_reply
        record = edit(to_record(start, layout))
        assert isinstance(record, ArrayRecord), kind
        if kind == "nan":
            assert np.isnan(record["a"].numpy()).all()
        if kind == "huge":
            assert (record["b"].numpy() == np.float32(1e30)).all()
        if kind == "shape":
            assert record["a"].shape == (3, 2, 2)
        if kind == "extra":
            assert "extra" in record
