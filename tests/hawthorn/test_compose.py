"""The compose files, the image's scripts, and the engine that submits to a federation that runs already."""

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from hawthorn.engines import REMOTE, compose, find_engine
from hawthorn.engines._superlink import RunState
from hawthorn.experiment import read_experiment
from hawthorn.keys import KeyFolder, make_keys
from hawthorn.overrides import read_overrides
from server.writer import RunWriter
from tasks.config import RunConfig
from tasks.errors import ConfigError, EngineError
from tasks.task import load

ROOT = Path(__file__).resolve().parents[2]
FILE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES = FILE["services"]


# -- the files --------------------------------------------------------------------------------------------------------


def test_every_service_is_confined_and_checked() -> None:
    assert {"superlink", "serverapp", "certify", "client", "malicious-1", "malicious-2", "flip"} == set(SERVICES)
    for name, service in SERVICES.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert re.fullmatch(r"\$\{HAWTHORN_UID:-\d{4,}\}:\$\{HAWTHORN_GID:-\d{4,}\}", service["user"]), name
        assert service["healthcheck"]["test"][0] == "CMD", name
        assert service["mem_limit"], name


def test_clients_reach_the_superlink_alone_and_only_this_machine_may_submit() -> None:
    assert FILE["networks"]["fleet"]["internal"] is True
    for name in ("client", "malicious-1", "malicious-2"):
        assert SERVICES[name]["networks"] == ["fleet"], name
    assert "fleet" not in SERVICES["certify"]["networks"]
    assert "fleet" not in SERVICES["serverapp"]["networks"]
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in published if ":9092:" not in port)


def test_no_container_has_the_authoritys_key_and_malicious_clients_have_their_own_key_alone() -> None:
    for name, service in SERVICES.items():
        sources = [volume.rsplit(":/", 1)[0] for volume in service.get("volumes", []) if "KEYS" in volume]
        assert not any("authority" in source or source.endswith("keys}") for source in sources), name
        if name.startswith("malicious"):
            own = f"client-{service['environment']['HAWTHORN_PARTITION']}"
            assert [source for source in sources if "nodes" in source] == [f"${{HAWTHORN_KEYS:-./keys}}/nodes/{own}"]


def test_keys_and_containers_agree_on_where_things_are(tmp_path: Path) -> None:
    make_keys(tmp_path, clients=2)
    for name, service in SERVICES.items():
        for volume in service.get("volumes", []):
            if "KEYS" in volume:
                inside = volume.split("}/", 1)[1].split(":")[0]
                assert (tmp_path / inside).exists(), (name, volume)


def test_the_submitted_experiment_can_be_run_and_measures_the_first_malicious_clients_attack() -> None:
    command = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in SERVICES["flip"]["command"]]
    pairs = [word for before, word in itertools.pairwise(command) if before == "--set"]
    (config,) = read_experiment(command[2], read_overrides(pairs)).runs
    default = re.fullmatch(r"\$\{\w+:-(.*)\}", SERVICES["malicious-1"]["environment"]["HAWTHORN_ATTACK"])
    assert default is not None
    assert config.attack == default[1]
    assert config.malicious_ids == (0, 1)


def test_only_what_both_compose_versions_know_is_used() -> None:
    text = (ROOT / "docker-compose.yml").read_text() + (ROOT / "docker-compose.gpu.yml").read_text()
    for word in ("gpus:", "include:", "start_interval", "additional_contexts", "dockerfile_inline", "develop:", ":+"):
        assert word not in text
    assert "name" not in FILE
    assert not re.search(r"\$\{\w+:-[^}]*\$\{", text), "nested defaults are silently wrong in 1.29"


