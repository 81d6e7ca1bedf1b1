"""The arms of an experiment: which of them are done already, and how the others are run, several at a time."""

from hawthorn.arms.perform import Outcome
from hawthorn.arms.run import Events, run_arms

__all__ = ["Events", "Outcome", "run_arms"]
