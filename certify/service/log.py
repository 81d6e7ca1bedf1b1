"""Structured logs: one JSON object per line, so that a machine can read what a person can."""

import json
import logging
import sys
import time
from typing import Any, TextIO


class JsonLines(logging.Formatter):
    """Writes a record's time, level, event, fields and error as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def log_to(stream: TextIO = sys.stderr, level: str = "INFO") -> logging.Logger:
    """Send the service's log to `stream`, once however often this is called; returns its logger."""
    logger = logging.getLogger("hawthorn.certify")
    logger.setLevel(level)
    logger.propagate = False
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logger.handlers = [handler]
    return logger
