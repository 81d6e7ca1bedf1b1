"""Arguments and options that several commands of certification share."""

from pathlib import Path
from typing import Annotated, Any

import click
import typer


def choice(*options: str, **known: Any) -> Any:
    return typer.Option(click_type=click.Choice(options), **known)


ModelArgument = Annotated[Path, typer.Argument(help="A model.safetensors, or the folder of a run.")]
FileArgument = Annotated[Path, typer.Argument(help="A file of certificates.")]
Architecture = Annotated[
    str | None, typer.Option("--model", help="Architecture, such as 'logistic_regression()'; else the run.json's.")
]
DatasetOption = Annotated[str | None, typer.Option(help="Data set, such as 'mnist()'; else the run.json's.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")]
Split = Annotated[Any, choice("test", "train", help="Which part of the data set.")]
Points = Annotated[int, typer.Option(min=0, help="How many points, in the data set's order; 0: all.")]
First = Annotated[int, typer.Option(min=0, help="Index of the first point.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="File to write; one of the same work is taken up.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda where there is one.")]
NumDraws = Annotated[int, typer.Option(min=1, help="Noisy models that vote (M).")]
SelectionDraws = Annotated[int, typer.Option(min=1, help="Draws of their own that choose the class, for two_stage.")]
Alpha = Annotated[float, typer.Option(help="Probability that a certificate is wrong.")]
Joint = Annotated[bool, typer.Option("--joint", help="Spend alpha on all points together, not on each.")]
Seed = Annotated[int, typer.Option(min=0, help="Of the draws.")]
BoundOption = Annotated[
    str, choice("two_stage", "simultaneous", "paper", help="How votes become bounds; 'paper' fails with more.")
]
Interval = Annotated[str, choice("clopper_pearson", "hoeffding", help="Confidence interval of one share.")]
Exact = Annotated[bool, typer.Option("--exact", help="Compute the votes instead of drawing them (linear models).")]
