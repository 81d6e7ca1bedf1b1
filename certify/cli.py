"""The commands of certification: `hawthorn certify ...`, and `python -m certify ...` where Flower is not installed.

Exit codes: 0 done, 1 a verification found something or a service is not well, 2 it could not be done as asked for,
130 interrupted (the same command goes on).
"""

import functools
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.errors import HawthornError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, name="certify",
    help="Certify models, keep certificates as files, verify and draw them, serve certification.",
)  # fmt: skip
# A pipe or a file has no width of its own; what is printed may be foreign text, so markup stays text.
console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else 160, markup=False, highlight=False)
Command = TypeVar("Command", bound=Callable[..., None])


def _choice(*options: str, **known: Any) -> Any:
    return typer.Option(click_type=click.Choice(options), **known)


ModelArgument = Annotated[Path, typer.Argument(help="A model.safetensors, or the folder of a run.")]
FileArgument = Annotated[Path, typer.Argument(help="A file of certificates.")]
Architecture = Annotated[
    str | None, typer.Option("--model", help="Architecture, such as 'logistic_regression()'; else the run.json's.")
]
DatasetOption = Annotated[str | None, typer.Option(help="Data set, such as 'mnist()'; else the run.json's.")]
DataDir = Annotated[str | None, typer.Option(help="Folder with data sets; else HAWTHORN_DATA.")]
Split = Annotated[Any, _choice("test", "train", help="Which part of the data set.")]
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
    str, _choice("two_stage", "simultaneous", "paper", help="How votes become bounds; 'paper' fails with more.")
]
Interval = Annotated[str, _choice("clopper_pearson", "hoeffding", help="Confidence interval of one share.")]
Exact = Annotated[bool, typer.Option("--exact", help="Compute the votes instead of drawing them (linear models).")]


def _told(command: Command) -> Command:
    """Print errors that are raised on purpose without a traceback and exit with 2; an interruption exits with 130."""

    @functools.wraps(command)
    def wrapped(*args: Any, **known: Any) -> None:
        try:
            command(*args, **known)
        except KeyboardInterrupt:
            errors.print("interrupted", style="yellow")
            raise typer.Exit(130) from None
        except HawthornError as error:
            from certify.files.recipes import InterruptedWork

            if isinstance(error, InterruptedWork):
                errors.print(f"{error}; the same command goes on from there", style="yellow", soft_wrap=True)
                raise typer.Exit(130) from None
            errors.print(f"error: {error}", style="bold red", soft_wrap=True)
            raise typer.Exit(2) from None
        except ImportError as error:
            if (error.name or "").split(".")[0] not in ("grpc", "grpc_health", "grpc_reflection", "google"):
                raise
            errors.print(f"error: the service wants gRPC, which is not installed here ({error})", style="bold red")
            raise typer.Exit(2) from None

    return wrapped  # type: ignore[return-value]


@app.command()
@_told
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


