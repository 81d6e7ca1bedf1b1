"""The report's tables: headline, settings, dropped replies, skipped rounds, facts."""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hawthorn.compare import DASH, compare_rows, percent
from hawthorn.report._style import run_labels
from server.record import RunRecord
from tasks.config import RunConfig

MAX_LINES = 200
VERSIONS = ("hawthorn", "flwr", "torch", "python")


@dataclass(frozen=True)
class Grid:
    """A table of texts: `numeric` names the columns set flush right, `note` what was left out."""

    head: list[str]
    rows: list[list[str]]
    numeric: frozenset[int] = frozenset()
    note: str = ""


def headline(runs: Sequence[RunRecord]) -> Grid:
    """One line per run: what was run and how it ended."""
    head = ["run", "rule", "attack", "malicious", "ACC, %", "ASR, %", "attackers' weight, %", "rounds", "seconds"]
    head += ["dropped replies", "skipped rounds", "status"]
    rows = []
    for run, label, row in zip(runs, run_labels(runs), compare_rows(list(runs))):
        seconds = sum(record.seconds for record in run.rounds)
        final = f" (round {run.final.round})" if run.final and run.final.round != run.rounds[-1].round else ""
        rows.append(
            [
                label,
                row["rule"],
                f"{row['attack']}, {row['attack_schedule']}".replace(" |", "\u00a0|") if row["attack"] else "none",
                f"{row['malicious']} of {row['clients']}",
                percent(row["acc"]) + final,
                percent(row["asr"]),
                percent(row["attacker_share"]),
                f"{row['rounds']}" if row["rounds"] == row["num_rounds"] else f"{row['rounds']} of {row['num_rounds']}",
                f"{seconds:.1f}",
                str(row["dropped"]),
                str(row["skipped"]),
                row["status"],
            ]
        )
    if all(run.status == "finished" for run in runs):
        head, rows = head[:-1], [row[:-1] for row in rows]
    return Grid(head, rows, frozenset(range(3, 11)))


def settings_that_differ(runs: Sequence[RunRecord]) -> Grid:
    """Settings in which several runs differ, or in which a single run differs from the defaults."""
    settings = [run.config.settings() for run in runs]
    if len(runs) == 1:
        defaults = {f.name.replace("_", "-"): f.default for f in dataclasses.fields(RunConfig)}
        changed = [key for key in defaults if settings[0][key] != defaults[key] and key != "name"]
        rows = [[key, _value(settings[0][key]), _value(defaults[key])] for key in changed]
        return Grid(["setting", "value", "default"], rows)
    changed = [key for key in settings[0] if key != "name" and len({repr(values[key]) for values in settings}) > 1]
    rows = [[key, *(_value(values[key]) for values in settings)] for key in changed]
    return Grid(["setting", *run_labels(runs)], rows)


def all_settings(runs: Sequence[RunRecord]) -> Grid:
    """Every setting of every run, as it was resolved."""
    settings = [run.config.settings() for run in runs]
    return Grid(["setting", *run_labels(runs)], [[k, *(_value(values[k]) for values in settings)] for k in settings[0]])


def facts(runs: Sequence[RunRecord]) -> Grid:
    """Task, versions and the identity of the last model, one column per run."""
    rows = [["data set", *(_fact(run, "dataset") for run in runs)]]
    rows += [[name, *(_fact(run, key) for run in runs)] for name, key in _COUNTS.items()]
    rows.append(["samples per client", *(_sizes(run.facts.get("client_sizes")) for run in runs)])
    rows.append(["malicious clients", *(ranges(run.facts.get("malicious_clients", ())) or "none" for run in runs)])
    rows += [[name, *(_fact(run, name) for run in runs)] for name in VERSIONS]
    rows.append(["SHA-256 of the last model", *(_digest(run) for run in runs)])
    return Grid(["", *run_labels(runs)], rows)


_COUNTS = {"training samples": "train_samples", "test samples": "test_samples", "parameters": "num_params"}


def dropped_replies(runs: Sequence[RunRecord]) -> Grid:
    """Replies that no rule saw, by run and kind of reason."""
    groups: dict[tuple[str, str], list[Drop]] = {}
    for drop in _drops(runs):
        groups.setdefault((drop.run, kind_of(drop.reason)), []).append(drop)
    rows = []
    for (label, _), drops in groups.items():
        clients, rounds = ranges(drop.client for drop in drops), ranges(drop.round for drop in drops)
        rows.append([label, str(len(drops)), clients, rounds, _example([drop.reason for drop in drops])])
    return _cut(["run", "replies", "clients", "rounds", "reason"], rows, frozenset({1}))


