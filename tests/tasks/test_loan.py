"""LOAN: the facts of the sample, the papers' preparation, scikit-learn's split."""

import csv
import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tasks.dataset import Dataset
from tasks.datasets import loan
from tasks.errors import DataError
from tasks.partitions.by_group import by_group
from tasks.rng import generator
from tasks.source import DataSource

Load = Callable[[str], Dataset]
TRIGGER = ("num_tl_120dpd_2m", "num_tl_90g_dpd_24m")


def test_sizes_classes_and_states_of_the_sample(real: Load) -> None:
    data = real("loan")
    about = loan.ABOUT
    assert (len(data.train_labels), len(data.test_labels)) == (about.num_train, about.num_test) == (3178, 820)
    assert data.input_shape == about.input_shape == (90,)
    assert len(loan.FEATURES) == 90
    assert data.train_inputs.dtype == torch.float32
    labels = torch.cat([data.train_labels, data.test_labels])
    assert labels.bincount(minlength=9).tolist() == [866, 2492, 26, 7, 594, 5, 0, 6, 2]
    assert data.train_groups is not None
    states = data.train_groups.bincount(minlength=51).tolist()
    assert sum(count > 0 for count in states) == 50
    assert [states[loan.STATES.index(name)] for name in ("CA", "CT", "IA")] == [425, 46, 0]


def test_values_are_in_the_unit_interval_and_columns_of_numbers_reach_both_ends(real: Load) -> None:
    data = real("loan")
    values = torch.cat([data.train_inputs, data.test_inputs])
    assert bool(torch.isfinite(values).all())
    assert (float(values.min()), float(values.max())) == (0.0, 1.0)
    for place, name in enumerate(loan.FEATURES):
        top = float(values[:, place].max())
        assert (top < 1) if name in loan.WORDS else (top == 1), name
    places = [loan.FEATURES.index(name) for name in TRIGGER]
    assert places == [75, 77]  # the columns of CRFL's trigger


def test_the_first_loan_by_hand(real: Load, real_source: DataSource) -> None:
    """Found in the file, prepared by hand, and met again among the samples."""
    data = real("loan")
    with gzip.open(loan.ABOUT.open(real_source) / "LOAN" / loan.SAMPLE, "rt") as file:
        rows = list(csv.DictReader(file))
    values = torch.cat([data.train_inputs, data.test_inputs])
    first = {}
    for name in ("loan_amnt", "int_rate", "dti", "revol_util", "num_tl_120dpd_2m"):
        column = [float(row[name] or 0) for row in rows]
        first[name] = (column[0] - min(column)) / (max(column) - min(column))
    for name in ("term", "grade", "home_ownership", "purpose"):
        first[name] = 0.0  # the first row's word is word number 0
    wanted = torch.tensor(list(first.values()))
    found = (values[:, [loan.FEATURES.index(name) for name in first]] - wanted).abs().amax(dim=1) < 1e-6
    assert found.any()
    words = list(dict.fromkeys(row["purpose"] for row in rows))
    shares = values[:, loan.FEATURES.index("purpose")].unique()
    assert torch.allclose(shares, torch.arange(len(words)) / len(words))


def test_the_split_is_scikit_learns(real: Load) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    states = np.array([3] * 11 + [1] * 5 + [7] * 2)
    states = np.random.RandomState(0).permutation(states)
    train, test = loan._split(states)
    at = [0, 0]
    for state in (1, 3, 7):
        rows = np.flatnonzero(states == state)
        for place, (ours, theirs) in enumerate(
            zip((train, test), selection.train_test_split(rows, test_size=0.2, random_state=42))
        ):
            assert ours[at[place] : at[place] + len(theirs)].tolist() == theirs.tolist()
            at[place] += len(theirs)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(18))


def test_a_client_is_a_state(real: Load) -> None:
    data = real("loan")
    shares = by_group(data, 20, generator(1))
    assert data.train_groups is not None
    names = [loan.STATES[int(data.train_groups[share].unique())] for share in shares]
    assert names[:4] == ["AZ", "CA", "CO", "CT"]
    assert len(names) == 20


def test_other_files_of_the_same_columns(tmp_path: Path, empty_source: DataSource) -> None:
    columns = [*loan.FEATURES, "loan_status", "addr_state", "emp_title"]
    rows = []
    for number in range(6):
        row = {name: str(number) for name in loan.FEATURES} | dict.fromkeys(loan.WORDS, f"w{number % 2}")
        rows.append(row | {"loan_status": loan.CLASSES[number % 9], "addr_state": "CT", "emp_title": "x", "dti": ""})
    folder = tmp_path / "given" / "LOAN"
    folder.mkdir(parents=True)
    with (folder / "loan.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    source = replace(empty_source, roots=(tmp_path / "given",))
    data = loan.loan(source, file="loan.csv")
    assert (len(data.train_labels), len(data.test_labels)) == (4, 2)
    values = torch.cat([data.train_inputs, data.test_inputs])
    assert values[:, 0].sort().values.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert values[:, loan.FEATURES.index("grade")].unique().tolist() == [0, 0.5]
    assert not values[:, loan.FEATURES.index("dti")].any()  # missing, then constant
    (folder / "loan.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="has not LendingClub's columns"):
        loan.loan(source, file="loan.csv")


def test_a_missing_file_says_what_was_tried(empty_source: DataSource) -> None:
    with pytest.raises(DataError, match="lendingclub_2007_2018_full_columns_sample"):
        loan.loan(empty_source)
    with pytest.raises(DataError, match=r"Kaggle as loan\.csv"):
        loan.LoanFile().download(empty_source, lambda *_: None)
