"""What goes wrong in a deployment, done on purpose: what the user sees, what was lost, how long it took to recover.

    python benchmarks/faults.py [--only partition,clock-skew] [--json OUT] [--keep FOLDER]

Every fault meets a small federation of real processes (engine `cluster`: TLS, node keys, gRPC) or, where it is about
the record or the certification service, the in-process engine. A run that went on without a client, or was resumed,
must have every round once; a resumed one must end with the very model of a run that nothing happened to.
Exits with 1 if a finished round was lost or a run came to a wrong end.
"""

import argparse
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from rich.console import Console
from rich.table import Table

from benchmarks.deployment import nodes, servers, service
from benchmarks.deployment.trial import Row
from hawthorn.engines import QUIET

FAULTS: dict[str, Callable[[Path], Row]] = {
    "supernode-killed": nodes.supernode_killed,
    "supernode-hung": nodes.supernode_hung,
    "superlink-restart": servers.superlink_restart,
    "serverapp-crash": servers.serverapp_crash,
    "certify-down": service.certify_down,
    "certify-slow": service.certify_slow,
    "certify-restarted": service.certify_restarted,
    "partition": nodes.partition,
    "full-disk": servers.full_disk,
    "two-runs": servers.two_runs,
    "clock-skew": nodes.clock_skew,
    "large-model": servers.large_model,
}


def try_faults(names: list[str], keep: Path | None = None) -> Iterator[Row]:
    """Try faults one after the other, in folders of `keep` that stay, or that do not; what raises is a failure."""
    for name in names:
        with contextlib.ExitStack() as stack:
            if keep is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hawthorn-faults-")))
            else:
                (folder := keep / name).mkdir(parents=True)
            try:
                yield FAULTS[name](folder)
            except Exception as error:
                yield Row(name, f"{type(error).__name__}: {error}"[:300], "?", None, False)


def table(rows: list[Row]) -> Table:
    """Return the table of what happened."""
    shown = Table("fault", "what the user sees", "what was lost", "seconds to recover", "")
    for row in rows:
        seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
        shown.add_row(row.fault, row.seen, row.lost, seconds, "ok" if row.passed else "FAILED")
    return shown


def main() -> None:
    """Print the table; exit with 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAULTS), help=f"of: {', '.join(FAULTS)}")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder for the runs' folders, which then stay")
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if given.disk is not None:
        servers.disk_child(given.disk)
        return
    names = given.only.split(",")
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]!r}; there are: {', '.join(FAULTS)}")
    rows = []
    for row in try_faults(names, given.keep):
        rows.append(row)
        print(f"{row.fault}: {'ok' if row.passed else 'FAILED'}; {row.seen}", file=sys.stderr, flush=True)
        if given.json:  # after each: what was seen stays if a later fault takes this process with it
            given.json.write_text(json.dumps([asdict(row) for row in rows], indent=2))
    Console(width=170).print(table(rows))
    sys.exit(not all(row.passed for row in rows))


if __name__ == "__main__":
    main()
