"""Reports: one self-contained HTML page, and its main figure as a PNG, from the records of runs."""

from hawthorn.report.page import write_report

__all__ = ["write_report"]
