"""The benchmark of rules: every rule is in it, contestants do the work their row names, and its numbers are honest."""

import importlib.util
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import rules  # noqa: E402
from benchmarks.rule_peers import Call, Case, byzfl, flower, hawthorn, limits  # noqa: E402
from benchmarks.rule_peers.__main__ import PEERS, facts  # noqa: E402
from benchmarks.rule_peers.measure import Measured, compete, extra_memory, timed  # noqa: E402
from tasks import spec  # noqa: E402

SMALL = Case.make(11, 300)


def result_of(call: Call | str) -> torch.Tensor:
    assert isinstance(call, Call), call
    result = call.run(call.fresh())
    assert result is not None
    return result


def test_every_rule_has_a_row() -> None:
    assert set(spec.names("rule")) <= set(hawthorn.rows())
    assert len(hawthorn.rows()) == len(set(hawthorn.rows()))
    assert set(byzfl.RULES) <= set(hawthorn.rows())
    assert set(flower.STRATEGIES) <= set(hawthorn.rows())


@pytest.mark.parametrize("row", hawthorn.rows())
def test_hawthorn_runs_every_row_and_leaves_the_updates_alone(row: str) -> None:
    before = SMALL.updates.clone()
    call = hawthorn.prepare(row, SMALL)
    result = result_of(call)
    assert result.shape == (300,)
    assert result.isfinite().all()
    assert torch.equal(SMALL.updates, before)
    assert torch.equal(result_of(call), result)  # a first round again, not a second one


def test_the_attackers_of_a_case_are_the_last_fifth() -> None:
    assert SMALL.f == 2
    means = SMALL.updates.mean(1)
    assert bool((means[:9] > 0).all())
    assert bool((means[9:] < 0).all())
    assert hawthorn.text("krum", SMALL) == "krum(num_byzantine=2)"
    assert hawthorn.text("bulyan", Case.make(10, 5)) == "bulyan(num_byzantine=1)"


def test_a_rule_that_refuses_the_case_says_why() -> None:
    outcome = compete({"krum": hawthorn.prepare("krum", Case.make(2, 5))}, 1, 1.0)["krum"]
    assert not outcome.seconds
    assert outcome.reason.startswith("AggregationError: krum wants n >= 2f + 3")


@pytest.mark.parametrize("row", sorted(flower.STRATEGIES))
def test_flower_computes_the_rule_of_its_row(row: str) -> None:
    ours, theirs = result_of(hawthorn.prepare(row, SMALL)), result_of(flower.prepare(row, SMALL))
    if row == "bulyan":  # selects otherwise, but averages the same kind of values
        assert float((ours - theirs).abs().max()) < 1.0
    else:
        torch.testing.assert_close(theirs.float(), ours, rtol=1e-4, atol=1e-5)


@pytest.mark.reference
@pytest.mark.skipif(importlib.util.find_spec("byzfl") is None, reason="byzfl is not installed")
@pytest.mark.parametrize("row", ["mean", "median", "trimmed_mean", "meamed", "mda", "smea"])
def test_byzfl_computes_the_rule_of_its_row(row: str) -> None:
    ours, theirs = result_of(hawthorn.prepare(row, SMALL)), result_of(byzfl.prepare(row, SMALL))
    torch.testing.assert_close(theirs.float(), ours, rtol=1e-4, atol=1e-5)


def test_a_peer_without_the_rule_has_no_call_and_one_that_would_take_minutes_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert byzfl.prepare("flame", SMALL) == ""
    assert flower.prepare("flame", SMALL) == ""
    monkeypatch.setattr(byzfl, "find", lambda: None)
    assert byzfl.prepare("median", SMALL) == "byzfl is not installed"
    monkeypatch.setattr(byzfl, "find", lambda: object())
    assert byzfl.prepare("mda", Case.make(50, 2)) == "would try 1e+10 sets"
    monkeypatch.setattr(byzfl, "free_memory", lambda: 1000.0)
    assert str(byzfl.prepare("nearest_neighbours | mean", SMALL)).startswith("needs ")


def test_limits_do_what_they_say() -> None:
    for name in limits.ROWS:
        call = limits.prepare(name, SMALL)
        assert isinstance(call, Call)
        assert call.run(call.fresh()) is None


