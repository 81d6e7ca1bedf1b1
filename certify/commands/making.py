"""The commands that make files of certificates: smooth, crfl, zonotope."""

import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from certify.commands.console import console, progress, stoppable, told, usable_device
from certify.commands.options import (
    Alpha,
    Architecture,
    BoundOption,
    DataDir,
    DatasetOption,
    Device,
    Exact,
    First,
    Force,
    Interval,
    Joint,
    ModelArgument,
    NumDraws,
    Out,
    Points,
    Seed,
    SelectionDraws,
    Split,
    choice,
)


@told
def smooth(
    model: ModelArgument,
    out: Out,
    dataset: DatasetOption = None,
    architecture: Architecture = None,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the noise on every parameter.")] = 0.01,
    num_draws: NumDraws = 1000,
    selection_draws: SelectionDraws = 100,
    alpha: Alpha = 0.001,
    bound: BoundOption = "two_stage",
    interval: Interval = "clopper_pearson",
    joint: Joint = False,
    exact: Exact = False,
    margin: Annotated[
        bool, typer.Option("--margin", help="No noise at all: the model's own margins (linear models).")
    ] = False,
    points: Points = 1000,
    first: First = 0,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
    force: Force = False,
) -> None:
    """How far the released model may be moved before a prediction changes, by votes of noisy models."""
    settings = _votes(sigma, num_draws, selection_draws, alpha, bound, interval, joint, seed, exact, margin)
    subject = _subject(model, architecture, dataset, data_dir, split, first, points)
    _make(settings, subject, out, force, device)


@told
def crfl(
    source: Annotated[Path, typer.Argument(metavar="RUN-OR-RECORD", help="A run's folder, or a training record.")],
    out: Out,
    model_file: Annotated[Path | None, typer.Option(help="The released model; else the run's.")] = None,
    dataset: DatasetOption = None,
    architecture: Architecture = None,
    certificate: Annotated[
        Any, choice("sound", "paper", help="What holds for the released model, or the paper's Corollary 1.")
    ] = "sound",
    level: Annotated[Any, choice("feature", "sample", "client", help="What attackers change.")] = "feature",
    form: Annotated[
        Any, choice("margin", "neyman_pearson", "divergence", "marginal", help="Statement of a sound certificate.")
    ] = None,
    change_norm: Annotated[
        float | None, typer.Option(help="l2 change of each poisoned sample, for sample and client; else any sample.")
    ] = None,
    num_draws: NumDraws = 1000,
    selection_draws: SelectionDraws = 100,
    alpha: Alpha = 0.001,
    bound: BoundOption = "two_stage",
    interval: Interval = "clopper_pearson",
    joint: Joint = False,
    exact: Exact = False,
    points: Points = 1000,
    first: First = 0,
    split: Split = "test",
    seed: Seed = 0,
    device: Device = "cpu",
    data_dir: DataDir = None,
    force: Force = False,
) -> None:
    """What training data changed by attackers in one round could not have changed, from the record of the training."""
    from certify.files.header import relative_to
    from certify.files.settings import CrflSettings
    from certify.files.subject import training_record

    file, record = training_record(source)
    margin = form == "margin"
    sigma = record.smoothing_sigma
    votes = _votes(sigma, num_draws, selection_draws, alpha, bound, interval, joint, seed, exact, margin)
    settings = CrflSettings(votes=votes, certificate=certificate, level=level, form=form, change_norm=change_norm)
    model = model_file or file.parent
    subject = _subject(model, architecture or record.model, dataset, data_dir, split, first, points)
    _make(settings, subject, out, force, device, record=record, record_file=relative_to(file, out))


@told
def zonotope(
    model: ModelArgument,
    out: Out,
    eps: Annotated[list[float], typer.Option(help="Radius of the l_inf ball, in units of the input; several times.")],
    dataset: DatasetOption = None,
    architecture: Architecture = None,
    method: Annotated[
        Any, choice("zonotope", "crown", "interval", "best", help="Relaxation; 'best' is the least of the others.")
    ] = "zonotope",
    input_range: Annotated[tuple[float, float], typer.Option(help="What inputs can be.")] = (0.0, 1.0),
    dtype: Annotated[Any, choice("float32", "float64", help="What bounds are computed in.")] = "float32",
    points: Points = 100,
    first: First = 0,
    split: Split = "test",
    device: Device = "cpu",
    data_dir: DataDir = None,
    force: Force = False,
) -> None:
    """Which points no change of at most eps per input number can flip, by bounds on the network."""
    from certify.files.settings import ZonotopeSettings

    radii = tuple(sorted(set(eps)))
    settings = ZonotopeSettings(eps=radii, method=method, input_range=tuple(input_range), dtype=dtype)
    subject = _subject(model, architecture, dataset, data_dir, split, first, points)
    _make(settings, subject, out, force, device)


def _votes(
    sigma: float, num_draws: int, selection_draws: int, alpha: float, bound: str, interval: str, joint: bool,
    seed: int, exact: bool, margin: bool,
) -> Any:  # fmt: skip
    """Return the settings of votes; options that do not apply to what is computed are left at nothing."""
    from certify.files.settings import VoteSettings

    if exact and margin:
        raise typer.BadParameter("exact votes are votes under noise, margins are without: choose one of both")
    if exact or margin:
        return VoteSettings(way="exact", sigma=sigma) if exact else VoteSettings(way="margin")
    known: dict[str, Any] = {"bound": "crfl_top_two", "interval": "hoeffding"}
    if bound != "paper":
        known = {"bound": bound, "interval": interval, "selection_draws": selection_draws * (bound == "two_stage")}
    return VoteSettings(way="sampled", sigma=sigma, num_draws=num_draws, alpha=alpha, joint=joint, seed=seed, **known)


def _subject(
    model: Path,
    architecture: str | None,
    dataset: str | None,
    data_dir: str | None,
    split: Any,
    first: int,
    points: int,
) -> Any:
    from certify.files.subject import from_run

    return from_run(
        model, architecture=architecture, dataset=dataset, data_dir=data_dir, split=split, first=first,
        num_points=points,
    )  # fmt: skip


def _make(settings: Any, subject: Any, out: Path, force: bool, device: str, **record: Any) -> None:
    """Make a file with a progress bar, say what was found, and which assumptions are broken."""
    from certify.files.header import Header
    from certify.files.make import make_file
    from certify.files.summary import tables

    model, points = subject.sources(out)
    header = Header(model=model, points=points, settings=settings, **record)
    with warnings.catch_warnings(record=True) as said, stoppable() as should_stop, progress(header.kind) as tell:
        warnings.simplefilter("always")
        known: dict[str, Any] = {"device": usable_device(device), "on_progress": tell, "should_stop": should_stop}
        file = make_file(header, subject, out, force=force, **known)
    for text in dict.fromkeys(str(warning.message) for warning in said):
        console.print(f"warning: {text}", style="yellow", soft_wrap=True)
    for table in tables(file):
        console.print(table)
    console.print(f"certificates: {out}", soft_wrap=True)
