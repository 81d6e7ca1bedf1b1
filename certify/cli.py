"""The commands of certification: `hawthorn certify ...`, and `python -m certify ...` where Flower is not installed.

Exit codes: 0 done, 1 a verification found something or a service is not well, 2 it could not be done as asked for,
130 interrupted (the same command goes on).
"""

import typer

from certify.commands import files, making, serving

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, name="certify",
    help="Certify models, keep certificates as files, verify and draw them, serve certification.",
)  # fmt: skip
for command in (
    making.smooth, making.crfl, making.zonotope, files.verify, files.plot, files.show, serving.serve, serving.status,
):  # fmt: skip
    app.command()(command)
