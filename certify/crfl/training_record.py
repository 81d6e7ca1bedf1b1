"""What a certificate needs to know of a training run, as recorded by the run: nothing here is a retyped constant.

Xie, Chen, Chen, Li, "CRFL" (ICML 2021), section 4; names of the paper in the comments. The released certifier retypes
these numbers (a clipping norm of another round, a number of steps of another data set); here steps are counted as they
were taken, and a short last batch with as many poisoned rows as the others has a larger poisoned share.
"""

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from tasks.errors import RecordError

SCHEMA = 1
MAX_TEXT = 256 << 20  # characters of a record's JSON
MAX_ROUNDS = 100_000
MAX_ENTRIES = 5_000_000  # participants of all rounds together, and steps of all clients together
MAX_BATCH = 2**31
# How far off the exact one a clipped model may lie, in units of the clipping norm: the product's clip stops 2^-22 below
# the norm, and float32 rounds its factor and its products by 2^-24 each, in either world; a hundredth for the norm.
CLIP_ERROR = 2.0**-21 * 1.01


@dataclass(frozen=True, kw_only=True)
class RoundWork:
    """One round as the server knows it."""

    participants: tuple[int, ...]
    weights: tuple[float, ...]  # p_i of each participant
    learning_rates: tuple[float, ...]  # eta_i of each participant
    clip_norm: float | None  # rho_t; None: the model was not clipped
    noise: float  # sigma_t, added after the clip; in the last round nothing is added
    model_norm: float | None = None  # l2 norm of the model after the clip, before noise; None: not recorded

    def __post_init__(self) -> None:
        known = self.model_norm is None or (_number(self.model_norm) and self.model_norm >= 0)
        _want(known, "model_norm must be None or 0 or more", self.model_norm)
        _want(0 < len(self.participants) == len(set(self.participants)), "participants must be some, each once", self)
        same = len(self.participants) == len(self.weights) == len(self.learning_rates)
        _want(same, "participants, weights and learning_rates must be equally many", self)
        _want(all(_is_client(c) for c in self.participants), "participants must be whole numbers from 0", self)
        _want(all(_number(w) and w >= 0 for w in self.weights), "weights must be numbers from 0", self.weights)
        _want(all(_number(r) and r > 0 for r in self.learning_rates), "learning rates must be above 0", self)
        _want(self.clip_norm is None or (_number(self.clip_norm) and self.clip_norm > 0), "clip_norm above 0", self)
        _want(_number(self.noise) and self.noise >= 0, "noise must be 0 or more", self.noise)


@dataclass(frozen=True, kw_only=True)
class ClientWork:
    """One client's local training in the attacked round, step by step."""

    client: int
    weight: float  # p_i
    learning_rate: float  # eta_i
    batch_sizes: tuple[int, ...]  # n_Bi of every step that was taken; their number is tau_i
    poisoned: tuple[int, ...]  # q_Bi of every step; all 0 for a client that does not attack
    scale: float = 1.0  # gamma_i, by which the client multiplies its update
    update_norm: float | None = None  # l2 norm of its update in this run, before it was scaled

    def __post_init__(self) -> None:
        _want(_is_client(self.client), "client must be a whole number from 0", self.client)
        _want(_number(self.weight) and self.weight >= 0, "weight must be 0 or more", self.weight)
        for name in ("learning_rate", "scale"):
            value = getattr(self, name)
            _want(_number(value) and value > 0, f"{name} must be above 0", value)
        _want(
            len(self.batch_sizes) == len(self.poisoned) > 0, "steps need one batch size and poisoned count each", self
        )
        pairs = zip(self.poisoned, self.batch_sizes)
        whole = all(type(q) is int and type(n) is int and 0 <= q <= n > 0 for q, n in pairs)
        _want(whole, "poisoned must be from 0 to the batch size, step by step", self)
        _want(max(self.batch_sizes) <= MAX_BATCH, f"a batch has {MAX_BATCH} samples at most", max(self.batch_sizes))
        norm = self.update_norm
        _want(norm is None or (_number(norm) and norm >= 0), "update_norm must be None or 0 or more", norm)

    @property
    def poisoned_share(self) -> float:
        """Sum over the steps of q_B / n_B: tau_i q_Bi / n_Bi where all batches are alike."""
        return math.fsum(q / n for q, n in zip(self.poisoned, self.batch_sizes))


