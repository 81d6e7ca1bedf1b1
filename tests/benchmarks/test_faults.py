"""The faults that need no federation of processes, and the parts that the others and the soak are judged by.

The whole table is `python benchmarks/faults.py`; killed SuperNodes are also in tests/hawthorn/test_engines.py.
"""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import faults  # noqa: E402
import soak  # noqa: E402

from benchmarks.deployment import nodes, servers, trial  # noqa: E402
from server.record import RoundRecord, RunRecord  # noqa: E402
from tasks.config import RunConfig  # noqa: E402


def record(*rounds: int, status: str = "finished") -> RunRecord:
    made = [
        RoundRecord(
            n, 0.5, None, 1.0, [0, 1], [], [], [0], {"1": "no reply within 5 s"}, None, [1.0], 1.0, 1.0, None, ""
        )
        for n in rounds
    ]
    return RunRecord(Path("."), RunConfig(num_rounds=3), status, made, None)


def test_a_run_is_complete_with_every_round_once() -> None:
    assert trial.complete(record(1, 2, 3))
    assert not trial.complete(record(1, 3))
    assert not trial.complete(record(1, 2, 2))
    assert not trial.complete(record(1, 2, 3, status="interrupted"))
    assert trial.reasons(record(1, 2, 3)) == "client 1 dropped in 3 rounds: no reply within 5 s"


def test_a_frozen_network_holds_bytes_back_and_loses_none() -> None:
    with socket.create_server(("127.0.0.1", 0)) as echo:
        port = echo.getsockname()[1]

        def answer() -> None:
            connection, _ = echo.accept()
            while data := connection.recv(100):
                connection.sendall(data)

        threading.Thread(target=answer, daemon=True).start()
        proxy = nodes.Freezer(port)
        with socket.create_connection(("127.0.0.1", proxy.port), 5) as client:
            client.sendall(b"one")
            assert client.recv(10) == b"one"
            proxy.open.clear()
            client.sendall(b"two")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                client.recv(10)
            proxy.open.set()
            client.settimeout(5)
            assert client.recv(10) == b"two"
        proxy.listener.close()


def test_a_full_disk_loses_no_finished_round(tmp_path: Path) -> None:
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("needs unshare, to mount a small disk")
    if subprocess.run(["unshare", "--map-root-user", "--mount", "true"], check=False, capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    row = servers.full_disk(tmp_path)
    assert row.passed, row
    assert "cannot write" in row.seen


def test_a_fault_that_raises_is_a_failure_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> trial.Row:
        raise RuntimeError("of its own")

    fine = trial.Row("fine", "seen", "nothing", 1.0, True)
    monkeypatch.setattr(faults, "FAULTS", {"broken": broken, "fine": lambda folder: fine})
    rows = list(faults.try_faults(["broken", "fine"]))
    assert [row.passed for row in rows] == [False, True]
    assert "of its own" in rows[0].seen
    assert faults.table(rows).row_count == 2


def test_what_was_seen_stays_when_a_later_fault_ends_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fatal(_: Path) -> trial.Row:
        raise KeyboardInterrupt

    fine = trial.Row("fine", "seen", "nothing", 1.0, True)
    monkeypatch.setattr(faults, "FAULTS", {"fine": lambda folder: fine, "fatal": fatal})
    out = tmp_path / "rows.json"
    monkeypatch.setattr(sys, "argv", ["faults.py", "--only", "fine,fatal", "--json", str(out)])
    with pytest.raises(KeyboardInterrupt):
        faults.main()
    assert [row["fault"] for row in json.loads(out.read_text())] == ["fine"]


def test_the_soak_kills_whose_turn_it_is_while_half_are_there_and_notes_who_is_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed: list[int] = []

    class Federation:
        def kill(self, client: int) -> None:
            killed.append(client)

    monkeypatch.setattr(soak.Soaked, "it", Federation(), raising=False)
    killer, everybody = soak.Killer(rounds=60, clients=4, every=2, service=0), [0, 1, 2, 3]
    monkeypatch.setattr(killer, "look", lambda record: None)
    for number in range(1, 61):
        here = [c for c in everybody if c not in killed] if number < 20 else everybody
        (made,) = record(number).rounds
        killer(dataclasses.replace(made, clients=here))
    assert killed[:2] == [0, 1]
    assert [kill.back for kill in killer.seen.kills[:2]] == [20, 20]
    assert [kill.round for kill in killer.seen.kills[:3]] == [2, 4, 20]  # two of four are away until round 20
    assert killer.seen.kills[-1].round < 51
    assert all(kill.back for kill in killer.seen.kills)


def test_memory_that_grows_is_noticed() -> None:
    seen = soak.Soak({"flat": [200.0 + (i % 3) for i in range(20)], "leak": [200.0 + 10 * i for i in range(20)]})
    growth = seen.growth()
    assert soak.flat({"flat": growth["flat"]})
    assert not soak.flat(growth)
    assert soak.resident(os.getpid()) > 20
    assert soak.resident(2**22 + 1) == 0


def test_a_process_is_found_by_name_and_mark() -> None:
    if sys.platform != "linux":
        pytest.skip("reads /proc")
    code = (
        "import pathlib, time; pathlib.Path('/proc/self/comm').write_text('flwr-serverapp'[:15]); print(1, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(30)"], env={**os.environ, "MARKED": "a-mark-of-this-test"},
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 25
        while (found := soak.named("flwr-serverapp", "a-mark-of-this-test")) is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == process.pid
        assert soak.named("flwr-serverapp", "another-mark") is None
    finally:
        process.kill()
        process.wait()
