"""What the commands of certification do on a terminal: print, show progress, tell errors, stop when asked to."""

import functools
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tasks.errors import HawthornError

# A pipe or a file has no width of its own; what is printed may be foreign text, so markup stays text.
console = Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False)
errors = Console(stderr=True, width=None if sys.stderr.isatty() else 160, markup=False, highlight=False)
Command = TypeVar("Command", bound=Callable[..., None])


def told(command: Command) -> Command:
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


@contextmanager
def stoppable() -> Iterator[Callable[[], bool]]:
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
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal; elsewhere nothing."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as bars:
        bar = bars.add_task(what, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def usable_device(name: str) -> str:
    """Return the device after trying it."""
    import torch

    from tasks.errors import ConfigError

    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise ConfigError(f"the device {name!r} cannot be used ({reason}); there are: cpu, cuda") from None
    return name
