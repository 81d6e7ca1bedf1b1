"""The benchmark of FLIP: its three ways do the same work, and it says so."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import flip  # noqa: E402


def test_the_three_ways_find_triggers_of_the_same_sizes(capsys, monkeypatch):
    arguments = [
        "flip.py",
        "--model",
        "small_cnn()",
        "--classes",
        "3",
        "--samples",
        "3",
        "--steps",
        "25",
        "--rounds",
        "0",
    ]
    monkeypatch.setattr(sys, "argv", arguments)
    flip.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 triggers, 3 samples each, 25 steps")
    assert next(int(number) for number in re.findall(r"(\d+) found", "\n".join(lines))) > 0
    apart = [float(number) for number in re.findall(r"apart by (\S+) at most", "\n".join(lines))]
    assert len(apart) == 2
    assert max(apart) < 1e-2
