"""A reproduction: the rows of a paper's table, our numbers and the paper's, over one or several seeds; or a figure."""

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.experiment import Arm, Experiment, read_experiment, shipped_experiments
from hawthorn.reproduce.figure import Figure, read_figure
from server.record import RunRecord, read_run
from tasks.errors import ConfigError

ALL = "all"


@dataclass(frozen=True)
class Study:
    """A paper's table or figure to run: an experiment per seed, equal but for the seed, and the rows asked for."""

    name: str
    experiments: list[Experiment]  # one per seed
    seeds: list[int]
    rows: list[str]  # labels of arms
    figure: Figure | None = None  # where a figure is drawn in place of a table

    @property
    def first(self) -> Experiment:
        """The experiment of the first seed: what holds for all of them is read here."""
        return self.experiments[0]

    @property
    def folder(self) -> Path:
        """Where the runs and the result files are."""
        return self.first.folder

    def arms(self, label: str) -> list[Arm]:
        """Return an arm of every seed."""
        return [next(arm for arm in experiment.arms if arm.label == label) for experiment in self.experiments]


@dataclass(frozen=True)
class Row:
    """One row of the result, in percent and seconds; None where there is no figure."""

    label: str
    shown: str
    rule: str
    acc: float | None
    asr: float | None
    paper_acc: float | None
    paper_asr: float | None
    seconds: float | None  # all rounds of one seed, mean over seeds
    acc_range: tuple[float, float] | None = None  # least and greatest over seeds
    asr_range: tuple[float, float] | None = None
    asr_late: tuple[float, float] | None = None  # over the evaluated rounds of the last half
    rounds: int = 0
    seeds: int = 0
    extra: bool = False
    note: str = ""

    @property
    def acc_difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.acc is None or self.paper_acc is None else self.acc - self.paper_acc

    @property
    def asr_difference(self) -> float | None:
        """Ours less the paper's."""
        return None if self.asr is None or self.paper_asr is None else self.asr - self.paper_asr


def shipped_studies() -> dict[str, Path]:
    """Return the shipped experiments that are of a paper, tables first: name as ``flip-table2`` -> file."""
    tables, figures = {}, {}
    for name, path in shipped_experiments().items():
        content = tomllib.loads(path.read_text())
        if "paper" in content:
            tables[name.replace("/", "-")] = path
        elif "figure" in content:
            figures[name.replace("/", "-")] = path
    return {**tables, **figures}


def read_study(
    name: str, overrides: Mapping[str, Any], *, dataset: str | None, rows: Sequence[str], seeds: Sequence[int]
) -> Study:
    """Read a study by its name, or from a file of one's own; `rows` empty: the paper's, ``all``: the extra ones too."""
    shipped = shipped_studies()
    path = shipped.get(name.replace("/", "-").removesuffix(".toml"), Path(name))
    if not path.is_file():
        raise ConfigError(f"there is no reproduction {name!r}; there are: {', '.join(shipped) or 'none'}")
    if len(set(seeds)) < len(seeds) or not seeds:
        raise ConfigError(f"seeds must be different numbers, got {', '.join(map(str, seeds)) or 'none'}")
    experiments = [
        read_experiment(str(path), {**overrides, "seed": seed}, variant=dataset, suffix=f"+seed={seed}", lenient=True)
        for seed in seeds
    ]
    if experiments[0].axes:
        raise ConfigError(f"{path} is a grid; run it with: hawthorn run {name}")
    chosen = _chosen(experiments[0].arms, rows)
    return Study(name, experiments, list(seeds), chosen, read_figure(path, experiments[0]))


def _chosen(arms: Iterable[Arm], rows: Sequence[str]) -> list[str]:
    labels = {arm.label: arm for arm in arms}
    if ALL in rows:
        return list(labels)
    if unknown := [row for row in rows if row not in labels]:
        raise ConfigError(f"there is no row {unknown[0]!r}; there are: {', '.join(labels)}, {ALL}")
    return [label for label, arm in labels.items() if (label in rows if rows else not arm.extra)]


def read_rows(study: Study, outcomes: Mapping[str, Outcome] | None = None) -> list[Row]:
    """Return one row per arm that is asked for or finished; `outcomes` (by name of the run) say why one is missing."""
    labels = [a.label for a in study.first.arms if a.label in study.rows or any(map(_finished, study.arms(a.label)))]
    return [_row(study, label, outcomes or {}) for label in labels]


def finished_runs(study: Study, rows: Iterable[Row]) -> list[RunRecord]:
    """Return the finished runs behind the rows, those of the first seed."""
    arms = {arm.label: arm for arm in study.first.arms}
    return [record for row in rows if (record := _finished(arms[row.label])) is not None]


def _row(study: Study, label: str, outcomes: Mapping[str, Outcome]) -> Row:
    arms = study.arms(label)
    arm, records, notes = arms[0], list[RunRecord](), list[str]()
    for each in arms:
        outcome = outcomes.get(each.config.name if each.config else each.label)
        if each.config is None:
            notes.append(each.problem)
        elif outcome is not None and not outcome.has_record:
            notes.append(f"{outcome.status}: {outcome.error}" if outcome.error else outcome.status)
        elif (record := _finished(each)) is not None:
            records.append(record)
        else:
            notes.append("not run")
    paper = study.first.paper.get(arm.paper)
    row = Row(
        label=label,
        shown=arm.shown,
        rule=arm.config.rule if arm.config else "",
        acc=None,
        asr=None,
        paper_acc=paper[0] if paper else None,
        paper_asr=paper[1] if paper else None,
        seconds=None,
        extra=arm.extra,
        note="; ".join(dict.fromkeys([*notes, *(note for record in records for note in _doubts(record))])),
    )
    return _with_figures(row, records) if records else row


def _with_figures(row: Row, records: list[RunRecord]) -> Row:
    finals = [record.final for record in records]
    acc = [100 * f.acc for f in finals if f is not None and f.acc is not None]
    asr = [100 * f.asr for f in finals if f is not None and f.asr is not None]
    late = [100 * r.asr for record in records for r in record.rounds[len(record.rounds) // 2 :] if r.asr is not None]
    return dataclasses.replace(
        row,
        acc=math.fsum(acc) / len(acc) if acc else None,
        asr=math.fsum(asr) / len(asr) if asr else None,
        seconds=math.fsum(r.seconds for record in records for r in record.rounds) / len(records),
        acc_range=(min(acc), max(acc)) if len(acc) > 1 else None,
        asr_range=(min(asr), max(asr)) if len(asr) > 1 else None,
        asr_late=(min(late), max(late)) if late else None,
        rounds=min(len(record.rounds) for record in records),
        seeds=len(records),
    )


def _finished(arm: Arm) -> RunRecord | None:
    if arm.config is None or earlier_run(arm.config)[0] != "finished":
        return None
    return read_run(arm.config.run_folder)


def _doubts(record: RunRecord) -> list[str]:
    """Say what makes a run's figures mean less than they seem to."""
    skipped = [r.skipped for r in record.rounds if r.skipped]
    if skipped:
        return [f"{len(skipped)} of {len(record.rounds)} rounds skipped: {skipped[0]}"]
    dropped = sum(len(r.dropped) for r in record.rounds)
    return [f"{dropped} replies dropped"] if dropped else []
