"""`hawthorn certify ...`: the commands of `python -m certify`, which work without Flower as well."""

from certify.cli import app

__all__ = ["app"]
