"""The command line: `hawthorn run`, `reproduce`, `list`, `report`, `compare`, `replay`, `data`."""

import csv
import importlib.metadata
import json
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hawthorn.commands import certify, client, data, edge_cases, keys, listing, models, quorum, reproduce, runs
from hawthorn.engines import QUIET
from tasks.errors import HawthornError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated learning that defends itself and proves it.",
)
app.add_typer(data.app, name="data")
app.add_typer(certify.app, name="certify")
app.add_typer(keys.app, name="keys")
app.command("reproduce")(reproduce.reproduce)
app.command("tau")(models.tau)
app.command("triggers")(models.triggers)
app.command("edge-cases")(edge_cases.edge_cases)
app.command("quorum")(quorum.quorum)
app.command("client")(client.client)
# A pipe or a file has no width of its own; what is printed may be foreign text, so markup stays text.
console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
errors = Console(stderr=True, markup=False, highlight=False)

RunsArgument = Annotated[list[Path], typer.Argument(help="Run folders, or folders of experiments with several arms.")]


def _version(asked: bool) -> None:
    if asked:
        print(f"hawthorn {importlib.metadata.version('hawthorn')}, flwr {importlib.metadata.version('flwr')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show versions.")
    ] = False,
) -> None:
    """Federated learning that defends itself and proves it."""


@app.command()
def run(
    file: Annotated[str | None, typer.Argument(help="An experiment file, or the name of a shipped one.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting.")] = None,
    engine: Annotated[str, typer.Option(help="in_process, flower, cluster or compose.")] = "in_process",
    name: Annotated[str | None, typer.Option(help="Name of the run's folder.")] = None,
    runs_dir: Annotated[str | None, typer.Option(help="Folder that holds run folders.")] = None,
    data_dir: Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")] = None,
    arm: Annotated[str | None, typer.Option(help="Run this arm of the file only.")] = None,
    variant: Annotated[str | None, typer.Option(help="Which of the file's variants; default: its first.")] = None,
    jobs: Annotated[int, typer.Option(help="Arms that run at a time, in processes of their own.")] = 1,
    keep: Annotated[
        bool, typer.Option("--continue", help="Keep finished arms of the same settings, go on with interrupted ones.")
    ] = False,
    from_model: Annotated[str | None, typer.Option(help="Start from a model.safetensors.")] = None,
    keep_updates: Annotated[
        bool, typer.Option("--keep-updates", help="Store every round's updates, for replay.")
    ] = False,
    resume: Annotated[Path | None, typer.Option(help="Continue an interrupted run folder.")] = None,
    report: Annotated[bool, typer.Option(help="Write the HTML report at the end.")] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Flower's log.")] = False,
) -> None:
    """Run an experiment: every arm a federation of its own, then the report. Without a file: the quickstart."""
    given: dict[str, Any] = {}
    paths = {"runs-dir": runs_dir, "data-dir": data_dir, "from-model": from_model}
    given.update({key: os.path.abspath(os.path.expanduser(path)) for key, path in paths.items() if path})
    if keep_updates:
        given["keep-updates"] = True
    if resume is not None:
        if file or name or arm or runs_dir or from_model or variant or keep:
            raise typer.BadParameter(
                "--resume takes its settings from the run folder; only --set, --jobs and --engine go with it"
            )
        runs.resume(console, resume, set_ or [], given, engine, jobs=jobs, report=report, verbose=verbose)
        return
    chosen = {"name": name, "arm": arm, "variant": variant, "jobs": jobs, "keep": keep}
    runs.run(console, file, set_ or [], given, engine, **chosen, report=report, verbose=verbose)


@app.command("list")
def list_(
    kind: Annotated[str | None, typer.Argument(help="rule, attack, dataset, ..., settings, experiments.")] = None,
) -> None:
    """Show what exists: components with their arguments, settings, engines, experiments."""
    listing.show(console, kind)


@app.command()
def report(
    folders: RunsArgument,
    out: Annotated[
        Path | None, typer.Option(help="Path of the HTML page; default: report.html in the first folder.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs, side by side, and a PNG beside it."""
    page = runs.write(runs.read_all(folders), out or folders[0] / "report.html")
    console.print(f"report: {page}", soft_wrap=True)


@app.command()
def compare(
    folders: RunsArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
) -> None:
    """Print a table of runs."""
    from hawthorn.compare import compare_rows, compare_table

    records = runs.read_all(folders)
    if as_json:
        print(json.dumps(compare_rows(records), indent=2))
    elif as_csv:
        rows = compare_rows(records)
        writer = csv.DictWriter(sys.stdout, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    else:
        console.print(compare_table(records))


@app.command()
def replay(
    folder: Annotated[Path, typer.Argument(help="A run folder made with --keep-updates.")],
    rule: Annotated[str, typer.Option(help="The other rule, for example 'krum(num_byzantine=2)'.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what another rule would have chosen each round, from stored updates, without training again."""
    from hawthorn.replay import replay as replay_run
    from hawthorn.replay import replay_table

    result = replay_run(folder, rule)
    if as_json:
        print(result.to_json())
    else:
        console.print(replay_table(result))


def main() -> None:
    """Entry point: errors that Hawthorn raises on purpose are printed without a traceback."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the record says "interrupted"
    try:
        app()
    except HawthornError as error:
        errors.print(f"error: {error}", style="bold red", soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
