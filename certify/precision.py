"""Full float32 precision where a certificate depends on the result.

On CUDA devices PyTorch lets convolutions round their inputs to TF32 (10 bits of fraction instead of 23) unless told
otherwise, and a program may allow the same for matrix products, bfloat16 on CPUs, or wrap everything in autocast. The
error is then about 5e-4 of the terms, far above the tolerances of the certifiers, so a bound would bound nothing.
`exact_arithmetic` asks for IEEE float32 inside its block, whatever the program around it wants for its training.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

FULL, UNSET = "ieee", "none"


def _switches() -> list[Any]:
    """Return what has an fp32_precision of its own; none in versions of PyTorch that know allow_tf32 alone."""
    backends: Any = torch.backends
    groups = [(backends.cuda, ("matmul",)), (backends.cudnn, ("conv", "rnn")), (backends.mkldnn, ("matmul", "conv"))]
    found = [getattr(group, name) for group, names in groups for name in names if hasattr(group, name)]
    return found if all(_is_new(switch) for switch in found) and hasattr(backends.cudnn, "conv") else []


def _is_new(switch: Any) -> bool:
    try:
        return isinstance(switch.fp32_precision, str)
    except (AttributeError, AssertionError):  # older ones have allow_tf32 alone and know no other name
        return False


class _Flags:
    """The flags belong to the whole process: the first block in sets them, the last one out sets them back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._before: list[Any] = []

    def enter(self) -> None:
        with self._lock:
            if self._depth == 0:
                self._before = self._full()
            self._depth += 1

    def leave(self) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                self._restore()

    def _full(self) -> list[Any]:
        """Ask for full precision and return what was asked for before."""
        switches = _switches()
        if not switches:
            before = [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
            torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
            return before
        before = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = FULL
        return before

    def _restore(self) -> None:
        switches = _switches()
        if not switches:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = self._before
        for switch, before in zip(switches, self._before if switches else []):
            switch.fp32_precision = UNSET
            if switch.fp32_precision != before:  # it was its own, not what the backend or all of PyTorch says
                switch.fp32_precision = before


_flags = _Flags()


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Compute in IEEE float32 inside the block: no TF32, no bfloat16, no autocast; blocks may nest and run in threads.

    The flags are the process's: while any thread is inside, others compute in full precision too. What changes them
    meanwhile is undone with the last block.
    """
    with contextlib.ExitStack() as stack:
        _flags.enter()
        stack.callback(_flags.leave)
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
