"""What the engines with real processes are made of: settings as text, ports, logs, endings, the warm fork server."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flwr.common.config import parse_config_args
from hypothesis import given
from hypothesis import strategies as st

from hawthorn.engines import _launcher, _processes, _waits, _warm
from hawthorn.engines._endings import MARK, end_groups, end_marked, interrupt, is_running, marked
from hawthorn.engines._processes import Workplace, environment, find_program, free_ports
from hawthorn.engines._superlink import app_pyproject, key_values, toml_value
from hawthorn.engines._tail import LineTail
from hawthorn.engines.cluster import node_config, poll_interval
from hawthorn.engines.flower import simulation_settings
from tasks.config import RunConfig
from tasks.errors import EngineError

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and forks without exec, which only Linux does")
# Text that TOML can hold at all: everything but lone surrogates.
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
scalars = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | texts
keys = st.from_regex(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", fullmatch=True)


def wait_for(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fail if it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


# -- settings as text -------------------------------------------------------------------------------------------------


@given(scalars)
def test_a_scalar_survives_toml(value: bool | int | float | str) -> None:
    read = tomllib.loads(f"value = {toml_value(value)}")["value"]
    assert read == value
    assert type(read) is type(value)


@given(st.dictionaries(keys, scalars, min_size=1, max_size=5))
def test_flower_reads_node_config_as_written(settings: dict[str, bool | int | float | str]) -> None:
    assert parse_config_args([key_values(settings)]) == settings


def test_an_attack_with_quotes_and_commas_survives_node_config() -> None:
    attack = (
        """patch_backdoor(target=2, where="it's a 'corner'", size=(3, 3)) | scale_update(factor=10.0) \\ x=1.toml"""
    )
    assert parse_config_args([key_values({"partition-id": 3, "attack": attack})]) == {
        "partition-id": 3,
        "attack": attack,
    }


def test_the_app_holds_the_settings_with_their_types() -> None:
    settings = RunConfig(num_rounds=3, attack='x(a="b")', tau=0.0, max_update_norm=1e6, resume=True).settings()
    app = tomllib.loads(app_pyproject(settings))["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}
    assert app["config"] == settings
    assert {key: type(value) for key, value in app["config"].items()} == {k: type(v) for k, v in settings.items()}


def test_only_malicious_nodes_know_an_attack() -> None:
    config = RunConfig(num_clients=3, malicious_clients="1", attack="sign_flip()")
    assert node_config(config, 0) == {"partition-id": 0, "num-partitions": 3}
    expected = {"partition-id": 1, "num-partitions": 3, "role": "malicious", "attack": "sign_flip()"}
    assert node_config(config, 1) == expected


def test_more_nodes_look_for_work_less_often() -> None:
    intervals = [poll_interval(number) for number in (1, 4, 20, 40, 1000)]
    assert intervals == sorted(intervals)
    assert intervals[0] == 0.05
    assert intervals[-1] == 1.0


def test_the_simulation_asks_for_no_more_workers_than_clients() -> None:
    assert simulation_settings(1)["init_args_num_cpus"] == 1
    assert simulation_settings(10_000)["init_args_num_cpus"] == os.cpu_count()


# -- ports, programs, environment -------------------------------------------------------------------------------------


def test_free_ports_are_different_and_free() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as server:
            server.bind(("127.0.0.1", port))


def test_a_missing_program_says_what_to_install() -> None:
    with pytest.raises(EngineError, match=r"flower-nothing.*pip install"):
        find_program("flower-nothing")


def test_the_environment_is_quiet_and_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    variables = environment(tmp_path)
    assert variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert variables["PATH"].split(os.pathsep)[0] == str(tmp_path / "bin")
    assert variables["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert variables[MARK] != environment(tmp_path)[MARK]


# -- tailing ----------------------------------------------------------------------------------------------------------


def test_tail_reports_each_whole_line_once(tmp_path: Path) -> None:
    path, seen = tmp_path / "rounds.jsonl", []
    tail = LineTail(path, json.loads)
    tail.read(seen.append)
    path.write_text('{"round": 1}\n{"rou')
    tail.read(seen.append)
    tail.read(seen.append)
    assert seen == [{"round": 1}]
    with path.open("a") as file:
        file.write('nd": 2}\n{"round": 3}\n')
    tail.read(seen.append)
    assert [record["round"] for record in seen] == [1, 2, 3]


def test_tail_leaves_old_lines_alone_but_follows_a_new_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "rounds.jsonl", []
    path.write_text('{"round": 1}\n{"round": 2}\n')
    tail = LineTail(path, json.loads)
    tail.read(seen.append)
    assert seen == []
    path.write_text('{"round": 7}\n')  # cut short and written anew
    tail.read(seen.append)
    new = tmp_path / "new"
    new.write_text('{"round": 8}\n{"round": 9}\n{"round": 10}\n')
    new.replace(path)
    tail.read(seen.append)
    assert [record["round"] for record in seen] == [7, 8, 9, 10]


# -- ending -----------------------------------------------------------------------------------------------------------

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"


@linux
def test_a_group_ends_with_its_stubborn_grandchildren() -> None:
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", parent, STUBBORN], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        begin = time.monotonic()
        end_groups([process], grace=1.0)
    assert time.monotonic() - begin < 30
    assert process.returncode == -signal.SIGTERM
    wait_for(lambda: not any(is_running(int(child)) for child in children))


@linux
def test_marked_processes_are_found_in_any_session() -> None:
    mark = "test-" + os.urandom(8).hex()
    variables = {**os.environ, MARK: mark}
    process = subprocess.Popen([sys.executable, "-c", STUBBORN], env=variables, start_new_session=True)
    try:
        wait_for(lambda: marked(mark) == [process.pid])
        assert end_marked(mark) == [process.pid]
        assert process.wait(60) == -signal.SIGKILL
    finally:
        process.kill()
    assert marked(mark) == []


@linux
@pytest.mark.parametrize("handler", ["lambda *_: sys.exit(0)", "signal.SIG_IGN"])
def test_an_interrupted_process_has_some_time_to_end(handler: str) -> None:
    code = f"import signal, sys, time; signal.signal(signal.SIGINT, {handler}); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "up\n"
        begin = time.monotonic()
        interrupt(process.pid, grace=0.5)
        assert time.monotonic() - begin < 30
        assert is_running(process.pid) == (handler == "signal.SIG_IGN")
        process.kill()
    assert not is_running(process.pid)


def test_a_workplace_ends_and_removes_everything(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Workplace(tmp_path / "logs") as workplace:
        program = workplace.folder / "bin" / "sleeper"
        program.write_text(f"#!/bin/sh\necho here\nexec {sys.executable} -c 'import time; time.sleep(60)'\n")
        program.chmod(0o755)
        pid = workplace.start("sleeper", ["sleeper"])
        wait_for(lambda: "here" in workplace.log_tail("sleeper"))
        assert workplace.exit_code("sleeper") is None
        assert os.getpgid(pid) == pid
        assert signal.getsignal(signal.SIGTERM) is not before
    assert workplace.exit_code("sleeper") == -signal.SIGTERM
    assert not workplace.folder.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_workplace_ends_when_the_engine_is_told_to(tmp_path: Path) -> None:
    folders = []

    def work() -> None:
        with Workplace(tmp_path / "logs") as workplace:
            folders.append(workplace.folder)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)

    with pytest.raises(SystemExit) as exit_info:
        work()
    assert exit_info.value.code == 128 + signal.SIGTERM
    assert not folders[0].exists()


# -- shorter waits ----------------------------------------------------------------------------------------------------


def test_sleeps_are_capped_only_where_they_are_as_expected() -> None:
    module = types.ModuleType("loop")
    assert not _waits.cap_sleeps(module, 0.01)
    module.time = time  # type: ignore[attr-defined]
    assert _waits.cap_sleeps(module, 0.01)
    begin = time.monotonic()
    module.time.sleep(60)  # type: ignore[attr-defined]
    assert module.time.monotonic() - begin < 30  # type: ignore[attr-defined]


def test_a_refusal_is_told_before_the_process_ends_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Refused(Exception):
        def details(self) -> str:
            return "Invalid timestamp"

    module = types.ModuleType("retries")
    assert not _waits.tell_refusals(module)
    module.os = os  # type: ignore[attr-defined]
    assert _waits.tell_refusals(module)
    assert module.os.getpid() == os.getpid()  # type: ignore[attr-defined]
    codes: list[int] = []
    monkeypatch.setattr(_waits.os, "_exit", codes.append)
    try:
        raise Refused
    except Refused:
        module.os.kill(12, signal.SIGINT)  # type: ignore[attr-defined]
    assert codes == [1]
    assert "Invalid timestamp; this machine's clock" in capsys.readouterr().out


def test_a_program_without_the_warm_server_has_the_shorter_waits_too(tmp_path: Path) -> None:
    with Workplace(tmp_path) as workplace:
        launcher = (workplace.folder / "bin" / "flower-supernode").read_text()
        cold = workplace.folder / "bin" / "cold-flower-supernode"
        assert str(cold) in launcher
        result = subprocess.run(
            [str(cold), "--version"], env=workplace.environment, capture_output=True, text=True, check=False
        )
    assert "1.36" in result.stdout, result.stderr
    assert result.returncode == 0


def test_constants_change_only_if_they_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("some_constants")
    module.WAIT = 7  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_constants", module)
    assert _waits.shorten_constants({"some_constants": {"WAIT": 1, "OTHER": 2}}) == ["WAIT"]
    assert module.WAIT == 1  # type: ignore[attr-defined]
    assert not hasattr(module, "OTHER")


@pytest.mark.parametrize("reference", _warm.PROGRAMS.values())
def test_every_program_of_the_warm_server_exists(reference: str) -> None:
    assert callable(_warm.entry(reference))


def test_flower_still_has_what_the_shorter_waits_change() -> None:
    # In a process of its own: the constants of this one are not to be touched.
    code = "from hawthorn.engines import _waits; print(_waits.shorten_constants());"
    code += "import flwr.supercore.inflatable.inflatable_utils as u, flwr.supercore.heartbeat as h;"
    code += "print(u.pull_objects.__kwdefaults__['initial_backoff'], h.HEARTBEAT_DEFAULT_INTERVAL);"
    code += "import importlib;"
    code += "loops = ['flwr.supernode.start_client_internal', 'flwr.superlink.grid.http_grid'];"
    code += "print([_waits.cap_sleeps(importlib.import_module(loop), 1) for loop in loops])"
    code += ";print(_waits.tell_refusals(importlib.import_module('flwr.supercore.retry.grpc_retry')))"
    variables = {**os.environ, "PYTHONPATH": str(_processes.PACKAGE_ROOT), "FLWR_TELEMETRY_ENABLED": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [
        "['PULL_INITIAL_BACKOFF', 'HEARTBEAT_DEFAULT_INTERVAL']",
        "0.05 10",
        "[True, True]",
        "True",
    ]


# -- the warm fork server ---------------------------------------------------------------------------------------------

DUMMY = """
import json, os, random, signal, subprocess, sys, time

