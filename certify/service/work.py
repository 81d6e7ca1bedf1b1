"""The work itself: the library is called with what was asked, and its dataclasses become the bytes that are kept.

Nothing here computes a certificate: what a client gets is what the library would have given it.
"""

import contextlib
import dataclasses
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import torch
from torch import Tensor

from certify.bounds import crfl_top_two, simultaneous, two_stage
from certify.crfl.certificates import certify_crfl
from certify.crfl.evidence import Evidence
from certify.gate import GateMetrics
from certify.network import Network
from certify.record import Certificate
from certify.service import certify_pb2 as pb
from certify.service import messages, wire
from certify.service.limits import Limits
from certify.service.measure import GateSettings, measure
from certify.service.messages import Claim
from certify.service.queue import Control, StoppedError
from certify.service.status import RefusalError
from certify.service.store import Store, StoreFullError
from certify.service.wire import CertificationSet
from certify.smoothing.sampled import count_votes
from certify.smoothing.votes import Plan, Votes
from certify.zonotope import ZonotopeResult, check
from tasks.errors import CertificationError, HawthornError

_log = logging.getLogger("hawthorn.certify")


class Counting:
    """Counts votes for one model and set: from finished results, from saved progress, or from the first draw."""

    def __init__(
        self, network: Network, inputs: Tensor, *, store: Store, device: torch.device, limits: Limits,
        resumed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.network, self.inputs, self.store, self.device = network, inputs, store, device
        self.limits, self.resumed = limits, resumed

    def count(self, key: str, asked: dict[str, Any], control: Control) -> Votes:
        """Return the votes that were asked for under the hash `key`, saving progress on the way and the result."""
        if (content := self.store.read("results", key)) is not None:
            return read_votes(*_read(content))
        start = _saved(self.store, key)
        if start is not None:
            self.resumed()
            _log.info("resumed", extra={"fields": {"request": key, "done": start.num_draws}})
        saved_at = time.monotonic()

        def on_progress(votes: Votes) -> None:
            nonlocal saved_at
            control.report(votes.num_draws, votes.plan.num_draws, asked["stream"])
            if time.monotonic() - saved_at >= self.limits.save_seconds:
                _save(self.store, key, votes)
                saved_at = time.monotonic()

        votes = count_votes(
            self.network, self.inputs, **asked, device=self.device, start=start,
            on_progress=on_progress, should_stop=control.should_stop, **_memory(self.limits),
        )  # fmt: skip
        if not votes.complete:
            _save(self.store, key, votes)
            raise StoppedError("the work was given up; what was done is kept and taken up by the same request")
        keep(self.store, key, write_votes(votes))  # also where it is only part of an answer
        return votes


def certificates(votes: Votes, selection: Votes | None, claim: Claim, network: Network) -> list[Certificate]:
    """Return the certificates of a claim: bounds on the votes, then what the training record makes of them."""
    draws, shared = votes.num_draws, {"num_points": claim.num_points}
    interval: Any = claim.interval
    if selection is not None:
        found = two_stage(selection.counts, votes.counts, draws, claim.alpha, interval=interval, **shared)
    elif claim.bounds == "simultaneous":
        found = simultaneous(votes.counts, draws, claim.alpha, interval=interval, **shared)
    else:
        found = crfl_top_two(votes.counts, draws, claim.alpha, **shared)
    kinds: dict[str, Any] = {"certificate": claim.certificate, "level": claim.level, "form": claim.form}
    evidence = Evidence.from_votes(votes, found, network=network)  # kept votes do not know their model any more
    return certify_crfl(claim.record, evidence, **kinds, change_norm=claim.change_norm)


def claimed(votes: Votes, selection: Votes | None, claim: Claim, network: Network) -> bytes:
    """Return votes and certificates as bytes; FAILED_PRECONDITION where the record allows no such certificate."""
    try:
        lines = [certificate.to_json() for certificate in certificates(votes, selection, claim, network)]
    except (HawthornError, ArithmeticError) as error:
        raise RefusalError(grpc.StatusCode.FAILED_PRECONDITION, f"no certificate: {error}") from None
    text = np.frombuffer("\n".join(lines).encode(), np.uint8)
    arrays = {"certificates": text, "counts": votes.counts}
    return wire.pack(arrays, {**dataclasses.asdict(votes.plan), "num_done": votes.num_draws})


def zonotope(
    network: Network, points: CertificationSet, asked: dict[str, Any], *,
    control: Control, device: torch.device, limits: Limits,
) -> bytes:  # fmt: skip
    """Return the bounds that were asked for."""
    known = asked | {"dtype": getattr(torch, asked["dtype"])} if "dtype" in asked else asked
    with _stopped(control):
        result = check(
            network, points.inputs, points.labels, **known, device=device, **_memory(limits),
            on_progress=lambda done, total: control.report(done, total, "points"), should_stop=control.should_stop,
        )  # fmt: skip
    return write_zonotope(result)


def gate(
    network: Network, validation: CertificationSet, certification: CertificationSet, settings: GateSettings, *,
    control: Control, device: torch.device, limits: Limits,
) -> bytes:  # fmt: skip
    """Return the metrics of a candidate."""
    with _stopped(control):
        metrics = measure(
            network, (validation.inputs, validation.labels), (certification.inputs, certification.labels), settings,
            device=device, on_progress=control.report, should_stop=control.should_stop, **_memory(limits),
            workers=max(1, (os.cpu_count() or 1) // limits.workers) if device.type == "cpu" else 1,
        )  # fmt: skip
    return messages.write_metrics(metrics).SerializeToString(deterministic=True)


def read_metrics(content: bytes) -> GateMetrics:
    """Return the metrics that `gate` gave."""
    return messages.metrics(pb.GateMetrics.FromString(content))


def write_votes(votes: Votes) -> bytes:
    """Return votes, complete or not, as bytes."""
    return wire.pack({"counts": votes.counts}, {**dataclasses.asdict(votes.plan), "num_done": votes.num_draws})


def read_votes(arrays: dict[str, Any], fields: dict[str, Any]) -> Votes:
    """Return the votes of a result."""
    num_done = fields.pop("num_done")
    return Votes(Plan(**fields), arrays["counts"], num_done)


def write_zonotope(result: ZonotopeResult) -> bytes:
    """Return a zonotope result as bytes: its tensors as arrays, its other fields as JSON."""
    values = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
    arrays = {name: np.ascontiguousarray(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()}
    return wire.pack(arrays, {name: value for name, value in values.items() if name not in tensors})


def read_zonotope(arrays: dict[str, Any], fields: dict[str, Any]) -> ZonotopeResult:
    """Return the zonotope result of arrays and fields."""
    values: dict[str, Any] = {**fields, **{name: torch.from_numpy(array) for name, array in arrays.items()}}
    return ZonotopeResult(**values)


def read_certificates(arrays: dict[str, Any]) -> list[Certificate]:
    """Return the certificates of a result."""
    return [Certificate.from_json(line) for line in arrays["certificates"].tobytes().decode().splitlines()]


def keep(store: Store, key: str, content: bytes) -> None:
    """Keep a finished result; on a full disk it is only logged, for whoever asked still gets it."""
    try:
        store.write("results", key, content)
        store.remove("progress", key)
    except StoreFullError as error:
        _log.error("result not kept", extra={"fields": {"request": key, "reason": str(error)}})


def _read(content: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays, text = wire.unpack(content)
    return arrays, wire.read_fields(text)


def _memory(limits: Limits) -> dict[str, Any]:
    """Return the limit of a certifier's working set as an argument; its own default where there is none."""
    return {} if limits.memory_bytes is None else {"memory_bytes": limits.memory_bytes}


@contextlib.contextmanager
def _stopped(control: Control) -> Iterator[None]:
    """Tell work that was stopped, which raises as work that failed does, from work that failed."""
    try:
        yield
    except CertificationError as error:
        if control.should_stop():
            raise StoppedError(str(error)) from None
        raise


def _saved(store: Store, key: str) -> Votes | None:
    """Return saved progress; None where there is none that can be used."""
    content = store.read("progress", key)
    if content is None:
        return None
    try:
        return read_votes(*_read(content))
    except (HawthornError, KeyError, TypeError, ValueError) as error:  # another version's: the draws are made anew
        _log.warning("progress not used", extra={"fields": {"request": key, "reason": str(error)}})
        return None


def _save(store: Store, key: str, votes: Votes) -> None:
    """Keep progress; where the disk is full the work goes on without."""
    try:
        store.write("progress", key, write_votes(votes))
    except StoreFullError as error:
        _log.warning("progress not kept", extra={"fields": {"request": key, "reason": str(error)}})
