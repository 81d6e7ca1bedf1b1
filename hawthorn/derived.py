"""Experiment files that start from another file, and arms that start from another arm."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tasks.errors import ConfigError

ABOUT = ("label", "extra", "paper")  # of an arm; not inherited
READ_AT = ("run", "tau", *ABOUT)  # all that an arm may hold that is another arm's run


def derive(path: Path, content: Mapping[str, Any], below: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content` over the settings, variants and pretraining of the file it extends.

    Where it names variants, it has these only, in its order. Its name (folder-file, as flip-table7, unless its settings
    say otherwise), arms, grid and the paper's figures are its own.
    """
    if "extends" in below:
        raise ConfigError(f"{path} extends a file that extends another; extend the first one")
    merged: dict[str, Any] = dict(content)
    named = {"name": f"{path.parent.name}-{path.stem}"}
    merged["settings"] = {**below.get("settings", {}), **named, **content.get("settings", {})}
    if "pretrain" in below:
        merged["pretrain"] = {**below["pretrain"], **content.get("pretrain", {})}
    theirs, ours = below.get("variants", {}), content.get("variants", {})
    if unknown := [name for name in ours if theirs and name not in theirs]:
        raise ConfigError(f"{path}: the file it extends has no variant {unknown[0]!r}; it has: {', '.join(theirs)}")
    if theirs or ours:
        merged["variants"] = {name: _variant(theirs.get(name, {}), ours.get(name, {})) for name in ours or theirs}
    return merged


def _variant(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in theirs.items() if key != "arms"} | dict(ours)
    if "pretrain" in theirs or "pretrain" in ours:
        found["pretrain"] = {**theirs.get("pretrain", {}), **ours.get("pretrain", {})}
    return found


def like(
    path: Path, arms: Mapping[str, dict[str, Any]], below: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return the tables of arms with those they are `like` below their own settings; `below` are another file's."""
    found: dict[str, dict[str, Any]] = {}
    for label, table in arms.items():
        if "like" in table:
            named = table["like"]
            known = {**below, **{other: values for other, values in found.items() if "run" not in values}}
            if not isinstance(named, str) or named not in known or "run" in known[named]:
                raise ConfigError(
                    f"{path}, arm {label}: like = {named!r} is no arm above it; there are: {', '.join(known)}"
                )
            source = {key: value for key, value in known[named].items() if key not in (*ABOUT, "like")}
            table = {**source, **{key: value for key, value in table.items() if key != "like"}}
        found[label] = table
    return found
