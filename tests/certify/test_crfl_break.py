"""The attack on certificates, scaled down, on real MNIST: sound ones hold, the printed one breaks where it must."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tasks.datasets.mnist import mnist
from tasks.errors import DataError
from tasks.source import DataSource

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import break_certificates  # noqa: E402


def test_sound_certificates_hold_and_the_printed_one_breaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        mnist(DataSource.default())
    except DataError as error:
        pytest.skip(str(error))
    out = tmp_path / "tried.json"
    arguments = ["--rounds", "3", "--targets", "2", "--samples", "4000", "--points", "1000", "--json", str(out)]
    assert break_certificates.main(arguments) == 0
    assert "Certificates under attack" in capsys.readouterr().out
    tried = json.loads(out.read_text())["tried"]
    sound = [t for t in tried if t["should_hold"]]
    assert len(sound) == 7
    assert all(t["inside"] > 500 and t["broken"] == 0 for t in sound)
    assert sum(t["flipped"] for t in sound) > 0, "the attacks do change labels outside"
    assert {t["attack"] for t in tried if t["broken"]} == {"aimed, flips", "aimed, long samples"}


def test_a_broken_certificate_would_be_seen() -> None:
    changed = np.array([[True, False, False], [True, True, False]])
    tried = break_certificates.judge("a", "b", True, np.array([2.0, 0.5, 0.0]), np.array([1.0, 3.0]), changed)
    assert (tried.inside, tried.broken, tried.outside, tried.flipped) == (1, 1, 3, 2)
    assert tried.closest == 0.5


def test_missing_data_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("HAWTHORN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HAWTHORN_DATA", raising=False)
    assert break_certificates.main([]) == 2
    assert "mnist is not here" in capsys.readouterr().err.replace("\n", " ")
