"""The data sets themselves: sizes, orders, orientation, and agreement with torchvision's readers."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.dataset import Dataset
from tasks.datasets import _torchvision, cifar10, digits, emnist_letters, fashion_mnist, mnist
from tasks.source import DataSource

Load = Callable[[str], Dataset]
ALL = [mnist, fashion_mnist, emnist_letters, cifar10, digits]


@pytest.mark.parametrize("module", ALL, ids=lambda m: m.ABOUT.name)
def test_contents_agree_with_what_is_stated(module, real: Load) -> None:
    about = module.ABOUT
    data = real(about.name)
    assert data.name == about.name
    assert data.num_classes == about.num_classes
    for inputs, labels, count in (
        (data.train_inputs, data.train_labels, about.num_train),
        (data.test_inputs, data.test_labels, about.num_test),
    ):
        assert inputs.dtype == torch.uint8
        assert inputs.is_contiguous()
        assert tuple(inputs.shape) == (count, *about.input_shape)
        assert labels.dtype == torch.int64
        assert labels.unique().tolist() == list(range(about.num_classes))
        assert inputs.max() * data.scale == pytest.approx(1)


def test_digits_splits_are_stratified_fixed_and_complete(empty_source: DataSource) -> None:
    data = digits.digits(empty_source)
    again = digits.digits(empty_source)
    assert torch.equal(data.test_inputs, again.test_inputs)
    whole = torch.cat([data.train_labels, data.test_labels]).bincount()
    assert data.test_labels.bincount().tolist() == [round(n / 5) for n in whole.tolist()]
    inputs, _ = data.batch("train", slice(0, 1))
    assert inputs[0, 0, 0].tolist() == [0, 0, 5 / 16, 13 / 16, 9 / 16, 1 / 16, 0, 0]  # the collection's first image


def test_digits_resized_keep_their_samples(empty_source: DataSource) -> None:
    small, large = digits.digits(empty_source), digits.digits(empty_source, size=28)
    assert large.input_shape == (1, 28, 28)
    assert torch.equal(small.train_labels, large.train_labels)
    index = slice(0, 200)
    shrunk = torch.nn.functional.interpolate(large.batch("train", index)[0], size=(8, 8), mode="area")
    pairs = torch.stack([shrunk.flatten(), small.batch("train", index)[0].flatten()])
    assert torch.corrcoef(pairs)[0, 1] > 0.97


@pytest.mark.parametrize("module", [mnist, fashion_mnist], ids=lambda m: m.ABOUT.name)
def test_the_unpacked_folder_is_one_that_torchvision_reads(module, real: Load, real_source: DataSource) -> None:
    data = real(module.ABOUT.name)
    theirs = getattr(_torchvision.datasets(), module.ABOUT.files.folder)(module.ABOUT.open(real_source), train=False)
    assert torch.equal(theirs.data, data.test_inputs.squeeze(1))
    assert torch.equal(theirs.targets, data.test_labels)


def test_emnist_is_torchvisions_transposed_and_counted_from_zero(real: Load, real_source: DataSource) -> None:
    data = real("emnist_letters")
    root = emnist_letters.ABOUT.open(real_source)
    theirs = _torchvision.datasets().EMNIST(root, split="letters", train=False)
    assert torch.equal(theirs.data.transpose(1, 2), data.test_inputs.squeeze(1))
    assert torch.equal(theirs.targets - 1, data.test_labels)
    letter_l = (
        data.test_inputs[data.test_labels == 11].float().mean(0)[0]
    )  # upright, an L is tall: rows spread, columns not
    rows, columns = (letter_l.sum(dim) > letter_l.sum(dim).max() / 3 for dim in (1, 0))
    assert rows.sum() > columns.sum()


def test_cifar_is_torchvisions(real: Load, real_source: DataSource) -> None:
    data = real("cifar10")
    theirs = _torchvision.datasets().CIFAR10(cifar10.ABOUT.open(real_source), train=False)
    assert np.array_equal(theirs.data.transpose(0, 3, 1, 2), data.test_inputs.numpy())
    assert theirs.targets == data.test_labels.tolist()


def test_check_sums_are_torchvisions() -> None:
    theirs = _torchvision.datasets().CIFAR10
    pairs = [*theirs.train_list, *theirs.test_list, [theirs.meta["filename"], theirs.meta["md5"]]]
    assert dict(pairs) == cifar10.MD5


def test_real_data_are_read_from_a_folder_that_is_left_alone(real: Load, real_source: DataSource, tmp_path) -> None:
    real("mnist")
    fresh = replace(real_source, roots=real_source.roots[:1], cache=tmp_path / "cache")
    first = fresh.roots[0]
    before = sorted(path for path in (first / "MNIST").rglob("*"))
    assert len(mnist.mnist(fresh).train_labels) == 60_000
    assert sorted(path for path in (first / "MNIST").rglob("*")) == before


def test_data_set_modules_import_neither_torchvision_nor_sklearn() -> None:
    modules = ", ".join(module.__name__ for module in ALL)
    code = f"import sys, tasks.prepare, {modules}; print({{'torchvision', 'sklearn'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip() == "set()"
