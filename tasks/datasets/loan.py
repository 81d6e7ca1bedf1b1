"""LOAN: will a LendingClub loan be paid? 90 numbers per loan, 9 states of repayment, one client per US state.

DBA (Xie et al., ICLR 2020) and CRFL (Xie et al., ICML 2021) use Kaggle's loan.csv: 2.26 million loans, 51 states. Their
preparation, which this follows: 53 of 145 columns are dropped (identifiers, dates, free text, and columns that are
mostly empty); a missing value is 0; a column of words becomes j / len for the j-th of its len words in the order of
their first rows; a column of numbers is scaled to [0, 1] by its least and greatest value of the whole file; each
state is split 80/20 by scikit-learn's `train_test_split` with seed 42.

The file that is looked for by default is not the papers', but a sample of it: 3,998 loans with all its columns, put
together from three public samples, so that 2015 and finished loans are over-represented. Of 9 classes one (Default)
has no loan and five have 26 or fewer, a state has 5 to 532 loans in place of tens of thousands, and the least and
greatest values are the sample's. Whoever has loan.csv names it: ``loan(file="loan.csv")``. In both, some of the
columns (recoveries, total_pymnt) tell how the loan ended, so accuracies say little about lending.

A constant column is 0 here; the papers' division gives NaN. A state of one loan has it for training.
"""

import csv
import gzip
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tasks.dataset import Dataset
from tasks.datasets._about import About, Progress
from tasks.errors import DataError
from tasks.source import DataSource

FOLDER = "LOAN"
SAMPLE = "lendingclub_2007_2018_full_columns_sample.csv.gz"
_STATES = (
    "AK AL AR AZ CA CO CT DC DE FL GA HI IA ID IL IN KS KY LA MA MD ME MI MN MO MS MT NC ND NE NH NJ NM NV NY OH OK OR "
    "PA RI SC SD TN TX UT VA VT WA WI WV WY"
)
STATES = tuple(_STATES.split())
# in the order of the papers' file; CRFL's attackers want number 7
CLASSES = (
    "Current",
    "Fully Paid",
    "Late (31-120 days)",
    "In Grace Period",
    "Charged Off",
    "Late (16-30 days)",
    "Default",
    "Does not meet the credit policy. Status:Fully Paid",
    "Does not meet the credit policy. Status:Charged Off",
)
_WORDS = (
    "term grade sub_grade home_ownership verification_status pymnt_plan purpose initial_list_status application_type "
    "hardship_flag disbursement_method debt_settlement_flag"
)
WORDS = tuple(_WORDS.split())
_FEATURES = (
    "loan_amnt funded_amnt funded_amnt_inv term int_rate installment grade sub_grade home_ownership annual_inc "
    "verification_status pymnt_plan purpose dti delinq_2yrs inq_last_6mths open_acc pub_rec revol_bal revol_util "
    "total_acc initial_list_status out_prncp out_prncp_inv total_pymnt total_pymnt_inv total_rec_prncp total_rec_int "
    "total_rec_late_fee recoveries collection_recovery_fee last_pymnt_amnt collections_12_mths_ex_med application_type "
    "acc_now_delinq tot_coll_amt tot_cur_bal open_acc_6m open_act_il open_il_12m open_il_24m mths_since_rcnt_il "
    "total_bal_il il_util open_rv_12m open_rv_24m max_bal_bc all_util total_rev_hi_lim inq_fi total_cu_tl inq_last_12m "
    "acc_open_past_24mths avg_cur_bal bc_open_to_buy bc_util chargeoff_within_12_mths delinq_amnt mo_sin_old_il_acct "
    "mo_sin_old_rev_tl_op mo_sin_rcnt_rev_tl_op mo_sin_rcnt_tl mort_acc mths_since_recent_bc mths_since_recent_inq "
    "num_accts_ever_120_pd num_actv_bc_tl num_actv_rev_tl num_bc_sats num_bc_tl num_il_tl num_op_rev_tl num_rev_accts "
    "num_rev_tl_bal_gt_0 num_sats num_tl_120dpd_2m num_tl_30dpd num_tl_90g_dpd_24m num_tl_op_past_12m pct_tl_nvr_dlq "
    "percent_bc_gt_75 pub_rec_bankruptcies tax_liens tot_hi_cred_lim total_bal_ex_mort total_bc_limit "
    "total_il_high_credit_limit hardship_flag disbursement_method debt_settlement_flag"
)
FEATURES = tuple(_FEATURES.split())
TEST_SHARE, SPLIT_SEED = 0.2, 42
_AT_ONCE = 4096  # rows read before they are turned into numbers


