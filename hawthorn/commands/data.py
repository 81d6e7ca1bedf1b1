"""`hawthorn data list` and `hawthorn data prepare NAME`."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

app = typer.Typer(no_args_is_help=True, help="Show and prepare data sets.")
console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)

DataDir = Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")]


@app.command("list")
def list_(data_dir: DataDir = None) -> None:
    """Show which data sets are there, where, and what is missing."""
    from tasks.prepare import catalogue
    from tasks.source import DataSource

    source = DataSource.default(data_dir)
    table = Table("data set", "ready", "samples", "input", "classes", "where it is, or what to do", "terms")
    for entry in catalogue(source):
        place = str(entry.found) if entry.found else "built in" if entry.ready else ""
        todo = "packed; the first use unpacks it into the cache" if entry.packed else ""
        todo = todo if entry.ready else f"hawthorn data prepare {entry.name}"
        samples = f"{entry.num_train} + {entry.num_test}" if entry.num_train else ""
        shape = "x".join(map(str, entry.input_shape)) if entry.input_shape else ""
        table.add_row(
            entry.name,
            "yes" if entry.ready else "no",
            samples,
            shape,
            str(entry.num_classes or ""),
            "\n".join(filter(None, (place, todo))),
            entry.terms,
        )
    console.print(table)
    console.print(f"looked in: {', '.join(map(str, source.roots)) or 'nowhere'}; cache: {source.cache}", soft_wrap=True)


@app.command()
def prepare(name: str, data_dir: DataDir = None) -> None:
    """Unpack or download a data set into the cache."""
    from tasks.prepare import prepare as prepare_data
    from tasks.source import DataSource

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(bar, description=what, completed=done, total=total or None)

        path = prepare_data(name, DataSource.default(data_dir), on_progress)
    console.print(f"{name}: ready in {path}", soft_wrap=True)
