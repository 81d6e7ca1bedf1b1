"""Identities: files and rights, what is kept and what is made anew, and a SuperLink that lets in who is registered."""

import datetime as dt
import json
import os
import ssl
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from flwr.supernode.cli.flower_supernode import _try_setup_client_authentication
from typer.testing import CliRunner

from hawthorn.cli import app
from hawthorn.commands import keys as keys_command
from hawthorn.engines._processes import Workplace, free_ports
from hawthorn.engines._superlink import SuperLink
from hawthorn.engines._supernode import Node, claim, parse_partitions
from hawthorn.engines.cluster import superlink_security, supernode_security
from hawthorn.keys import SERVICES, KeyFolder, make_keys
from tasks.errors import ConfigError, EngineError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> KeyFolder:
    path = tmp_path_factory.mktemp("identities") / "keys"
    make_keys(path, clients=3, names=["fl.example.org", "10.1.2.3"])
    return KeyFolder(path)


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def test_certificates_name_their_services_and_are_of_the_authority(folder: KeyFolder) -> None:
    authority = certificate(folder.ca)
    for service in SERVICES:
        own = certificate(folder.certificate(service))
        own.verify_directly_issued_by(authority)
        names = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert {*SERVICES[service], "localhost", "fl.example.org"} == set(names.get_values_for_type(x509.DNSName))
        assert {str(a) for a in names.get_values_for_type(x509.IPAddress)} == {"127.0.0.1", "10.1.2.3"}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder.certificate(service), folder.key(service))  # the key is that of the certificate
        assert own.not_valid_before_utc < dt.datetime.now(dt.UTC) - dt.timedelta(minutes=30)


def test_secrets_are_for_their_owner_alone(folder: KeyFolder) -> None:
    secret = [folder.authority_key, folder.token, folder.superexec_secret, folder.node_key(0)]
    secret += [folder.key(service) for service in SERVICES]
    assert {stat.S_IMODE(path.stat().st_mode) for path in secret} == {0o600}
    assert stat.S_IMODE(folder.ca.stat().st_mode) == 0o644
    assert not list(folder.path.rglob("*.partial"))


def test_flower_takes_the_node_keys(folder: KeyFolder) -> None:
    class Given:
        auth_supernode_private_key = str(folder.node_key(1))
        auth_supernode_public_key = None

    pair = _try_setup_client_authentication(Given())  # type: ignore[arg-type]
    assert pair is not None
    assert pair[1].curve.name == "secp384r1"
    assert folder.clients() == [0, 1, 2]
    assert len({folder.public_bytes(client) for client in range(3)}) == 3


def test_making_keys_again_adds_and_keeps(tmp_path: Path) -> None:
    make_keys(tmp_path, clients=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    KeyFolder(tmp_path).node_key(0).unlink()  # it went to its node
    made = make_keys(tmp_path, clients=2)
    assert sorted(path.name for path in made.written) == ["client-1", "client-1.pub"]
    assert all(path.read_bytes() == content for path, content in before.items() if path.exists())
    renewed = make_keys(tmp_path, renew=True, names=["new.example.org"])
    assert {path.name for path in renewed.written} == {"cert.pem", "key.pem"}
    assert make_keys(tmp_path, names=["new.example.org"]).written == []
    assert make_keys(tmp_path, names=["newer.example.org"]).written != []


def test_an_ending_certificate_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_keys(tmp_path, days=10)
    assert make_keys(tmp_path, days=10).written == []
    assert make_keys(tmp_path, days=365).written != []  # ten days are fewer than two weeks
    assert make_keys(tmp_path, days=365).written == []


@pytest.mark.parametrize("name", ["https://x.org", "x.org:9092", "", "a b", "*"])
def test_a_name_that_is_none_writes_nothing(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="host name or an IP address"):
        make_keys(tmp_path / "keys", names=[name])
    assert not (tmp_path / "keys").exists()


def test_half_an_authority_is_told(tmp_path: Path) -> None:
    make_keys(tmp_path)
    KeyFolder(tmp_path).authority_key.unlink()
    with pytest.raises(ConfigError, match=r"ca\.pem is there and .*ca\.key is not"):
        make_keys(tmp_path)


def test_a_wrong_public_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hawthorn keys make"):
        KeyFolder(tmp_path).public_bytes(0)
    KeyFolder(tmp_path).public_key(0).parent.mkdir()
    KeyFolder(tmp_path).public_key(0).write_text("ssh-rsa nonsense")
    with pytest.raises(ConfigError, match="no OpenSSH public key"):
        KeyFolder(tmp_path).public_bytes(0)


def test_the_command_makes_keys_and_says_who_the_containers_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys_command.os, "getuid", lambda: 4321)
    monkeypatch.setattr(keys_command.os, "getgid", lambda: 4322)
    env = tmp_path / ".env"
    env.write_text("OTHER=1\nHAWTHORN_UID=1\n")
    result = CliRunner().invoke(app, ["keys", "make", str(tmp_path / "k"), "--clients", "2-3", "--env", str(env)])
    assert result.exit_code == 0, result.output
    assert KeyFolder(tmp_path / "k").clients() == [2, 3]
    expected = ["OTHER=1", "HAWTHORN_UID=4321", "HAWTHORN_GID=4322", f"HAWTHORN_KEYS={tmp_path / 'k'}"]
    assert env.read_text().splitlines() == expected