def test_calls_take_turns_and_slow_ones_run_once() -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> Call:
        def run(_: None) -> torch.Tensor:
            order.append(name)
            end = time.process_time() + seconds
            while time.process_time() < end:
                pass
            return torch.ones(1)

        return Call(run, lambda: None)

    def fail(_: None) -> None:
        raise ValueError("no\nmore")

    calls = {"a": call("a", 0.01), "b": call("b", 0.01), "slow": call("slow", 0.2), "broken": Call(fail, lambda: None)}
    outcomes = compete({**calls, "absent": "is not there"}, 3, 0.3, memory=False)
    assert order == ["a", "b", "slow", *["a", "b"] * 3]
    assert [len(outcomes[name].seconds) for name in ("a", "b", "slow")] == [3, 3, 1]
    assert all(0.01 <= seconds < 0.1 for seconds in outcomes["a"].seconds)
    assert outcomes["broken"].reason == "ValueError: no"
    assert outcomes["absent"].reason == "is not there"
    assert outcomes["absent"].median is None


def test_making_the_input_is_not_timed() -> None:
    seconds, _ = timed(Call(lambda _: None, lambda: sum(range(3_000_000))))
    assert seconds < 0.01


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_what_a_call_takes_at_most_and_gives_back() -> None:
    def run(_: None) -> torch.Tensor:
        first = torch.ones(10_000_000)
        del first
        return torch.ones(5_000_000)

    extra = extra_memory(Call(run, lambda: None))
    assert extra is not None
    assert 36e6 < extra < 60e6
    told = facts(Measured([0.1], extra=300 * 11 * 4), None, SMALL)
    assert told["memory"] == 2.0


def test_how_far_apart_results_are() -> None:
    ours = torch.tensor([3.0, 4.0])
    assert facts(Measured(result=ours + torch.tensor([0.0, 0.5])), ours, SMALL)["apart"] == pytest.approx(0.1)
    assert facts(Measured(result=ours), ours, SMALL)["apart"] is None


def test_the_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rules.json"
    arguments = ["--rules", "median,arc", "--shapes", "11x2e3", "--repeats", "1", "--json", str(out)]
    assert rules.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "11 clients x 2,000 parameters" in printed
    (result,) = json.loads(out.read_text())
    rows = {row["row"]: row["outcomes"] for row in result["rows"]}
    assert list(rows) == ["median", "nearest_neighbours | median", "bucketing | median", "arc | mean"]
    assert set(rows["median"]) == {*PEERS, *limits.ROWS}
    for outcomes in rows.values():
        assert outcomes["hawthorn"]["median"] > 0
        assert all(outcomes[name]["median"] > 0 for name in limits.ROWS)
    assert rows["median"]["flower"]["apart"] < 1e-6
    assert result["rows"][3]["hawthorn"] == "arc(num_byzantine=2) | mean()"


def test_cells() -> None:
    there, absent = {"median": 0.004, "memory": 1.25, "reason": ""}, {"median": None, "memory": None, "reason": "no"}
    assert rules.milliseconds(there) == "4"
    assert rules.milliseconds(absent) == "no"
    assert rules.by({"median": 0.01}, there) == "2.5"
    assert rules.by(absent, there) == "no"
    assert rules.by({**absent, "reason": ""}, there) == "-"
    assert rules.by(there, absent) == "-"
    assert rules.stacks(there) == "1.25"
    assert rules.stacks(absent) == "-"


def test_what_cannot_be_measured_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["--rules", "median,nothing"], "unknown rule nothing; there are: bulyan"),
        (["--shapes", "10"], "CLIENTSxPARAMETERS"),
        (["--shapes", "10xmany"], "cannot read --shapes"),
        (["--repeats", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            rules.read_options(arguments)
        assert said in capsys.readouterr().err
    options = rules.read_options(["--rules", "geometric_median"])
    names = ["geometric_median", "geometric_median, 50 steps", "nearest_neighbours | geometric_median"]
    assert options.rules == names
    assert options.shapes == [(10, 10**6), (50, 10**6), (100, 10**5), (200, 10**5)]


def test_replies_hold_the_updates() -> None:
    made = flower.replies(SMALL.updates)
    (array,) = next(iter(made[3].content.array_records.values())).to_numpy_ndarrays()
    assert np.array_equal(array, SMALL.updates[3].numpy())