def test_compose_takes_the_files() -> None:
    if not (shutil.which("docker") or shutil.which("docker-compose")):
        pytest.skip("no docker here")
    result = subprocess.run(["sh", str(ROOT / "docker/compose-config.sh")], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_scripts_of_the_image_are_there_and_parse() -> None:
    dockerfile = (ROOT / "docker/Dockerfile").read_text()
    assert "USER 10001" in dockerfile
    assert "ARG BASE_IMAGE=python:3." in dockerfile
    for script in (*sorted((ROOT / "docker").glob("*.sh")), ROOT / "docker/bin/flwr-serverapp"):
        assert subprocess.run(["sh", "-n", str(script)], check=False).returncode == 0, script
        assert script.stat().st_mode & 0o111, script
    for service in SERVICES.values():
        words = " ".join(service["command"])
        for name in re.findall(r"/opt/hawthorn/(\S+)", words):
            assert (ROOT / "docker" / name).exists()


def test_the_image_takes_flower_without_ray() -> None:
    command = [sys.executable, str(ROOT / "docker/requirements.py"), str(ROOT / "pyproject.toml")]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert any(line.startswith("flwr>=1.36") for line in lines)
    assert any(line.startswith("torch") for line in lines)
    assert not any("simulation" in line for line in lines)


def test_health_says_what_is_missing(tmp_path: Path) -> None:
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    server = grpc.server(__import__("concurrent.futures", fromlist=["f"]).ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    with socket.create_server(("127.0.0.1", 0)) as other:
        there = f"127.0.0.1:{other.getsockname()[1]}"

        def ask(*arguments: str) -> tuple[int, str]:
            command = [sys.executable, str(ROOT / "docker/health.py"), *arguments]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            return result.returncode, result.stdout

        own = f"127.0.0.1:{port}"
        assert ask(own, there, "--writable", str(tmp_path)) == (0, "")
        code, said = ask(own, "127.0.0.1:1")
        assert (code, "unhealthy" in said) == (1, True)
        assert "does not exist yet" in ask(own, "--file", str(tmp_path / "x"))[1]
    server.stop(0)


# -- the engine -------------------------------------------------------------------------------------------------------


class FakeSuperLink:
    """Plays a SuperLink and its ServerApp: writes rounds where the container would, loses the run when told to."""

    def __init__(self, folder: Path, losses: list[RunState]) -> None:
        self.folder, self.losses, self.address = folder, losses, "fake:1"
        self.apps: list[dict[str, Any]] = []
        self.stopped: list[int] = []

    def is_up(self) -> bool:
        return True

    def num_online(self) -> int:
        return 3

    def close(self) -> None:
        pass

    def stop_run(self, run_id: int) -> None:
        self.stopped.append(run_id)

    def start_run(self, app: Path) -> int:
        import tomllib

        self.apps.append(tomllib.loads((app / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])
        return len(self.apps)

    def state(self, run_id: int) -> RunState:
        folder = self.folder / self.apps[-1]["name"]
        folder.mkdir(parents=True, exist_ok=True)
        config = RunConfig.read({**self.apps[-1], "runs-dir": str(self.folder), "resume": False})
        if not (folder / "run.json").exists():
            RunWriter.create(config, load(config).layout).close()
        with (folder / "rounds.jsonl").open("a") as file:
            file.write(line(run_id) + "\n")
        return self.losses.pop(0) if self.losses else RunState("finished", "completed", "")


def line(number: int) -> str:
    record = {
        "round": number,
        "acc": 0.5,
        "asr": None,
        "seconds": 1.0,
        "sampled": [0],
        "malicious": [],
        "attacking": [],
    }
    record |= {"clients": [0], "dropped": {}, "weights": None, "norms": [1.0], "aggregate_norm": 1.0, "model_norm": 1.0}
    return json.dumps({**record, "skipped": None, "sha256": "x"})


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HAWTHORN_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("HAWTHORN_KEYS", str(tmp_path / "keys"))
    return tmp_path / "runs"


def with_fake(monkeypatch: pytest.MonkeyPatch, fake: FakeSuperLink) -> None:
    monkeypatch.setattr(compose, "SuperLink", lambda address, ca: fake)


def test_a_run_cut_short_goes_on_by_itself(config, outside, monkeypatch) -> None:
    lost = RunState("finished", "failed", "No heartbeat received from the task")
    fake, messages, seen = FakeSuperLink(outside, [lost]), [], []
    with_fake(monkeypatch, fake)
    compose.run(config.replace(runs_dir=str(outside), name="a/b"), seen.append, messages.append)
    assert [app["resume"] for app in fake.apps] == [False, True]
    assert [app["runs-dir"] for app in fake.apps] == ["/runs", "/runs"]
    assert [app["name"] for app in fake.apps] == ["a/b", "a/b"]
    assert [record.round for record in seen] == [1, 2]
    assert any("cut short" in message for message in messages)


def test_a_superlink_started_anew_that_does_not_know_the_run_is_asked_again(config, outside, monkeypatch) -> None:
    class Unknown(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.NOT_FOUND

    class Forgetful(FakeSuperLink):
        def state(self, run_id: int) -> RunState:
            if run_id == 1:
                raise Unknown
            return super().state(run_id)

    fake, messages = Forgetful(outside, []), []
    with_fake(monkeypatch, fake)
    compose.run(config.replace(runs_dir=str(outside), startup_timeout=5.0), None, messages.append)
    assert len(fake.apps) == 2
    assert any("does not know the run" in message for message in messages)


def test_an_earlier_record_of_that_name_is_not_gone_on_with(config, outside, monkeypatch) -> None:
    """The first submission was lost before it wrote anything: what is there is another run's."""
    earlier = config.replace(runs_dir=str(outside), rule="median()")
    RunWriter.create(earlier, load(earlier).layout).close()

    class Slow(FakeSuperLink):
        def state(self, run_id: int) -> RunState:
            return self.losses.pop(0) if self.losses else super().state(run_id)

    fake = Slow(outside, [RunState("finished", "failed", "No heartbeat received from the task")])
    with_fake(monkeypatch, fake)
    compose.run(config.replace(runs_dir=str(outside)))
    assert [app["resume"] for app in fake.apps] == [False, False]


def test_a_run_that_fails_by_itself_is_not_repeated(config, outside, monkeypatch) -> None:
    fake = FakeSuperLink(outside, [RunState("finished", "failed", "ValueError: no")])
    with_fake(monkeypatch, fake)
    with pytest.raises(EngineError, match=r"ValueError: no.*1 rounds are finished.*--resume"):
        compose.run(config.replace(runs_dir=str(outside)))
    assert len(fake.apps) == 1


def test_it_stops_after_so_many_restarts(config, outside, monkeypatch) -> None:
    monkeypatch.setenv("HAWTHORN_RESTARTS", "2")
    lost = RunState("finished", "failed", "No heartbeat received")
    fake = FakeSuperLink(outside, [lost] * 9)
    with_fake(monkeypatch, fake)
    with pytest.raises(EngineError, match="No heartbeat"):
        compose.run(config.replace(runs_dir=str(outside)))
    assert len(fake.apps) == 3


def test_ctrl_c_ends_the_run_of_the_federation_too(config, outside, monkeypatch) -> None:
    fake = FakeSuperLink(outside, [RunState("running", "", "")] * 99)
    with_fake(monkeypatch, fake)

    def interrupt(record: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compose.run(config.replace(runs_dir=str(outside)), interrupt)
    assert fake.stopped == [1]


def test_paths_that_containers_do_not_have_are_told(config, outside, tmp_path) -> None:
    with pytest.raises(ConfigError, match="give --runs-dir"):
        compose.inside_settings(config.replace(runs_dir=str(tmp_path / "elsewhere")), outside)
    here = config.replace(runs_dir=str(outside), data_dir="/somewhere", from_model=str(outside / "x/model.safetensors"))
    inside = compose.inside_settings(here, outside)
    assert (inside.from_model, inside.data_dir, inside.runs_dir) == ("/runs/x/model.safetensors", "", "/runs")
    with pytest.raises(ConfigError, match="from-model"):
        compose.inside_settings(here.replace(from_model="/etc/model.safetensors"), outside)


def test_a_gate_gets_the_containers_authority_and_token(config, outside) -> None:
    inside = compose.inside_settings(config.replace(runs_dir=str(outside), gate_service="certify:50051"), outside)
    keys = KeyFolder(Path("/keys"))
    assert (inside.gate_tls_ca, inside.gate_token_file) == (str(keys.ca), str(keys.token))


def test_no_federation_is_told(config, outside) -> None:
    assert find_engine("compose") is compose
    assert REMOTE == ("compose",)
    with pytest.raises(ConfigError, match=r"hawthorn keys"):
        compose.run(config.replace(runs_dir=str(outside)))
    make_keys(outside.parent / "keys")
    with pytest.raises(EngineError, match="docker compose ps"):
        compose.run(config.replace(runs_dir=str(outside), startup_timeout=0.3))


def test_a_superlink_that_is_away_for_a_moment_is_waited_for(config, outside, monkeypatch) -> None:
    class Away(grpc.RpcError):
        pass

    class Flaky(FakeSuperLink):
        def state(self, run_id: int) -> RunState:
            if self.away:
                self.away -= 1
                raise Away
            return super().state(run_id)

    fake = Flaky(outside, [])
    fake.away = 2
    with_fake(monkeypatch, fake)
    done = threading.Thread(target=compose.run, args=(config.replace(runs_dir=str(outside)),))
    done.start()
    done.join(60)
    assert not done.is_alive()
    fake.away = 10**9
    begin = time.monotonic()
    with pytest.raises(EngineError, match=r"lost the SuperLink.*--resume"):
        compose.run(config.replace(runs_dir=str(outside), startup_timeout=0.5))
    assert time.monotonic() - begin < 60
