"""A small part of the fuzzing, and that it notices what it looks for."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import fuzz  # noqa: E402

from strategies import checks  # noqa: E402
from tasks.errors import ConfigError  # noqa: E402

CASES = {"replies": 60, "settings": 150, "models": 100, "messages": 150}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_bad_input_keeps_every_promise(kind: str, tmp_path: Path) -> None:
    counts, broken = fuzz.fuzz(kind, CASES[kind], seed=2026, folder=tmp_path)
    assert broken == ""
    assert sum(counts.values()) == CASES[kind]
    assert len(counts) >= 2, f"all cases came to the same: {counts}"


@settings(max_examples=40, deadline=None, database=None)
@given(st.integers(0, 2**64))
def test_no_seed_makes_a_reply_that_spoils_a_round(seed: int) -> None:
    assert fuzz.replies.fuzz_reply(random.Random(seed)).endswith("dropped")


@settings(max_examples=150, deadline=None, database=None)
@given(st.randoms(use_true_random=False))
def test_no_setting_ends_in_anything_but_a_refusal(draw: random.Random) -> None:
    assert fuzz.settings.fuzz_setting(draw) in ("read", "refused", "used", "skipped", "no arm can run")


def test_a_setting_that_flower_would_not_hand_on_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz.settings, "app_pyproject", lambda settings: "[tool.flwr.app.config]\nseed = 2")
    _, broken = fuzz.fuzz("settings", 60, seed=1, folder=tmp_path)
    assert "other settings" in broken


def test_a_reply_that_is_not_checked_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.math, "isfinite", lambda value: True)
    _, broken = fuzz.fuzz("replies", 60, seed=1, folder=tmp_path)
    assert "replies case" in broken


def test_an_error_of_another_kind_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise KeyError("no promise was made about this")

    monkeypatch.setattr(fuzz.settings.experiments, "read_experiment", read)
    _, broken = fuzz.fuzz("settings", 30, seed=1, folder=tmp_path)
    assert "KeyError" in broken


def test_a_refusal_without_a_word_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object, **__: object) -> None:
        raise ConfigError("")

    monkeypatch.setattr(fuzz.service.wire, "read_model", read)
    _, broken = fuzz.fuzz("models", 10, seed=1, folder=tmp_path)
    assert "without a word" in broken
