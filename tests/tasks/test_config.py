"""Settings: defaults equal Flower's, keys, types and ranges are checked, who is malicious is read or drawn."""

import tomllib
from pathlib import Path

import pytest

from tasks.config import RunConfig, parse_clients
from tasks.errors import ConfigError


def test_defaults_equal_flowers_app_config():
    root = Path(__file__).parents[2]
    app = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    assert RunConfig().settings() == app


def test_settings_read_back():
    config = RunConfig.read({"num-clients": 7, "rule": "median()", "tau": 1})
    assert RunConfig.read(config.settings()) == config
    assert config.tau == 1.0
    assert isinstance(config.tau, float)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num-client": 3}, "did you mean 'num-clients'"),
        ({"xyz": 3}, "there are: name, runs-dir"),
        ({"num-clients": "3"}, "num-clients must be a whole number"),
        ({"num-clients": True}, "must be a whole number"),
        ({"num-clients": 2.0}, "must be a whole number"),
        ({"num-clients": 0}, "at least 1"),
        ({"tau": 1.5}, "at most 1"),
        ({"tau": float("nan")}, "finite"),
        ({"rule": 3}, "rule must be text"),
        ({"client-weights": "trust"}, "one of uniform, claimed"),
        ({"clients-per-round": 11}, "num-clients is 10"),
        ({"malicious-clients": "3"}, "attack and collusion are empty"),
        ({"malicious-clients": "12", "attack": "sign_flip()"}, "ids go from 0 to 9"),
        ({"malicious-clients": "a", "attack": "sign_flip()"}, "write ids as"),
        ({"malicious-clients": "120%", "attack": "sign_flip()"}, "at most 100%"),
        ({"name": "../x"}, "name must be"),
        ({"name": "/x"}, "name must be"),
        ({"name": ""}, "name must be"),
        ({"server-lr": 10**400}, "more than 64 bits"),
        ({"seed": 16**4000}, "more than 64 bits"),
        ({"seed": [16**4000]}, "a whole number, got a number too long to be shown"),
        ({"runs-dir": "a\0"}, "runs-dir must be text without NUL"),
        ({"runs-dir": "\ud800"}, "runs-dir must be text without NUL"),
        ({"runs-dir": "~no-such-user/runs"}, "no such user's home"),
        ({"malicious-clients": "9" * 5000, "attack": "sign_flip()"}, "write ids as"),
        ({"gate": "paper()", "gate-eps": "1e999999999"}, "gate-eps must be radii"),
    ],
)
def test_bad_settings_name_the_key(values, says):
    with pytest.raises(ConfigError, match=says):
        RunConfig.read(values)


def test_components_are_resolved_before_anything_starts():
    with pytest.raises(ConfigError, match="unknown rule 'krumm'"):
        RunConfig.read({"rule": "krumm()"}).resolve_components()


def test_malicious_clients():
    assert parse_clients("0, 3,7-9", 10, 1) == (0, 3, 7, 8, 9)
    assert parse_clients("", 10, 1) == ()
    drawn = parse_clients("20%", 20, 1)
    assert len(drawn) == 4
    assert drawn == parse_clients("20%", 20, 1)
    assert drawn != parse_clients("20%", 20, 2)
    assert len(parse_clients("1%", 10, 1)) == 1  # a share above zero is at least one client
    assert parse_clients("0%", 10, 1) == ()


def test_defence_and_offence_in_one_line():
    assert RunConfig().defence == "mean()"
    assert RunConfig().offence == ""
    config = RunConfig.read(
        {"rule": "median()", "optimizer": "adam()", "transform": "gaussian_noise(std=0.1)", "attack": "sign_flip()"}
    )
    assert config.defence == "median() | adam() | gaussian_noise(std=0.1)"
    assert config.offence == "sign_flip()"
