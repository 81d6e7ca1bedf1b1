"""The command line as a user meets it: one run, its files, its report, and errors without tracebacks."""

import json
import subprocess
import sys
import time

import pytest

QUICK = ["--set", "num-clients=5", "--set", "num-rounds=2", "--set", "workers=1"]


def hawthorn(*words, folder, check=True):
    done = subprocess.run(
        [sys.executable, "-m", "hawthorn.cli", *words], capture_output=True, text=True, cwd=folder, timeout=300
    )
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    done = hawthorn("run", *QUICK, "--keep-updates", folder=folder)
    return folder, done.stdout


def test_run_without_a_file_runs_the_quickstart(finished):
    folder, text = finished
    assert "quickstart/undefended: ACC=" in text
    assert "quickstart/defended: ACC=" in text
    for arm in ("undefended", "defended"):
        lines = (folder / "runs/quickstart" / arm / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [1, 2]
        assert {"acc", "asr", "seconds"} <= json.loads(lines[0]).keys()
        assert (folder / "runs/quickstart" / arm / "model.safetensors").exists()
    assert (folder / "runs/quickstart/report.html").stat().st_size > 10_000
    assert (folder / "runs/quickstart/report.png").exists()


def test_compare_report_and_replay(finished):
    folder, _ = finished
    rows = json.loads(hawthorn("compare", "runs/quickstart", "--json", folder=folder).stdout)
    assert len(rows) == 2
    assert "undefended" in hawthorn("compare", "runs/quickstart", folder=folder).stdout
    assert hawthorn("compare", "runs/quickstart", "--csv", folder=folder).stdout.count("\n") == 3
    hawthorn("report", "runs/quickstart/defended", "--out", "mine.html", folder=folder)
    assert (folder / "mine.html").exists()
    text = hawthorn("replay", "runs/quickstart/undefended", "--rule", "median()", "--json", folder=folder).stdout
    assert len(json.loads(text)["rounds"]) == 2


def test_resume_of_a_finished_run_does_nothing(finished):
    folder, _ = finished
    assert (
        "nothing to do" in hawthorn("run", "--resume", "runs/quickstart/defended", "--no-report", folder=folder).stdout
    )


def test_resume_with_more_rounds_goes_on(finished):
    folder, _ = finished
    done = hawthorn(
        "run", "--resume", "runs/quickstart/undefended", "--set", "num-rounds=3", "--no-report", folder=folder
    )
    assert "going on" in done.stdout
    assert (folder / "runs/quickstart/undefended/rounds.jsonl").read_text().count("\n") == 3


def test_list_shows_everything(finished):
    folder, _ = finished
    text = hawthorn("list", folder=folder).stdout
    for word in ("krum", "patch_backdoor", "num-rounds", "quickstart", "in_process", "dirichlet_dba"):
        assert word in text
    assert "krum" in hawthorn("list", "rules", folder=folder).stdout
    assert "digits" in hawthorn("data", "list", folder=folder).stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["run", "--set", "rule=krumm()"], "unknown rule 'krumm'; there are: "),
        (["run", "--set", "rounds=3"], "did you mean 'num-rounds'"),
        (["run", "--engine", "ray"], "there are: in_process, flower, cluster"),
        (["run", "nothing.toml"], "shipped are: "),
        (["run", "--set", "dataset=mnist()", "--data-dir", "."], "hawthorn data prepare mnist"),
        (["report", "nowhere"], "no run folder"),
        (["run", "--resume", "nowhere"], "no run folder"),
        (["list", "nonsense"], "unknown kind 'nonsense'; there are: "),
        (["data", "prepare", "nonsense"], "there are: cifar10"),
    ],
)
def test_errors_have_no_traceback_and_say_what_exists(words, says, tmp_path, monkeypatch):
    monkeypatch.delenv("HAWTHORN_DATA", raising=False)
    monkeypatch.setenv("HAWTHORN_CACHE", str(tmp_path / "cache"))
    done = hawthorn(*words, folder=tmp_path, check=False)
    assert done.returncode == 1
    assert says in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_second_writer_is_refused_and_the_first_keeps_its_folder(tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-m", "hawthorn.cli", "run", *QUICK, "--set", "num-rounds=4000", "--name", "same"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
    )
    lines = tmp_path / "runs/same/undefended/rounds.jsonl"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (lines.exists() and lines.stat().st_size):
            time.sleep(0.05)
        second = hawthorn("run", *QUICK, "--name", "same", folder=tmp_path, check=False)
        assert second.returncode == 1
        assert "another process is writing" in " ".join(second.stderr.split())
    finally:
        first.terminate()
        first.wait(30)
    numbers = [json.loads(line)["round"] for line in lines.read_text().splitlines()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert json.loads((tmp_path / "runs/same/undefended/run.json").read_text())["status"] == "interrupted"


def test_an_earlier_run_is_kept_apart(finished):
    folder, _ = finished
    one = ["--arm", "undefended", "--name", "twice", "--no-report"]
    hawthorn("run", *QUICK, *one, folder=folder)
    assert "earlier/twice.1" in hawthorn("run", *QUICK, *one, folder=folder).stdout
    assert len(json.loads(hawthorn("compare", "runs/twice", "--json", folder=folder).stdout)) == 1


def test_hopeless_runs_are_said_to_be_hopeless(finished):
    folder, _ = finished
    attack = ["--set", "attack=corrupt_reply(kinds=('nan',))", "--arm", "undefended", "--no-report"]
    done = hawthorn("run", *QUICK, *attack, "--name", "nan", folder=folder)
    assert "every attacking client's reply was dropped" in done.stdout


def test_paths_with_markup_and_spaces(tmp_path):
    folder = tmp_path / "b [red]x ü"
    done = hawthorn("run", *QUICK, "--arm", "defended", "--runs-dir", str(folder), folder=tmp_path)
    assert "[red]" in done.stdout
    assert (folder / "quickstart/report.html").exists()