@app.command()
@_told
def crfl(
    source: Annotated[Path, typer.Argument(metavar="RUN-OR-RECORD", help="A run's folder, or a training record.")],
    out: Out,
    model_file: Annotated[Path | None, typer.Option(help="The released model; else the run's.")] = None,
    dataset: DatasetOption = None,
    architecture: Architecture = None,
    certificate: Annotated[
        Any, _choice("sound", "paper", help="What holds for the released model, or the paper's Corollary 1.")
    ] = "sound",
    level: Annotated[Any, _choice("feature", "sample", "client", help="What attackers change.")] = "feature",
    form: Annotated[
        Any, _choice("margin", "neyman_pearson", "divergence", "marginal", help="Statement of a sound certificate.")
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


@app.command()
@_told
def zonotope(
    model: ModelArgument,
    out: Out,
    eps: Annotated[list[float], typer.Option(help="Radius of the l_inf ball, in units of the input; several times.")],
    dataset: DatasetOption = None,
    architecture: Architecture = None,
    method: Annotated[
        Any, _choice("zonotope", "crown", "interval", "best", help="Relaxation; 'best' is the least of the others.")
    ] = "zonotope",
    input_range: Annotated[tuple[float, float], typer.Option(help="What inputs can be.")] = (0.0, 1.0),
    dtype: Annotated[Any, _choice("float32", "float64", help="What bounds are computed in.")] = "float32",
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


@app.command()
@_told
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
    with _progress("verifying") as tell:
        verdict = verify_file(
            read_file, sample=sample, seed=seed, model_file=model_file, architecture=architecture, record_file=record,
            data_dir=data_dir, device=_device(device), on_progress=tell, allow_unrecorded=allow_unrecorded,
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


@app.command()
@_told
def plot(
    files: Annotated[list[Path], typer.Argument(help="Files of certificates.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="PNG to write.")],
    max_radius: Annotated[float | None, typer.Option(help="End of the radius axis.")] = None,
) -> None:
    """Draw certified accuracy and rate against the radius with confidence bands, and margins of bounds on inputs."""
    from certify.files.lines import read
    from certify.plots import plot as draw

    console.print(f"picture: {draw([read(file) for file in files], out, max_radius=max_radius)}", soft_wrap=True)


@app.command()
@_told
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


@app.command()
@_told
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 50051,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    store: Annotated[Path, typer.Option(help="Folder for models, points and results.")] = Path("certify-store"),
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token clients must send; else HAWTHORN_CERTIFY_TOKEN.")
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="The service's certificate chain, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    tls_client_ca: Annotated[Path | None, typer.Option(help="Clients must show a certificate of this one.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without TLS.")] = False,
    metrics_port: Annotated[int | None, typer.Option(min=0, max=65535, help="Prometheus metrics; else none.")] = None,
    queue_size: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 32,
    workers: Annotated[int, typer.Option(min=1, help="Requests that run at a time.")] = 1,
    grace: Annotated[float, typer.Option(min=0, help="Seconds for running work when it is told to end.")] = 30.0,
    log_level: Annotated[Any, _choice("DEBUG", "INFO", "WARNING", "ERROR", help="How much is logged.")] = "INFO",
) -> None:
    """Serve certification over gRPC until SIGTERM or Ctrl-C."""
    from certify.service.serve import serve as serve_forever

    finished = serve_forever(
        host=host, port=port, device=device, store=store, token=_token(token_file), tls_cert=tls_cert, tls_key=tls_key,
        tls_client_ca=tls_client_ca, insecure=insecure, metrics_port=metrics_port, queue_size=queue_size,
        workers=workers, grace=grace, log_level=log_level,
    )  # fmt: skip
    raise typer.Exit(0 if finished else 1)


@app.command()
@_told
def status(
    address: Annotated[str, typer.Option(help="Host and port of the service.")] = "127.0.0.1:50051",
    token_file: Annotated[Path | None, typer.Option(help="File with the token; else HAWTHORN_CERTIFY_TOKEN.")] = None,
    tls: Annotated[bool, typer.Option("--tls", help="Use TLS with the system's authorities.")] = False,
    tls_ca: Annotated[Path | None, typer.Option(help="Authority of the service's certificate, PEM.")] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="This client's certificate, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its key, PEM.")] = None,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an answer.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask a service what it runs on and allows; exit code 1 where it does not answer or refuses."""
    from google.protobuf.json_format import MessageToDict

    from certify.service.client import CertifyClient, ServiceError

    known: dict[str, Any] = {"tls": tls, "tls_ca": tls_ca, "tls_cert": tls_cert, "tls_key": tls_key}
    try:
        with CertifyClient(address, token=_token(token_file), timeout=timeout, attempts=2, **known) as client:
            info = MessageToDict(client.info(), preserving_proto_field_name=True)
    except ServiceError as error:
        errors.print(f"{address}: not well; {error}", style="bold red", soft_wrap=True)
        raise typer.Exit(1) from None
    if as_json:
        print(json.dumps({"address": address, **info}, indent=2))
        return
    console.print(f"{address}: serving", style="green")
    for name, value in info.items():
        console.print(f"  {name.replace('_', ' ')}: {value}", soft_wrap=True)


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
    with warnings.catch_warnings(record=True) as said, _stoppable() as should_stop, _progress(header.kind) as tell:
        warnings.simplefilter("always")
        known: dict[str, Any] = {"device": _device(device), "on_progress": tell, "should_stop": should_stop}
        file = make_file(header, subject, out, force=force, **known)
    for text in dict.fromkeys(str(warning.message) for warning in said):
        console.print(f"warning: {text}", style="yellow", soft_wrap=True)
    for table in tables(file):
        console.print(table)
    console.print(f"certificates: {out}", soft_wrap=True)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """Ask the work to stop at the first Ctrl-C or SIGTERM, so that it keeps what is done; a second one ends it."""
    asked: list[int] = []

    def ask(number: int, _: object) -> None:
        asked.append(number)
        for each, handler in previous.items():
            signal.signal(each, handler)

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in previous:
        signal.signal(number, ask)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal; elsewhere nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        bar = progress.add_task(what, total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _device(name: str) -> str:
    """Return the device after trying it."""
    import torch

    from tasks.errors import ConfigError

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"the device {name!r} cannot be used ({reason}); there are: cpu, cuda") from None
    return name


def _token(file: Path | None) -> str | None:
    """Return the token of a file or of the environment; never one of the command line, which others can see."""
    from tasks.errors import ConfigError

    if file is None:
        return os.environ.get("HAWTHORN_CERTIFY_TOKEN") or None
    try:
        return file.read_text("utf-8").strip()
    except OSError as error:
        raise ConfigError(f"cannot read the token file {file}: {error.strerror}") from None
