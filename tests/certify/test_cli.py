"""The commands as a user calls them: a round trip on digits, exit codes, what errors say."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from certify import cli
from certify.commands.console import stoppable
from certify.crfl.training_record import ClientWork, RoundWork, TrainingRecord
from certify.files.lines import read

ROOT = Path(__file__).parents[2]
QUICK = ["--sigma", "0.05", "--num-draws", "200", "--alpha", "0.01", "--points", "12"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like a run's, with a training record."""
    folder = tmp_path_factory.mktemp("run")
    weight = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)) / 4
    save_file({"linear.weight": weight, "linear.bias": torch.zeros(10)}, folder / "model.safetensors")
    settings = {"model": "logistic_regression()", "dataset": "digits()"}
    (folder / "run.json").write_text(json.dumps({"settings": settings}))
    work = RoundWork(participants=(0, 1), weights=(0.5, 0.5), learning_rates=(0.001,) * 2, clip_norm=5.0, noise=0.05)
    local = [ClientWork(client=c, weight=0.5, learning_rate=0.001, batch_sizes=(9,), poisoned=(1 - c,)) for c in (0, 1)]
    TrainingRecord(
        model="logistic_regression()", bias=True, num_classes=10, num_params=650, num_clients=2, rounds=(work, work),
        smoothing_sigma=0.05, attack_round=1, attackers=(0,), work=tuple(local), label_flips=False,
        data_norm_bound=8.0, start_norm=1.0,
    ).save(folder / "crfl.json")  # fmt: skip
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def test_smooth_show_verify_plot(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    text = done("smooth", run, *QUICK, "--out", out)
    assert "two_stage/clopper_pearson" in text
    assert "verified: 12 certificates" in done("verify", out)
    assert "recomputed from the model: 4 (--sample-seed 3)" in done("verify", out, "--sample", 4, "--sample-seed", 3)
    summary = json.loads(done("show", out, "--json"))
    assert summary["complete"]
    assert summary["claims"][0]["points"] == 12
    assert summary["claims"][0]["certified"] == sum(not c.abstained for c in read(out).certificates)
    assert "picture:" in done("plot", out, "--out", tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    before = out.read_bytes()
    done("smooth", run, *QUICK, "--out", out)  # there already
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (["--exact"], "smooth/exact/quadrature"),
        (["--margin"], "smooth/margin"),
        (["--bound", "simultaneous", "--joint"], "smooth/simultaneous/clopper_pearson"),
        (["--bound", "paper"], "smooth/crfl_top_two/hoeffding"),
    ],
)
def test_other_ways_to_find_votes(options: list[str], method: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    done("smooth", run, *QUICK, *options, "--out", out)
    assert {certificate.method for certificate in read(out).certificates} == {method}
    done("verify", out, "--all")


def test_crfl_from_a_run_and_from_a_record(run: Path, tmp_path: Path) -> None:
    quick = QUICK[2:]
    done("crfl", run, *quick, "--form", "margin", "--out", tmp_path / "margin.jsonl")
    model = ["--model-file", run, "--dataset", "digits()"]
    done("crfl", run / "crfl.json", *model, *quick, "--level", "client", "--out", tmp_path / "client.jsonl")
    text = done("crfl", run, *quick, "--certificate", "paper", "--bound", "paper", "--out", tmp_path / "paper.jsonl")
    assert "warning: Corollary 1 does not apply" in text
    assert "violated" in text
    for name in ("margin", "client", "paper"):
        done("verify", tmp_path / f"{name}.jsonl")
    units = {read(tmp_path / f"{name}.jsonl").certificates[0].unit for name in ("margin", "client")}
    assert units == {"l2", "clients"}
    (tmp_path / "moved.json").write_bytes((run / "crfl.json").read_bytes())
    done("verify", tmp_path / "margin.jsonl", "--record", tmp_path / "moved.json")


def test_zonotope(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "bounds.jsonl"
    done("zonotope", run, "--eps", 0.01, "--eps", 0.001, "--points", 6, "--first", 3, "--out", out)
    file = read(out)
    assert file.header.points.indices == (3, 4, 5, 6, 7, 8)
    assert [c.parameters["eps"] for c in file.certificates] == [0.001] * 6 + [0.01] * 6
    done("verify", out, "--sample", 2)


def test_a_changed_file_fails_with_1(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "votes.jsonl"
    done("smooth", run, *QUICK, "--margin", "--out", out)
    lines = out.read_text().splitlines()
    for number in (2, 3, 4):
        lines[number] = lines[number].replace('"closed":false', '"closed":true')
    out.write_text("\n".join(lines) + "\n")
    result = call("verify", out)
    assert result.exit_code == 1
    assert "lines 3 to 5 (3 certificates): closed is True, recomputed False" in result.output
    assert "NOT verified: 3 findings" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["smooth", "nowhere.safetensors", "--out", "o", "--model", "logistic_regression()", "--dataset", "digits()",
          "--points", "5"], "holds no model"),
        (["smooth", "nowhere.safetensors", "--out", "o"], "give --model"),
        (["smooth", "RUN", "--sigma", "0", "--out", "o"], "sigma must be above 0"),
        (["smooth", "RUN", "--points", "5", "--device", "nonsense", "--out", "o"], "device 'nonsense' cannot be used"),
        (["crfl", "nowhere", "--out", "o"], "no training record nowhere"),
        (["zonotope", "RUN", "--eps", "-1", "--out", "o"], "eps must be radii above 0"),
        (["zonotope", "RUN", "--eps", "0.1", "--input-range", "0", "0.5", "--out", "o"], "inside input_range"),
        (["verify", "nowhere.jsonl"], "cannot read nowhere.jsonl"),
        (["show", "RUN/run.json"], "line 1: "),
        (["plot", "nowhere.jsonl", "--out", "p.png"], "cannot read"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do_and_exit_with_2(
    arguments: list[str], message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*(argument.replace("RUN", str(run)) for argument in arguments))
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_sound_certificate_that_cannot_be_is_refused(run: Path, tmp_path: Path) -> None:
    record = json.loads((run / "crfl.json").read_text())
    (tmp_path / "crfl.json").write_text(json.dumps({**record, "momentum": 0.9}))
    arguments = ["crfl", tmp_path / "crfl.json", "--model-file", run, "--dataset", "digits()", *QUICK[2:]]
    result = call(*arguments, "--out", tmp_path / "c.jsonl")
    assert result.exit_code == 2
    assert "plain_sgd" in result.output
    assert not (tmp_path / "c.jsonl").exists()


def test_the_first_signal_asks_and_the_second_ends() -> None:
    with stoppable() as should_stop:
        assert not should_stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_interrupted_work_exits_with_130_and_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, plain = tmp_path / "votes.jsonl", tmp_path / "plain.jsonl"
    done("smooth", run, *QUICK, "--out", plain)
    from certify.files import make

    class Stop(make._Keep):
        def __call__(self, votes: object) -> None:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(make, "_Keep", Stop)
        result = call("smooth", run, *QUICK, "--out", out)
    assert result.exit_code == 130
    assert "the same command goes on" in result.output
    done("smooth", run, *QUICK, "--out", out)
    assert out.read_bytes() == plain.read_bytes()


def test_python_m_certify_works_without_flower(run: Path, tmp_path: Path) -> None:
    (tmp_path / "flwr.py").write_text("raise ModuleNotFoundError('Flower is blocked in this test', name='flwr')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "certify", "smooth", str(run), "--margin", "--points", "4", "--out", "c.jsonl"]
    finished = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert len(read(tmp_path / "c.jsonl").certificates) == 4


def test_status_of_a_service_and_of_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = pytest.importorskip("certify.service.serve").start
    monkeypatch.setenv("HAWTHORN_CERTIFY_TOKEN", "a-token-of-enough-letters")
    with start(store=tmp_path / "store", device="cpu", token="a-token-of-enough-letters") as service:
        place = f"127.0.0.1:{service.port}"
        assert "serving" in done("status", "--address", place)
        assert json.loads(done("status", "--address", place, "--json"))["device"] == "cpu"
        (tmp_path / "token").write_text("another-token-of-letters\n")
        result = call("status", "--address", place, "--token-file", tmp_path / "token")
        assert result.exit_code == 1
        assert "UNAUTHENTICATED" in result.output
    result = call("status", "--address", place, "--timeout", 0.5)
    assert result.exit_code == 1
    assert "not well" in result.output
