"""The benchmark of certificates: ways bound what they say, peers are judged fairly, targets are judged at all."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))  # benchmarks is no part of the installed package

from benchmarks import certify, certify_report  # noqa: E402
from benchmarks.certification import zonotope  # noqa: E402
from certify.network import Network  # noqa: E402
from certify.zonotope import check  # noqa: E402
from tasks.datasets.mnist import mnist  # noqa: E402
from tasks.errors import DataError  # noqa: E402
from tasks.model import initialise  # noqa: E402
from tasks.rng import generator  # noqa: E402
from tasks.source import DataSource  # noqa: E402


def small_module() -> nn.Module:
    parts = nn.Conv2d(1, 2, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(98, 12), nn.ReLU(), nn.Linear(12, 10)
    module = nn.Sequential(*parts)
    initialise(module, generator(1))
    return module.eval()


MODULE = small_module()
POINTS = torch.rand(3, *zonotope.SHAPE, generator=generator(2))
LABELS = MODULE(POINTS).argmax(1)


def need_mnist() -> None:
    try:
        mnist(DataSource.default())
    except DataError as error:
        pytest.skip(str(error))


class FakeBounds:
    """Stands for auto_LiRPA where it is not installed: the arguments it is given, our bounds behind them."""

    def __init__(self) -> None:
        self.options: list[dict[str, str]] = []
        self.boxes: list[tuple[Tensor, Tensor]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module: Any = types.ModuleType("auto_LiRPA")
        module.PerturbationLpNorm = lambda norm, eps, x_L, x_U: (norm, eps, x_L, x_U)
        module.BoundedTensor = lambda tensor, ball: (tensor, ball)
        module.BoundedModule = self.bounded
        monkeypatch.setitem(sys.modules, "auto_LiRPA", module)

    def bounded(self, module: nn.Module, _: Tensor, bound_opts: dict[str, str]) -> Any:
        self.options.append(bound_opts)
        network = Network.from_module(module, zonotope.SHAPE)

        def compute_bounds(x: Any, C: Tensor, method: str, bound_lower: bool) -> tuple[None, Tensor]:
            assert (method, bound_lower) == ("backward", False)
            ((points, (norm, eps, low, high)),) = x
            assert norm == float("inf")
            self.boxes.append((low, high))
            labels = (C == -1).any(1).long().argmax(1)  # the column that every other row takes away
            slopes = "zonotope" if bound_opts["relu"] == "same-slope" else "crown"
            found = check(network, points, labels, eps=eps, method=slopes).margins_upper  # type: ignore[arg-type]
            return None, found.clamp(min=-1e9)

        return types.SimpleNamespace(compute_bounds=compute_bounds)


def test_ways_bound_the_same_margins_and_are_compared_with_their_own_kind() -> None:
    contestants = [each for each in certify.ways(MODULE) if each.name.startswith("Hawthorn")]
    assert [each.slopes for each in contestants] == ["equal", "adaptive", "equal"]
    rows = certify.compete(contestants, POINTS, LABELS, (0.01, 0.05), 1)
    assert [(row["way"], row["eps"]) for row in rows] == [(c.name, eps) for eps in (0.01, 0.05) for c in contestants]
    for row in rows:
        assert row["off"] < 1e-4
        assert row["cpu"] > 0
        assert row["x_ours"] == 1.0 or row["way"] == "Hawthorn, forward"
    expected = check(Network.from_module(MODULE, zonotope.SHAPE), POINTS, LABELS, eps=0.01).margins_upper
    assert rows[0]["certified"] == int((expected < 0).all(1).sum())


def test_a_way_with_other_bounds_shows() -> None:
    network = Network.from_module(MODULE, zonotope.SHAPE)

    def loose(inputs: Tensor, labels: Tensor, eps: float) -> Tensor:
        return check(network, inputs, labels, eps=eps).margins_upper + 0.5

    rows = certify.compete(
        [*certify.ways(MODULE)[:2], certify.Contestant("peer", "equal", loose)], POINTS, LABELS, (0.02,), 1
    )
    found = {"inputs": {"rows": rows}, "votes": []}
    off = next(t for t in certify_report.judged(found) if t["target"].startswith("bounds of the peers"))
    assert off["value"] > 0.01
    assert off["met"] is False


def test_auto_lirpa_is_asked_for_the_same_bounds_in_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeBounds()
    fake.install(monkeypatch)
    points = torch.rand(6, *zonotope.SHAPE, generator=generator(3))
    labels = torch.arange(6)
    network = Network.from_module(MODULE, zonotope.SHAPE)
    for slope, method in (("same-slope", "zonotope"), ("adaptive", "crown")):
        found = certify.auto_lirpa(MODULE, slope)(points, labels, 0.1)
        expected = check(network, points, labels, eps=0.1, method=method).margins_upper  # type: ignore[arg-type]
        other = nn.functional.one_hot(labels, 10) == 0
        torch.testing.assert_close(found[other], expected[other], rtol=1e-5, atol=1e-5)
    assert [set(options.values()) for options in fake.options] == [{"same-slope"}, {"adaptive"}]
    assert [len(low) for low, _ in fake.boxes] == [4, 2, 4, 2]
    low, high = fake.boxes[0]
    assert float(low.min()) >= 0
    assert float(high.max()) <= 1
    assert float((high - low).max()) == pytest.approx(0.2)


def test_a_peer_that_cannot_be_used_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "auto_LiRPA", None)
    monkeypatch.setattr(zonotope, "art_way", lambda module: None)
    left = {each.name: each.way for each in certify.ways(MODULE) if isinstance(each.way, str)}
    assert set(left) == {"IBM ART, zonotope", "auto_LiRPA, same slope", "auto_LiRPA, CROWN"}
    assert 'adversarial-robustness-toolbox "numpy<2.4"' in str(left["IBM ART, zonotope"])
    assert "auto_LiRPA" in str(left["auto_LiRPA, CROWN"])

    def broken() -> zonotope.Way:
        return lambda inputs, labels, eps: (_ for _ in ()).throw(ValueError("no\nmore"))

    assert certify.usable(broken) == "ValueError: no"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures with Linux's /proc")
def test_memory_is_that_of_one_call() -> None:
    def way(inputs: Tensor, labels: Tensor, eps: float) -> Tensor:
        return torch.ones(20_000_000).sum()[None]

    for _ in range(2):  # the same again, whatever was used before
        assert 70e6 < (certify.memory_of(way, POINTS, LABELS, 0.1) or 0) < 110e6


def row(way: str, x_ours: float, memory: int, off: float = 0.0) -> dict[str, Any]:
    return {"way": way, "x_ours": x_ours, "memory": memory, "off": off}


def test_targets_are_met_missed_or_not_measured() -> None:
    ours = row("Hawthorn, zonotope", 1.0, 40)
    peers = [row("IBM ART, zonotope", 5.0, 80, 1e-6), row("IBM ART, zonotope", 2.9, 80, 1e-6)]
    votes = [{"way": "batched noisy weights", "faster_than_reference": 200.0, "faster_than_lean": 9.0}]
    found = {"inputs": {"rows": [ours, *peers]}, "votes": votes}
    assert [t["met"] for t in certify_report.judged(found)] == [False, None, None, True, True, True, False]
    assert certify_report.judged(found)[0]["value"] == 2.9, "the worst radius counts"
    assert all(t["met"] is None for t in certify_report.judged({"inputs": {}, "votes": []}))


@pytest.mark.parametrize(
    "arguments",
    [["--only", "nothing"], ["--only", ""], ["--points", "0"], ["--repeats", "0"], ["--many", "-1"]],
)
def test_wrong_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        certify.main(arguments)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_one_command_runs_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need_mnist()
    out = tmp_path / "found.json"
    assert certify.main(["--quick", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert {row["way"] for row in found["inputs"]["rows"]} >= set(certify_report.OURS.values())
    assert not found["inputs"]["trained"]
    assert [row["way"] for row in found["votes"]][2:4] == ["batched noisy weights", "logits sampled"]
    assert len(found["targets"]) == len(certify_report.TARGETS)
    text = capfd.readouterr().out
    assert "NOT trained" in text
    assert "--quick: no measurement" in text
    for name, reason in found["inputs"]["left_out"].items():
        assert f"left out: {name}: {reason}" in text


def test_missing_data_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAWTHORN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HAWTHORN_DATA", raising=False)
    assert certify.main(["--quick", "--only", "votes"]) == 2
    with pytest.raises(SystemExit) as stopped:
        certify.main(["--quick", "--only", "inputs"])
    assert stopped.value.code == 2