def dropped_by_client(runs: Sequence[RunRecord]) -> Grid:
    """The same replies, by run, client and kind of reason, the most frequent first."""
    groups: dict[tuple[str, int, str], list[Drop]] = {}
    for drop in _drops(runs):
        groups.setdefault((drop.run, drop.client, kind_of(drop.reason)), []).append(drop)
    rows = []
    for (label, client, _), drops in sorted(groups.items(), key=lambda item: -len(item[1])):
        rounds = ranges(drop.round for drop in drops)
        rows.append([label, str(client), str(len(drops)), rounds, _example([drop.reason for drop in drops])])
    return _cut(["run", "client", "replies", "rounds", "reason"], rows, frozenset({1, 2}))


class Drop(NamedTuple):
    """A dropped reply."""

    run: str
    round: int
    client: int
    reason: str


def _drops(runs: Sequence[RunRecord]) -> Iterator[Drop]:
    for run, label in zip(runs, run_labels(runs)):
        for record in run.rounds:
            for client, reason in record.dropped.items():
                yield Drop(label, record.round, int(client), reason)


def skipped_rounds(runs: Sequence[RunRecord]) -> Grid:
    """Rounds that left the model as it was, by run and kind of reason."""
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for run, label in zip(runs, run_labels(runs)):
        for record in run.rounds:
            if record.skipped:
                groups.setdefault((label, kind_of(record.skipped)), []).append((record.round, record.skipped))
    rows = []
    for (label, _), skips in groups.items():
        rounds, reasons = ranges(number for number, _ in skips), [reason for _, reason in skips]
        rows.append([label, str(len(skips)), rounds, _example(reasons)])
    return _cut(["run", "skipped", "rounds", "reason"], rows, frozenset({1}))


def ranges(numbers: Iterable[int]) -> str:
    """Return whole numbers as '1–3, 7'; more than 12 parts are cut."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    texts = [str(low) if low == high else f"{low}–{high}" for low, high in parts]
    return ", ".join(texts[:12]) + (", …" if len(texts) > 12 else "")


def warnings(runs: Sequence[RunRecord]) -> list[str]:
    """What a reader must know before trusting a number: runs that are not complete or not consistent."""
    said = []
    for run, label in zip(runs, run_labels(runs)):
        done = f"{len(run.rounds)} of {run.config.num_rounds} rounds are on record"
        if run.status == "running":
            said.append(f"{label} is marked as running, {done}: it still runs, or it was killed and can be resumed.")
        elif run.status != "finished":
            said.append(f"{label} is marked as {run.status}, {done}.")
        if run.rounds and all(record.skipped for record in run.rounds):
            said.append(f"{label} skipped every round: its model is the one it started from.")
        if run.final is None:
            said.append(f"{label} has no evaluated round.")
        stated = run.facts.get("sha256")
        if stated and run.rounds and stated != run.rounds[-1].sha256:
            said.append(f"{label} is inconsistent: the SHA-256 of its model is not that of its last round.")
    return said


def _cut(head: list[str], rows: list[list[str]], numeric: frozenset[int]) -> Grid:
    note = f"{len(rows) - MAX_LINES} more lines are not shown." if len(rows) > MAX_LINES else ""
    return Grid(head, rows[:MAX_LINES], numeric, note)


def kind_of(reason: str) -> str:
    """Return a reason without its numbers: replies dropped for the same cause stand in one line."""
    return re.sub(r"\d[\d.e+]*", "#", reason)


def _example(reasons: list[str]) -> str:
    """Return the first of some reasons of one kind, and that there are others."""
    return reasons[0] if len(set(reasons)) == 1 else f"{reasons[0]} (the first of {len(reasons)})"


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value) or '""'


def _fact(run: RunRecord, key: str) -> str:
    value = run.facts.get(key, DASH)
    return f"{value:,}".replace(",", " ") if isinstance(value, int) else str(value)


def _sizes(sizes: Sequence[int] | None) -> str:
    if not sizes:
        return DASH
    middle = sorted(sizes)[len(sizes) // 2]
    return f"{min(sizes)} to {max(sizes)}, median {middle}" if min(sizes) < max(sizes) else str(middle)


def _digest(run: RunRecord) -> str:
    return run.rounds[-1].sha256 if run.rounds else str(run.facts.get("sha256", DASH))
