"""The commands that read files of certificates: verify, plot, show."""

import json
from pathlib import Path
from typing import Annotated

import typer

from certify.commands.console import console, progress, told, usable_device
from certify.commands.options import Architecture, DataDir, Device, FileArgument


@told
def verify(
    file: FileArgument,
    sample: Annotated[int | None, typer.Option(min=1, help="Recompute this many points only, drawn anew.")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Recompute every point (the default).")] = False,
    sample_seed: Annotated[int | None, typer.Option(min=0, help="Draw the same sample again.")] = None,
    model_file: Annotated[Path | None, typer.Option(help="The model's file, where it has been moved.")] = None,
    architecture: Architecture = None,
    record: Annotated[Path | None, typer.Option(help="The run's training record, where it has been moved.")] = None,
    allow_unrecorded: Annotated[
        bool, typer.Option("--allow-unrecorded", help="Verify CRFL certificates without the run's training record.")
    ] = False,
    data_dir: DataDir = None,
    device: Device = "cpu",
) -> None:
    """Make the certificates of FILE again and compare: model, data, counts, bounds, radii, labels, assumptions."""
    import secrets

    from certify.files.lines import read
    from certify.verify import verify as verify_file

    if all_ and sample is not None:
        raise typer.BadParameter("--all and --sample exclude each other")
    seed = secrets.randbits(31) if sample_seed is None else sample_seed  # nobody can know what will be looked at
    read_file = read(file)
    with progress("verifying") as tell:
        verdict = verify_file(
            read_file, sample=sample, seed=seed, model_file=model_file, architecture=architecture, record_file=record,
            data_dir=data_dir, device=usable_device(device), on_progress=tell, allow_unrecorded=allow_unrecorded,
        )  # fmt: skip
    for note in verdict.notes:
        console.print(f"note: {note}", style="yellow", soft_wrap=True)
    lines = verdict.lines()
    for line in lines[:20]:
        console.print(line, style="red", soft_wrap=True)
    if len(lines) > 20:
        console.print(f"... and {len(lines) - 20} more like these", style="red")
    drawn = "" if sample is None else f" (--sample-seed {seed})"
    done = f"{verdict.num_certificates} certificates, recomputed from the model: {verdict.num_recomputed}{drawn}"
    if verdict.good:
        console.print(f"verified: {done}", style="green", soft_wrap=True)
        return
    console.print(f"NOT verified: {len(verdict.findings)} findings; {done}", style="bold red", soft_wrap=True)
    raise typer.Exit(1)


@told
def plot(
    files: Annotated[list[Path], typer.Argument(help="Files of certificates.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")],
    max_radius: Annotated[float | None, typer.Option(help="End of the radius axis.")] = None,
) -> None:
    """Draw certified accuracy and rate against the radius with confidence bands, and margins of bounds on inputs."""
    from certify.files.lines import read
    from certify.plots import plot as draw

    console.print(f"picture: {draw([read(file) for file in files], out, max_radius=max_radius)}", soft_wrap=True)


@told
def show(
    file: FileArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Summarise a file of certificates: what it claims, for how many points, under which assumptions."""
    from certify.files.lines import read
    from certify.files.summary import summarise, tables

    opened = read(file)
    if as_json:
        print(json.dumps(summarise(opened), indent=2, allow_nan=False))
        return
    for table in tables(opened):
        console.print(table)
