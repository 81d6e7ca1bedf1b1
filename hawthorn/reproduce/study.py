"""A reproduction: the rows of a paper's table, our numbers and the paper's, over one or several seeds; or a figure."""

import dataclasses
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hawthorn.arms.perform import Outcome, earlier_run
from hawthorn.experiment import Arm, Experiment, distinct, read_experiment, shipped_experiments
from hawthorn.reproduce.figure import Figure, read_figure
from hawthorn.reproduce.theory import Checked, Theory, check_pair, read_theory
from server.record import RoundRecord, RunRecord, read_run
from server.rejection import measure_confidences, rates
from tasks.errors import ConfigError, RecordError

ALL = "all"


@dataclass(frozen=True)
class Study:
    """A paper's table or figure to run: an experiment per seed, equal but for the seed, and the rows asked for."""

    name: str
    experiments: list[Experiment]  # one per seed
    seeds: list[int]
    rows: list[str]  # labels of arms
    figure: Figure | None = None  # where a figure is drawn in place of a table
    theory: Theory | None = None  # where bounds are checked on pairs of rows
    path: Path | None = None  # its experiment file

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
        if "paper" in content or "robustness" in content:
            tables[name.replace("/", "-")] = path
        elif "figure" in content:
            figures[content["figure"].get("name", name.replace("/", "-"))] = path
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
    figure, theory = read_figure(path, experiments[0], chosen), read_theory(path, experiments[0])
    return Study(name, experiments, list(seeds), chosen, figure, theory, path)


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
    """Return the finished runs behind the rows, those of the first seed; a run that several rows read comes once."""
    labels = {row.label for row in rows}
    arms = distinct(arm for arm in study.first.arms if arm.label in labels)
    return [record for arm in arms if (record := _finished(arm)) is not None]


def check_theory(study: Study) -> list[Checked]:
    """Check the theory on every pair of rows, those of the first seed; a pair that is not finished says so."""
    assert study.theory is not None
    found, arms = list[Checked](), {arm.label: arm for arm in study.first.arms}
    for pair in study.theory.pairs:
        runs = [_finished(arms[label]) for label in (pair.before, pair.after)]
        if runs[0] is None or runs[1] is None:
            if {pair.before, pair.after} <= set(study.rows):
                found.append(Checked(pair, problem="not run"))
            continue
        try:
            found.append(check_pair(pair, runs[0].folder, runs[1].folder, study.theory.draws))
        except RecordError as error:
            found.append(Checked(pair, problem=str(error)))
    return found


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
        paper_acc=paper[0] if paper and not math.isnan(paper[0]) else None,  # nan: the paper does not say
        paper_asr=paper[1] if paper and not math.isnan(paper[1]) else None,
        seconds=None,
        extra=arm.extra,
        note="; ".join(dict.fromkeys([*notes, *(note for record in records for note in _doubts(record))])),
    )
    return _with_figures(row, records, arm.tau) if records else row


def _with_figures(row: Row, records: list[RunRecord], tau: float | None) -> Row:
    finals = [_final_rates(record, tau) for record in records]
    acc = [100 * acc for acc, _ in finals if acc is not None]
    asr = [100 * asr for _, asr in finals if asr is not None]
    pairs = [_rates(r, record, tau) for record in records for r in record.rounds[len(record.rounds) // 2 :]]
    late = [100 * asr for _, asr in pairs if asr is not None]
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


def _rates(record: RoundRecord, run: RunRecord, tau: float | None) -> tuple[float | None, float | None]:
    """Return a round's (ACC, ASR) at a threshold that was measured in it: the run's own, or none at all."""
    if tau is None or tau == run.config.tau:
        return record.acc, record.asr
    return (record.acc_all, record.asr_all) if tau == 0 else (None, None)


def _final_rates(run: RunRecord, tau: float | None) -> tuple[float | None, float | None]:
    """Return the last (ACC, ASR) at a threshold; one that was not measured is read off the final model."""
    if run.final is None:
        return None, None
    acc, asr = _rates(run.final, run, tau)
    if acc is None and tau is not None:
        found = rates(measure_confidences(run.folder), [tau])
        acc, asr = float(found.acc[0]), None if math.isnan(found.asr[0]) else float(found.asr[0])
    return acc, asr


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