@dataclass(frozen=True)
class LoanFile:
    """The sample's file; it is read as it is, so nothing is unpacked."""

    name: str = SAMPLE

    @property
    def wanted(self) -> tuple[str, ...]:
        return (f"{FOLDER}/{self.name}",)

    def find(self, source: DataSource) -> Path | None:
        return source.find(*self.wanted)

    def packed(self, source: DataSource) -> Path | None:
        return None

    def unpack(self, source: DataSource, progress: Progress) -> Path | None:
        return None

    def download(self, source: DataSource, progress: Progress) -> Path:
        raise DataError(
            f"no address is known that {self.name} may be fetched from; LendingClub's loans are on Kaggle as loan.csv: "
            f"put it into a folder {FOLDER} of the data folder and use loan(file='loan.csv')"
        )


ABOUT = About(
    name="loan",
    num_train=3_178,
    num_test=820,
    input_shape=(90,),
    num_classes=9,
    citation="LendingClub, loan data 2007-2018, as used by Xie et al., DBA, ICLR 2020, and CRFL, ICML 2021",
    terms="published by LendingClub for download, no licence stated",
    files=LoanFile(),
)


def loan(source: DataSource, *, file: str = SAMPLE) -> Dataset:
    """Return the loans of `file` as float32 [samples, 90] in [0, 1], grouped by state (`STATES`), by class (`CLASSES`).

    `file` lies in the folder LOAN and has LendingClub's column names, .gz or not. Raises `DataError`.
    """
    place = LoanFile(file)
    root = place.find(source)
    if root is None:
        raise source.missing("loan", place.wanted)
    table, labels, states = _read(root / place.wanted[0])
    train, test = _split(states)
    inputs, classes = torch.from_numpy(_scaled(table)), torch.from_numpy(labels)
    groups = torch.from_numpy(states)[train]
    return Dataset("loan", inputs[train], classes[train], inputs[test], classes[test], len(CLASSES), 1.0, groups)


def _read(path: Path) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return (features [rows, 90] with words as j / len, not yet scaled; labels [rows]; states [rows])."""
    parts: list[NDArray[np.float64]] = []
    labels: list[int] = []
    states: list[int] = []
    words: dict[str, dict[str, int]] = {name: {} for name in WORDS}
    label_of, state_of = {name: i for i, name in enumerate(CLASSES)}, {name: i for i, name in enumerate(STATES)}
    try:
        with (
            gzip.open(path, "rt", encoding="utf-8", newline="")
            if path.suffix == ".gz"
            else path.open(encoding="utf-8", newline="") as file
        ):
            rows = csv.DictReader(file)
            while chunk := list(itertools.islice(rows, _AT_ONCE)):
                labels += [label_of[row["loan_status"]] for row in chunk]
                states += [state_of[row["addr_state"]] for row in chunk]
                parts.append(np.array([list(_numbers(row, words)) for row in chunk], dtype=np.float64))
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} has not LendingClub's columns and values: {error!r}") from None
    if not parts:
        raise DataError(f"{path} has no loans")
    table = np.concatenate(parts)
    for name, found in words.items():
        table[:, FEATURES.index(name)] /= len(found)
    return table, np.array(labels), np.array(states)


def _numbers(row: dict[str, str], words: dict[str, dict[str, int]]) -> Iterator[float]:
    """Yield a row's features; a word is its number in the order of appearance, 0 stands for what is missing."""
    for name in FEATURES:
        value = row[name]
        if name in words:
            yield words[name].setdefault(value, len(words[name]))
        else:
            yield float(value) if value else 0.0


def _scaled(table: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return columns of numbers scaled to [0, 1]; those of words stay."""
    low, high = table.min(axis=0), table.max(axis=0)
    kept = np.isin(FEATURES, WORDS)
    low[kept], high[kept] = 0.0, 1.0
    return ((table - low) / np.where(high > low, high - low, 1.0)).astype(np.float32)


def _split(states: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """Return indices for training and for testing, state by state, in the order of scikit-learn's split."""
    train, test = [], []
    for state in np.unique(states):
        rows = np.flatnonzero(states == state)
        number = math.ceil(TEST_SHARE * len(rows)) if len(rows) > 1 else 0
        order = np.random.RandomState(SPLIT_SEED).permutation(len(rows))
        test.append(rows[order[:number]])
        train.append(rows[order[number:]])
    return torch.from_numpy(np.concatenate(train)), torch.from_numpy(np.concatenate(test))