LOADED_BY = 0

def preload(settings):
    global LOADED_BY
    LOADED_BY = os.getpid()
    print("preloaded", settings["answer"], flush=True)

def task():
    if sys.argv[1] == "exit":
        sys.exit(int(sys.argv[2]))
    if sys.argv[1] == "raise":
        raise RuntimeError("as asked")
    if sys.argv[1] == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
        print("pid", os.getpid(), flush=True)
        while True:
            time.sleep(0.05)
    facts = {"argv": sys.argv, "folder": os.getcwd(), "color": os.environ.get("COLOR"), "loaded": LOADED_BY,
             "pid": os.getpid(), "random": random.random(), "parent": os.getppid(), "session": os.getsid(0)}
    print(json.dumps(facts))
    print("to stderr", file=sys.stderr)

def root():
    child = subprocess.Popen([sys.argv[1], "wait"], stdout=subprocess.PIPE, text=True, start_new_session=True)
    print("root", os.getpid(), child.pid, child.stdout.readline().split()[1], os.getppid(), flush=True)
    if sys.argv[2:] == ["leave"]:
        return
    signal.pause()
"""


class Bench:
    """A warm fork server with a dummy module, and launchers for its programs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "dummy.py").write_text(DUMMY)
        self.address = folder / "warm"
        programs = {"task": "dummy:task", "flower-supernode": "dummy:root"}
        plan = {"address": str(self.address), "modules": ["dummy", "no_such_module"], "settings": {"answer": 42}}
        (folder / "plan.json").write_text(json.dumps({**plan, "programs": programs}))
        self.environment = {
            **os.environ,
            "PYTHONPATH": f"{_processes.PACKAGE_ROOT}{os.pathsep}{folder}",
            "COLOR": "of the server",
        }
        with (folder / "warm.log").open("wb") as log:
            self.server = subprocess.Popen(
                [sys.executable, _warm.__file__, str(folder / "plan.json")],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        real = folder / "real"
        real.write_text('#!/bin/sh\necho "the real one: $@"\nexit 5\n')
        real.chmod(0o755)
        for program in (*programs, "unknown"):
            path = folder / program
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {_launcher.__file__} {program} {real} "$@"\n')
            path.chmod(0o755)
        self.variables = {**self.environment, _launcher.SOCKET_VARIABLE: str(self.address), "COLOR": "blue"}
        wait_for(self.address.exists)

    def popen(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        """Start a program through its launcher, in another folder."""
        place = self.folder / "elsewhere"
        place.mkdir(exist_ok=True)
        command = [str(self.folder / program), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.variables, cwd=place, stdout=pipe, stderr=pipe, text=True)

    def run(self, program: str, *arguments: str) -> tuple[int, str, str]:
        """Run a program to its end; return its code and what it printed."""
        process = self.popen(program, *arguments)
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors

    def close(self) -> None:
        """End the server by closing its lifeline."""
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(60)


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    if sys.platform != "linux":
        pytest.skip("the warm fork server is used on Linux only")
    place = Bench(tmp_path_factory.mktemp("w"))
    yield place
    place.close()


def test_a_forked_task_is_like_the_program_it_stands_for(bench: Bench) -> None:
    code, output, errors = bench.run("task", "facts", "two words", "ünï", "")
    facts = json.loads(output)
    assert code == 0
    assert errors == "to stderr\n"
    assert facts["argv"] == ["task", "facts", "two words", "ünï", ""]
    assert facts["folder"] == str(bench.folder / "elsewhere")
    assert facts["color"] == "blue"
    assert facts["loaded"] == facts["parent"] == bench.server.pid  # imported there, forked from there
    assert facts["pid"] != bench.server.pid


def test_two_forks_draw_different_random_numbers(bench: Bench) -> None:
    draws = {json.loads(bench.run("task", "facts")[1])["random"] for _ in range(3)}
    assert len(draws) == 3


def test_preload_gets_the_settings_and_a_failing_import_is_only_logged(bench: Bench) -> None:
    log = (bench.folder / "warm.log").read_text()
    assert "preloaded 42" in log
    assert "cannot preload no_such_module" in log


def test_exit_codes_are_passed_on(bench: Bench) -> None:
    assert bench.run("task", "exit", "3")[0] == 3
    code, _, errors = bench.run("task", "raise")
    assert code == 1
    assert "RuntimeError: as asked" in errors
    assert bench.run("task", "die")[0] == -signal.SIGKILL


def test_signals_are_passed_on(bench: Bench) -> None:
    process = bench.popen("task", "wait")
    assert process.stdout is not None
    assert process.stdout.readline().startswith("pid ")
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 7


def test_killing_the_launcher_kills_the_task(bench: Bench) -> None:
    process = bench.popen("task", "wait")
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[1])
    assert is_running(pid)
    process.kill()
    wait_for(lambda: not is_running(pid))
    process.communicate()


def test_many_tasks_run_at_once(bench: Bench) -> None:
    processes = [bench.popen("task", "exit", str(number)) for number in range(12)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == list(range(12))


def test_without_a_server_the_real_program_runs(bench: Bench) -> None:
    bench.variables[_launcher.SOCKET_VARIABLE] = str(bench.folder / "nobody")
    assert bench.run("task", "a", "b c") == (5, "the real one: a b c\n", "")
    del bench.variables[_launcher.SOCKET_VARIABLE]
    assert bench.run("task") == (5, "the real one: \n", "")


def test_a_program_the_server_does_not_know_is_run_for_real(bench: Bench) -> None:
    assert bench.run("unknown", "x") == (5, "the real one: x\n", "")


def start_root(bench: Bench, *more: str) -> tuple[subprocess.Popen[str], list[int]]:
    """Start a root that has started a task; return its launcher and the ids of root, launcher, task and server."""
    process = bench.popen("flower-supernode", str(bench.folder / "task"), *more)
    assert process.stdout is not None
    numbers = [int(number) for number in re.findall(r"\d+", process.stdout.readline())]
    assert len(numbers) == 4
    return process, numbers


def test_a_root_has_a_server_and_a_session_of_its_own(bench: Bench) -> None:
    process, (root, _, task, server) = start_root(bench)
    assert server != bench.server.pid
    assert os.getsid(root) == os.getsid(task) == server
    process.terminate()
    process.communicate(timeout=60)


@pytest.mark.parametrize("victim", ["launcher", "root", "server", "common"])
def test_whatever_dies_takes_all_below_with_it(bench: Bench, victim: str) -> None:
    process, numbers = start_root(bench)
    root, _, _, server = numbers
    os.kill(
        {"launcher": process.pid, "root": root, "server": server, "common": bench.server.pid}[victim], signal.SIGKILL
    )
    wait_for(lambda: not any(map(is_running, numbers)))
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


def test_a_root_that_leaves_takes_its_tasks_along(bench: Bench) -> None:
    process, numbers = start_root(bench, "leave")
    process.communicate(timeout=60)
    assert process.returncode == 0
    wait_for(lambda: not any(map(is_running, numbers)))


def test_closing_the_lifeline_ends_all(bench: Bench) -> None:
    process, numbers = start_root(bench)
    bench.close()
    wait_for(lambda: not any(map(is_running, numbers)))
    process.communicate(timeout=60)
