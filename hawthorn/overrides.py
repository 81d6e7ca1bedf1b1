"""Settings on the command line: `--set KEY=VALUE`."""

import dataclasses
import tomllib
from collections.abc import Sequence
from typing import Any

from tasks.config import RunConfig
from tasks.errors import ConfigError


def read_overrides(pairs: Sequence[str]) -> dict[str, Any]:
    """Read `key=value` pairs of the command line; text settings need no quotes."""
    kinds = {f.name.replace("_", "-"): type(f.default) for f in dataclasses.fields(RunConfig)}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("_", "-")
        if not equals:
            raise ConfigError(f"--set wants key=value, got {pair!r}")
        values[key] = _unquoted(text.strip()) if kinds.get(key) is str else _value(key, text.strip())
    return values


def _unquoted(text: str) -> str:
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if quoted and text[0] not in text[1:-1] else text


def _value(key: str, text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text.lower()}")["value"]
    except (ValueError, RecursionError):  # tomllib's own error is a ValueError, and not its only one
        raise ConfigError(f"cannot read --set {key}={text}: write a number, or true or false") from None