# -- clients by hand --------------------------------------------------------------------------------------------------


def test_partitions_are_an_id_or_a_range() -> None:
    assert parse_partitions("7") == [7]
    assert parse_partitions(" 0 - 3 ") == [0, 1, 2, 3]
    for wrong in ("", "x", "3-1", "1,2", "-1"):
        with pytest.raises(ConfigError):
            parse_partitions(wrong)


def test_each_claims_an_id_of_its_own_and_a_dead_one_is_free_again(tmp_path: Path) -> None:
    held = [claim([4, 5], tmp_path) for _ in range(2)]
    assert [client for client, _ in held] == [4, 5]
    with pytest.raises(ConfigError, match="all taken"):
        claim([4, 5], tmp_path)
    held[0][1].close()
    assert claim([4, 5], tmp_path)[0] == 4


def test_a_malicious_node_knows_its_attack_and_shows_its_key(folder: KeyFolder) -> None:
    node = Node("fl.example.org:9092", 7, attack="sign_flip()", ca=folder.ca, key=folder.node_key(0))
    command = node.command(1234)
    assert node.config() == {"partition-id": 7, "role": "malicious", "attack": "sign_flip()"}
    assert command[command.index("--auth-supernode-private-key") + 1] == str(folder.node_key(0))
    assert "--insecure" not in command
    assert "role" not in Node("x:1", 7).config()
    assert "--insecure" in Node("x:1", 7).command(1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--partition", "0-3", "--insecure"], "give --claims"),
        (["--partition", "1"], "--insecure"),
        (["--partition", "1", "--insecure", "--keys", "k"], "contradict"),
        (["--partition", "1", "--insecure", "--attack", "sing_flip()"], "there are: "),
    ],
)
def test_a_client_that_cannot_work_is_told_before_it_starts(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(app, ["client", "--superlink", "127.0.0.1:1", *arguments])
    assert result.exit_code == 1
    assert complaint in str(result.exception)


# -- who is let in ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["empty certificate", "another key", "half a key"])
def test_a_certificate_that_is_none_or_not_of_its_key_is_made_anew(tmp_path: Path, damage: str) -> None:
    make_keys(tmp_path, clients=1)
    certificate = next(path for path in tmp_path.glob("*/cert.pem"))
    key, good = certificate.with_name("key.pem"), certificate.read_bytes()
    other = next(path for path in tmp_path.glob("*/key.pem") if path != key)
    if damage == "empty certificate":
        certificate.write_bytes(b"")
    else:
        key.write_bytes(other.read_bytes() if damage == "another key" else key.read_bytes()[:60])
    made = make_keys(tmp_path, clients=1)
    assert certificate in made.written
    assert certificate.read_bytes() not in (b"", good)
    assert make_keys(tmp_path, clients=1).written == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the warm fork server is for Linux")
def test_a_superlink_lets_in_who_is_registered_and_nobody_else(folder: KeyFolder, tmp_path: Path) -> None:
    stranger = KeyFolder(tmp_path / "stranger")
    make_keys(stranger.path, clients=1)
    with Workplace(tmp_path / "logs") as workplace:
        workplace.start_warm(("flwr.superlink.cli", "flwr.superlink.main", "flwr.supernode.cli"), {}, 60)
        runtime, fleet, control, *ports = free_ports(7)
        command = ["flower-superlink", *superlink_security(folder), "--host", "127.0.0.1", "--port", str(runtime)]
        command += ["--fleet-api-address", f"127.0.0.1:{fleet}", "--control-api-address", f"127.0.0.1:{control}"]
        workplace.start("superlink", command, {"FLWR_HOME": str(tmp_path / "home")})
        link = SuperLink(f"127.0.0.1:{control}", folder.ca)
        deadline = time.monotonic() + 60
        while not link.is_up():
            assert time.monotonic() < deadline, workplace.log_tail("superlink")
            time.sleep(0.1)
        assert not SuperLink(f"127.0.0.1:{control}").is_up(), "plaintext was answered"
        assert not SuperLink(f"127.0.0.1:{control}", stranger.ca).is_up(), "another authority was believed"
        assert link.register([folder.public_bytes(0), folder.public_bytes(1)]) == 2
        assert link.register([folder.public_bytes(0)]) == 0

        insecure = supernode_security(None, 0)
        own = [*supernode_security(folder, 0)[:2], "--auth-supernode-private-key"]
        nodes = {
            "welcome": supernode_security(folder, 0),
            "unregistered": supernode_security(folder, 2),
            "wrong-key": [*own, str(stranger.node_key(0))],
            "keyless": supernode_security(folder, 0)[:2],
            "plaintext": [*insecure, "--max-retries", "1"],
        }
        for (role, options), port in zip(nodes.items(), [*ports, *free_ports(1)]):
            rest = ["--superlink", f"127.0.0.1:{fleet}", "--host", "127.0.0.1", "--port", str(port)]
            workplace.start(role, ["flower-supernode", *options, *rest])
        refused = [role for role in nodes if role != "welcome"]
        deadline = time.monotonic() + 25
        while link.num_online() < 1 or any(workplace.exit_code(role) is None for role in refused):
            assert time.monotonic() < deadline, {role: workplace.exit_code(role) for role in nodes}
            time.sleep(0.2)
        assert link.num_online() == 1
        assert workplace.exit_code("welcome") is None
        assert all(workplace.exit_code(role) not in (None, 0) for role in refused)
        assert all(len(workplace.log_tail(role)) > 100 for role in refused)
        log = (tmp_path / "logs" / "superlink.log").read_text()
        assert "Attempted to register SuperNode with public key" in log
        assert link.unregister(folder.public_bytes(0))
        assert not link.unregister(folder.public_bytes(0))
        make_keys(folder.path, clients=range(4))
        assert link.register(folder.public_bytes(client) for client in range(4)) == 2  # 0 stays out, 1 is in
        assert folder.public_bytes(0) not in link.nodes()
        assert link.register([folder.public_bytes(0)]) == 0
        link.close()
        if os.environ.get("SHOW_LOGS"):
            print(json.dumps({role: workplace.log_tail(role) for role in (*nodes, "superlink")}, indent=1))


def test_no_superlink_is_told(folder: KeyFolder) -> None:
    with pytest.raises(EngineError, match=r"answers at 127\.0\.0\.1:1 within"):
        keys_command._connect("127.0.0.1:1", folder.ca, 0.1)


def test_openssl_and_ssh_keygen_read_what_was_made(folder: KeyFolder) -> None:
    for command in (
        ["openssl", "verify", "-CAfile", str(folder.ca), str(folder.certificate("superlink"))],
        ["ssh-keygen", "-l", "-f", str(folder.node_key(0))],
    ):
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip(f"{command[0]} is not installed")
        assert result.returncode == 0, result.stderr
