"""The tree of Hawthorn's own errors.

Every message says what was wanted, what came, and what exists or what to do next.
"""


class HawthornError(Exception):
    """Base of every error that Hawthorn raises on purpose; the command line prints it without a traceback."""


class ConfigError(HawthornError):
    """A setting has an unknown key, a wrong type, or a value out of range."""


class SpecError(ConfigError):
    """The text of a component, such as ``krum(num_byzantine=2)``, names nothing that exists or has wrong arguments."""


class DataError(HawthornError):
    """A data set is missing or its files are not what they should be."""


class AggregationError(HawthornError):
    """A rule's precondition on the updates is broken, such as n >= 2f + 3."""


class CertificationError(HawthornError):
    """A certificate was asked for under assumptions that do not hold."""


class RecordError(HawthornError):
    """A run record is missing, of an unknown version, or inconsistent."""


class EngineError(HawthornError):
    """An engine could not start or finish a federation."""
