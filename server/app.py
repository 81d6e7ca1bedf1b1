"""The ServerApp: reads the run's settings and runs the federation over the grid that Flower gives it."""

from logging import INFO

from flwr.app import Context
from flwr.common import log
from flwr.serverapp import Grid, ServerApp

from server.federation import run_federation
from server.record import RoundRecord
from tasks.config import RunConfig

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that `context.run_config` describes; the record is in its runs folder."""
    config = RunConfig.read(context.run_config)
    log(INFO, "run record: %s", config.run_folder)
    run_federation(config, grid, _log_round)


def _log_round(record: RoundRecord) -> None:
    percent = [
        f"{name} {100 * value:.2f} %" for name, value in (("ACC", record.acc), ("ASR", record.asr)) if value is not None
    ]
    skipped = f", skipped: {record.skipped}" if record.skipped else ""
    log(INFO, "round %d: %s, %.2f s%s", record.round, ", ".join(percent) or "not evaluated", record.seconds, skipped)
