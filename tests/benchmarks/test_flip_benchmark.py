"""The benchmark of FLIP: its ways do the same work, and it says so."""

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
    apart = {
        line.split("  ")[1]: float(re.findall(r"apart by (\S+) at most", line)[0]) for line in lines if "apart" in line
    }
    assert list(apart) == ["all as one batch, bfloat16", "the same code, pair by pair", "a plain loop over the pairs"]
    assert max(apart[name] for name in list(apart)[1:]) < 1e-2  # a rounded model's triggers may be others
