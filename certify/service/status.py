"""Which status code answers which error, and the errors that only the service has.

A client must be able to act on a code alone: INVALID_ARGUMENT and OUT_OF_RANGE never work when repeated,
RESOURCE_EXHAUSTED and UNAVAILABLE may, NOT_FOUND works after an upload.
"""

import logging
import re
import secrets

import grpc
import torch

from certify.service.queue import ClosedError, QueueFullError, StoppedError
from certify.service.store import StoreFullError
from tasks.errors import HawthornError

_log = logging.getLogger("hawthorn.certify")
_CODES: tuple[tuple[type[BaseException], grpc.StatusCode], ...] = (
    (QueueFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (StoreFullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (ClosedError, grpc.StatusCode.UNAVAILABLE),
    (StoppedError, grpc.StatusCode.CANCELLED),
    (HawthornError, grpc.StatusCode.INVALID_ARGUMENT),
)
# How PyTorch's allocators say it, each in an ordinary RuntimeError.
_NO_MEMORY = re.compile(
    r"not enough memory|can't allocate memory|out of memory|alloc_failed|bad_alloc|failed to allocate", re.IGNORECASE
)


class RefusalError(HawthornError):
    """A request is answered with a status code of its own."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def invalid(message: str) -> RefusalError:
    """Return the refusal of a request that can never work."""
    return RefusalError(grpc.StatusCode.INVALID_ARGUMENT, message)


def out_of_range(message: str) -> RefusalError:
    """Return the refusal of a number beyond what this service allows."""
    return RefusalError(grpc.StatusCode.OUT_OF_RANGE, message)


def status_of(error: BaseException) -> tuple[grpc.StatusCode, str]:
    """Return code and message for `error`; a defect is logged under a number and told apart from it."""
    if isinstance(error, RefusalError):
        return error.code, str(error)
    for kind, code in _CODES:
        if isinstance(error, kind):
            return code, str(error)
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None
    ):
        return grpc.StatusCode.RESOURCE_EXHAUSTED, "the device has too little memory now; try again, or a smaller set"
    number = secrets.token_hex(4)
    _log.error("defect", extra={"fields": {"incident": number}}, exc_info=error)
    return grpc.StatusCode.INTERNAL, f"a defect of the service; its log has it as incident {number}"