@dataclass(frozen=True, kw_only=True)
class TrainingRecord:
    """One run of federated training with an attack in one round; contradictions raise `RecordError`."""

    model: str  # the settings' text, such as "logistic_regression()"
    bias: bool
    num_classes: int
    num_params: int
    num_clients: int  # N
    rounds: tuple[RoundWork, ...]  # T of them
    smoothing_sigma: float  # sigma_T of the released votes; 0: released without smoothing
    attack_round: int  # t_adv, counted from 1
    attackers: tuple[int, ...]  # the first R clients of the paper
    work: tuple[ClientWork, ...]  # of every participant of the attacked round
    label_flips: bool  # whether attackers may change labels too
    data_norm_bound: float  # X: no training input is longer (l2)
    data_norm_found: float | None = None  # the longest that was found in the training data; None: not looked
    start_norm: float | None = None  # l2 norm of the (noisy) global model that the attacked round started from
    rule: str = "mean()"
    server_lr: float = 1.0
    server_optimizer: str = "none"
    momentum: float = 0.0
    weight_decay: float = 0.0
    gradient_clip: float | None = None  # as in DP-SGD
    counterpart_scaled: bool = True  # whether attackers would scale their update without poison too, as CRFL has it
    same_batches: bool = True  # batches and noise depend on seeds alone, so both worlds share them
    seed: int | None = None
    model_sha256: str | None = None  # of the released model
    # Texts of the settings, "" where there is nothing of a kind. None: not recorded, so what rests on it stays stated.
    training: str | None = None  # such as "sgd(lr=0.001, batch_size=100)"
    transform: str | None = None  # such as "crfl(rho=2.0, slope=0.1)"
    optimizer: str | None = None  # such as "step()"
    mixing: str | None = None
    collusion: str | None = None
    dtype: str | None = None  # of the released model, such as "float32"
    max_update_norm: float | None = None  # an update whose l2 norm is beyond it is dropped; None: not recorded
    clip_error: float = CLIP_ERROR  # of the clip that was run, relative to its norm; 0: exact

    def __post_init__(self) -> None:
        for name, least in (("num_classes", 2), ("num_params", 1), ("num_clients", 1)):
            value = getattr(self, name)
            _want(type(value) is int and value >= least, f"{name} must be a whole number from {least}", value)
        for name in ("smoothing_sigma", "data_norm_bound", "momentum", "weight_decay", "clip_error"):
            value = getattr(self, name)
            _want(_number(value) and value >= 0, f"{name} must be 0 or more", value)
        for name in ("data_norm_found", "start_norm", "gradient_clip", "max_update_norm"):
            value = getattr(self, name)
            _want(value is None or (_number(value) and value >= 0), f"{name} must be None or 0 or more", value)
        for name in ("bias", "label_flips", "same_batches", "counterpart_scaled"):
            _want(type(getattr(self, name)) is bool, f"{name} must be true or false", getattr(self, name))
        for name in ("model", "rule", "server_optimizer"):
            _want(isinstance(getattr(self, name), str), f"{name} must be text", getattr(self, name))
        for name in ("training", "transform", "optimizer", "mixing", "collusion", "dtype", "model_sha256"):
            value = getattr(self, name)
            _want(value is None or isinstance(value, str), f"{name} must be None or text", value)
        self._check_size()
        _want(_number(self.server_lr) and self.server_lr > 0, "server_lr must be above 0", self.server_lr)
        last = len(self.rounds)
        attacked = self.attack_round
        _want(type(attacked) is int and 1 <= attacked <= last, f"attack_round must be from 1 to {last}", attacked)
        clients = {client for r in self.rounds for client in r.participants}
        _want(max(clients) < self.num_clients, f"clients are numbered below {self.num_clients}", max(clients))
        self._check_attacked_round()

    def _check_size(self) -> None:
        most = f"a record has {MAX_ROUNDS} rounds, {MAX_ENTRIES} participants of rounds and {MAX_ENTRIES} steps at most"
        _want(len(self.rounds) <= MAX_ROUNDS, most, f"{len(self.rounds)} rounds")
        participants = sum(len(work.participants) for work in self.rounds)
        _want(participants <= MAX_ENTRIES, most, f"{participants} participants")
        steps = sum(len(work.batch_sizes) for work in self.work)
        _want(steps <= MAX_ENTRIES, most, f"{steps} steps")

    def _check_attacked_round(self) -> None:
        attacked = self.rounds[self.attack_round - 1]
        known = {c: (w, r) for c, w, r in zip(attacked.participants, attacked.weights, attacked.learning_rates)}
        told = {work.client: (work.weight, work.learning_rate) for work in self.work}
        wanted = "work must have every participant of the attacked round once, with its weight and learning rate"
        _want(len(told) == len(self.work) and told == known, wanted, told)
        some = 0 < len(self.attackers) == len(set(self.attackers)) and set(self.attackers) <= known.keys()
        _want(some, "attackers must be participants of the attacked round, each once", self.attackers)
        honest = [work.client for work in self.work if work.client not in self.attackers and any(work.poisoned)]
        _want(not honest, "only attackers have poisoned samples", honest)

    @property
    def num_rounds(self) -> int:
        """T."""
        return len(self.rounds)

    @property
    def attacking(self) -> tuple[ClientWork, ...]:
        """The attackers' work, in the order of `attackers`."""
        by_client = {work.client: work for work in self.work}
        return tuple(by_client[client] for client in self.attackers)

    def noise(self, number: int) -> float:
        """Return sigma_t of round `number` (from 1): training noise, and the smoothing's in the last round."""
        return self.smoothing_sigma if number == self.num_rounds else self.rounds[number - 1].noise

    def checked_against(self, inputs: Any) -> "TrainingRecord":
        """Return the record with the longest of `inputs` [samples, ...] found, beside what was found before.

        Raises `RecordError` where one is longer than `data_norm_bound`; inputs are as the model sees them.
        """
        array = inputs.detach().cpu().numpy() if hasattr(inputs, "detach") else np.asarray(inputs)
        rows = array.reshape(len(array), -1)
        parts = [rows[first : first + 4096].astype(np.float64) for first in range(0, len(rows), 4096)]
        squares = max((float(np.einsum("nd,nd->n", part, part).max()) for part in parts), default=0.0)
        found = math.sqrt(squares) * (1 + (rows.shape[1] + 4) * 2.0**-53)
        _want(found <= self.data_norm_bound, f"inputs must have norm {self.data_norm_bound:g} at most", found)
        return replace(self, data_norm_found=max(found, self.data_norm_found or 0.0))

    def to_json(self) -> str:
        """Return the record as strict JSON with sorted keys."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, sort_keys=True, allow_nan=False)

    @staticmethod
    def from_json(text: str) -> "TrainingRecord":
        """Read what `to_json` wrote; raises `RecordError` for anything else. What has a default may be missing."""
        _want(len(text) <= MAX_TEXT, f"its JSON has {MAX_TEXT} characters at most", len(text))
        try:
            entries = json.loads(text)
        except (ValueError, RecursionError) as error:  # not JSON, or a number of too many digits
            raise RecordError(f"a training record is JSON: {error}") from None
        if not isinstance(entries, dict) or entries.pop("schema", None) != SCHEMA:
            raise RecordError(f"this version reads training records of schema {SCHEMA}")
        entries = _entries(TrainingRecord, entries)
        entries["rounds"] = tuple(RoundWork(**_entries(RoundWork, r)) for r in _list(entries["rounds"]))
        entries["work"] = tuple(ClientWork(**_entries(ClientWork, w)) for w in _list(entries["work"]))
        return TrainingRecord(**entries)

    def save(self, path: Path) -> None:
        """Write the record as JSON."""
        path.write_text(self.to_json() + "\n", "utf-8")

    @staticmethod
    def load(path: Path) -> "TrainingRecord":
        """Read a record that `save` wrote."""
        try:
            return TrainingRecord.from_json(path.read_text("utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(f"{path} holds no training record: {error}") from None


def _want(holds: bool, wanted: str, got: object) -> None:
    if not holds:
        raise RecordError(f"training record: {wanted}, got {got!r}")


_GREATEST = sys.float_info.max  # compared with, as a whole number beyond it is no float


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_GREATEST <= value <= _GREATEST


def _is_client(value: object) -> bool:
    return type(value) is int and value >= 0


def _list(value: object) -> list[Any]:
    _want(isinstance(value, list), "rounds and work must be lists", value)
    return value  # type: ignore[return-value]


def _entries(kind: type, entries: object) -> dict[str, Any]:
    """Return the entries of one object, lists as tuples, after checking that they are those of its schema."""
    wanted = {f.name for f in fields(kind)}
    needed = {f.name for f in fields(kind) if f.default is MISSING}
    if not isinstance(entries, Mapping) or not needed <= entries.keys() <= wanted:
        found = entries.keys() if isinstance(entries, Mapping) else {type(entries).__name__}
        missing, unknown = sorted(needed - set(found)), sorted(set(found) - wanted)
        raise RecordError(f"{kind.__name__} has the entries of its schema; missing {missing}, unknown {unknown}")
    lists = {f.name for f in fields(kind) if "tuple" in str(f.type)} & entries.keys()
    for name in lists:
        _want(isinstance(entries[name], list), f"{name} must be a list", entries[name])
    nested = ("rounds", "work")
    return {k: tuple(v) if k in lists and k not in nested else v for k, v in entries.items()}
