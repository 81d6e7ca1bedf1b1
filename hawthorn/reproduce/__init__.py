"""Tables of papers, run again: experiments with the paper's figures beside them as data (`[paper]`)."""

from hawthorn.reproduce.study import Row, Study, read_rows, read_study, shipped_studies

__all__ = ["Row", "Study", "read_rows", "read_study", "shipped_studies"]
