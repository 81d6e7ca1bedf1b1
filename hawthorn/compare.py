"""Runs side by side: the numbers that decide between defences, one row per run.

Attackers are the clients of `RoundRecord.attacking`: a malicious client whose schedule lets it rest is honest then.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from server.record import RoundRecord, RunRecord

LAST = 10  # rounds over which the best and worst values are taken
TEXTS = ("dataset", "model", "rule", "attack")
DASH = "–"  # shown where a run has no such number


def compare_rows(runs: list[RunRecord]) -> list[dict[str, Any]]:
    """Return one flat mapping per run: rates in [0, 1], seconds, None where a run has no such number."""
    return [_row(run) for run in runs]


def compare_table(runs: list[RunRecord]) -> Table:
    """Return a table with one row per run; texts that all of several runs share stand in its title."""
    rows = compare_rows(runs)
    shared = [key for key in TEXTS if len(rows) > 1 and len({row[key] for row in rows}) == 1]
    title = "\n".join(f"{key}: {rows[0][key] or 'none'}" for key in shared)
    table = Table(
        title=Text(title) if title else None,
        caption=f"ACC, ASR (range over the last {LAST} rounds) and the attackers' share of the weight in %",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in ("run", *(key for key in TEXTS if key not in shared)):
        table.add_column(name, overflow="fold", min_width=8)
    for name in ("malicious", "rounds", "ACC", "ASR", "share", "dropped", "skipped", "s/round"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sha", no_wrap=True)
    for name, row in zip(run_names(runs), rows):
        table.add_row(*(Text(cell) for cell in _cells(name, row, shared)))
    return table


def run_names(runs: Sequence[RunRecord]) -> list[str]:
    """Return one distinct name per run, without the leading folders that all of several names share."""
    paths = [run.name.split("/") for run in runs]
    shared = 0
    while len(paths) > 1 and min(map(len, paths)) > shared + 1 and len({path[shared] for path in paths}) == 1:
        shared += 1
    names = ["/".join(path[shared:]) for path in paths]
    counts, seen, distinct = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        distinct.append(f"{name} ({seen[name]})" if counts[name] > 1 else name)
    return distinct


def malicious_clients(run: RunRecord) -> list[int]:
    """Return the ids of a run's malicious clients: from its settings, its facts and its rounds."""
    ids = {*run.config.malicious_ids, *run.facts.get("malicious_clients", ())}
    return sorted(ids.union(*(record.malicious for record in run.rounds)))


def attacker_share(clients: Sequence[int], weights: Sequence[float] | None, attacking: Collection[int]) -> float | None:
    """Return the attackers' part of the total weight, in [0, 1]; None without weights or when all are 0."""
    total = sum(abs(w) for w in weights) if weights is not None else 0.0
    if weights is None or total == 0.0:
        return None
    return sum(abs(w) for c, w in zip(clients, weights, strict=True) if c in attacking) / total


def round_share(record: RoundRecord) -> float | None:
    """Return the attackers' part of the weight in a round; None if nobody attacked, or no weights were applied."""
    if not record.attacking or record.skipped:
        return None
    return attacker_share(record.clients, record.weights, set(record.attacking))


def mean_share(run: RunRecord) -> float | None:
    """Return `round_share` averaged over the rounds that have one."""
    shares = [share for record in run.rounds if (share := round_share(record)) is not None]
    return sum(shares) / len(shares) if shares else None


def shorten_spec(text: str, length: int = 44) -> str:
    """Return a component's text cut to `length`: first the arguments go, then the end."""
    if len(text) > length:
        before = ""
        while before != text:
            before, text = text, re.sub(r"\([^()]*\)", "", text)
    return text if len(text) <= length else text[: length - 1] + "…"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a rate in [0, 1] as percent without the sign, or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f}"


def _row(run: RunRecord) -> dict[str, Any]:
    config, final, rounds = run.config, run.final, run.rounds
    row: dict[str, Any] = {
        "run": run.name,
        "status": run.status,
        "dataset": config.dataset,
        "model": config.model,
        "rule": config.defence,
        "attack": config.offence,
        "attack_schedule": config.attack_schedule if config.offence else "",
        "malicious": len(malicious_clients(run)),
        "clients": config.num_clients,
        "rounds": len(rounds),
        "num_rounds": config.num_rounds,
        "acc": final.acc if final else None,
        "asr": final.asr if final else None,
    }
    for key in ("acc", "asr"):
        values = [value for record in rounds[-LAST:] if (value := getattr(record, key)) is not None]
        row[f"{key}_min_last{LAST}"] = min(values, default=None)
        row[f"{key}_max_last{LAST}"] = max(values, default=None)
    return row | {
        "attacker_share": mean_share(run),
        "dropped": sum(len(record.dropped) for record in rounds),
        "skipped": sum(record.skipped is not None for record in rounds),
        "seconds_per_round": sum(record.seconds for record in rounds) / len(rounds) if rounds else None,
        "sha256": rounds[-1].sha256 if rounds else run.facts.get("sha256"),
    }


def _cells(name: str, row: dict[str, Any], shared: list[str]) -> list[str]:
    seconds, done = row["seconds_per_round"], row["rounds"] == row["num_rounds"]
    return [
        name if row["status"] == "finished" else f"{name} ({row['status']})",
        *(shorten_spec(row[key]) or DASH for key in TEXTS if key not in shared),
        f"{row['malicious']}/{row['clients']}",
        f"{row['rounds']}" if done else f"{row['rounds']}/{row['num_rounds']}",
        _with_range(row, "acc"),
        _with_range(row, "asr"),
        percent(row["attacker_share"]),
        str(row["dropped"]),
        str(row["skipped"]),
        DASH if seconds is None else f"{seconds:.2f}",
        (row["sha256"] or DASH)[:8],
    ]


def _with_range(row: dict[str, Any], key: str) -> str:
    """Return a rate on one line and, on the next, its range over the last rounds."""
    low, high = row[f"{key}_min_last{LAST}"], row[f"{key}_max_last{LAST}"]
    return percent(row[key]) if low is None else f"{percent(row[key])}\n{percent(low)}–{percent(high)}"
