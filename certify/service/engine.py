"""From requests to questions: what is asked is checked, named by a hash, and turned into work for the library.

The hash is over everything that the answer depends on, so that the same question, asked again or by another client,
or after a restart, gets the answer that is already there.
"""

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import torch

from certify.gate import GateDecision, decide
from certify.network import Network
from certify.precision import exact_arithmetic
from certify.service import certify_pb2 as pb
from certify.service import messages, wire, work
from certify.service.limits import Limits
from certify.service.measure import GateSettings
from certify.service.metrics import Metrics
from certify.service.queue import Control, StoppedError, Work
from certify.service.status import RefusalError, invalid, out_of_range
from certify.service.store import SHA256, Kind, Store
from certify.service.wire import CertificationSet

FORMAT = 3  # of results; raised whenever the same question gets another answer
_KEPT = 4  # models and sets in memory


@dataclass(frozen=True)
class Question:
    """Work and the hash of everything its result depends on."""

    key: str
    work: Work


class Engine:
    """Knows the models and sets of a store, and how to answer questions about them on one device."""

    def __init__(self, store: Store, device: torch.device, limits: Limits, metrics: Metrics) -> None:
        self.store, self.device, self.limits, self.metrics = store, device, limits, metrics
        self._lock = threading.Lock()
        self._loading: dict[tuple[Kind, str], threading.Lock] = {}
        self._loaded: OrderedDict[tuple[Kind, str], Any] = OrderedDict()
        self._infos: OrderedDict[str, pb.ModelInfo] = OrderedDict()

    def learn_model(self, sha256: str, network: Network) -> None:
        """Remember what a model's file describes."""
        info = pb.ModelInfo(
            id=sha256,
            network_sha256=network.sha256(),
            input_shape=network.input_shape,
            num_classes=network.num_classes,
            num_params=network.num_params,
        )
        with self._lock:
            self._infos[sha256] = info
            while len(self._infos) > 10_000:
                self._infos.popitem(last=False)

    def model_info(self, sha256: str) -> pb.ModelInfo:
        """Return what an uploaded model is."""
        self._want_there("models", sha256)
        if (info := self._infos.get(sha256)) is None:
            self.learn_model(sha256, self.network(sha256))
            info = self._infos[sha256]
        return info

    def set_info(self, sha256: str) -> pb.CertificationSetInfo:
        """Return what an uploaded certification set is."""
        self._want_there("sets", sha256)
        inputs = self.set(sha256).inputs
        return pb.CertificationSetInfo(id=sha256, num_points=len(inputs), input_shape=inputs.shape[1:])

    def network(self, sha256: str) -> Network:
        """Return an uploaded model on the device; NOT_FOUND where there is none."""
        return self._load("models", sha256, lambda path: wire.read_model(path).to(self.device))

    def set(self, sha256: str) -> CertificationSet:
        """Return an uploaded certification set; NOT_FOUND where there is none."""
        return self._load("sets", sha256, lambda path: wire.read_set(path, max_points=self.limits.max_points))

    def _want_there(self, kind: Kind, sha256: str) -> None:
        """Refuse an id that is none (INVALID_ARGUMENT) or that names nothing here (NOT_FOUND)."""
        what = "model" if kind == "models" else "certification set"
        if SHA256.fullmatch(sha256) is None:
            raise invalid(f"the id of a {what} is 64 lower-case hexadecimal digits, got {sha256[:80]!r}")
        if not self.store.has(kind, sha256):
            raise RefusalError(grpc.StatusCode.NOT_FOUND, f"there is no {what} {sha256} here; upload it (again)")

    def _load(self, kind: Kind, sha256: str, read: Callable[..., Any]) -> Any:
        """Return a file's content, read once however many ask for it at a time."""
        self._want_there(kind, sha256)
        place = (kind, sha256)
        with self._lock:
            own = self._loading.setdefault(place, threading.Lock())
        with own:
            with self._lock:
                if place in self._loaded:
                    self._loaded.move_to_end(place)
                    return self._loaded[place]
            try:
                with self.store.use(kind, sha256) as path:
                    content = read(path)
            except FileNotFoundError:
                raise RefusalError(grpc.StatusCode.NOT_FOUND, f"{sha256} was removed just now; upload it") from None
            with self._lock:
                self._loaded[place] = content
                self._loading.pop(place, None)
                of_kind = [other for other in self._loaded if other[0] == kind]
                for other in of_kind[:-_KEPT]:
                    del self._loaded[other]
            return content

    def _pair(self, model: str, set_id: str) -> tuple[Network, CertificationSet]:
        """Return model and set of a request after checking that they fit."""
        network, points = self.network(model), self.set(set_id)
        if tuple(points.inputs.shape[1:]) != network.input_shape:
            raise invalid(
                f"the model takes inputs of shape {network.input_shape}, those of the certification set have "
                f"{tuple(points.inputs.shape[1:])}: upload the set in the model's shape"
            )
        if int(points.labels.max()) >= network.num_classes:
            raise invalid(
                f"the model has {network.num_classes} classes, the set has the label {int(points.labels.max())}"
            )
        return network, points

    def smoothing(self, request: pb.CertifySmoothingRequest) -> Question:
        """Return the question of a smoothing request."""
        network, points = self._pair(request.model, request.set)
        if request.num_draws > self.limits.max_draws:
            raise out_of_range(f"num_draws may be {self.limits.max_draws} here, got {request.num_draws}")
        asked = messages.smoothing(request)
        # two kinds of devices round differently, and a vote between two close logits may go another way
        named = {"kind": "smoothing", "device": self.device.type, "model": request.model, "set": request.set}
        most = max(request.num_draws, request.claim.selection_draws)
        self._afford(network, passes=most * len(points.inputs), samples=1)
        key = _hash(named | asked)
        counting = work.Counting(
            network, points.inputs, store=self.store, device=self.device, limits=self.limits,
            resumed=self.metrics.resumed.inc,
        )  # fmt: skip
        if not request.HasField("claim"):
            return self._question(
                key, "smoothing", lambda control: work.write_votes(counting.count(key, asked, control))
            )
        claim = messages.claim(request.claim)
        told, found = (claim.record.num_params, claim.record.num_classes), (network.num_params, network.num_classes)
        if told != found:
            raise invalid(f"the record is of a model with (parameters, classes) {told}, the uploaded one has {found}")
        if claim.selection_draws > self.limits.max_draws:
            raise out_of_range(f"selection_draws may be {self.limits.max_draws} here, got {claim.selection_draws}")
        chosen = asked | {"stream": f"{asked['stream']}/selection", "num_draws": claim.selection_draws}
        described = asdict(claim) | {"record": claim.record.to_json()}

        def run(control: Control) -> bytes:
            first = counting.count(_hash(named | chosen), chosen, control) if claim.selection_draws else None
            return work.claimed(counting.count(key, asked, control), first, claim, network)

        return self._question(_hash(named | asked | {"claim": described}), "claim", run)

    def zonotope(self, request: pb.CheckZonotopeRequest) -> Question:
        """Return the question of a zonotope request."""
        network, points = self._pair(request.model, request.set)
        asked = messages.zonotope(request)
        self._afford(network, passes=_rows(network) * len(points.inputs), samples=_batch(len(points.inputs)))
        described = {"kind": "zonotope", "device": self.device.type, **asked}
        key = _hash(described | {"model": request.model, "set": request.set})

        def run(control: Control) -> bytes:
            return work.zonotope(network, points, asked, control=control, device=self.device, limits=self.limits)

        return self._question(key, "zonotope", run)

    def gate(self, request: pb.GateRequest) -> Question:
        """Return the question of a gate request: the metrics of its model."""
        settings = self._settings(request)
        network, validation = self._pair(request.model, request.validation_set)
        _, certification = self._pair(request.model, request.certification_set)
        attacks = (3 if settings.probes else 1) * (3 * settings.attack_steps + 2) * len(validation.inputs)
        bounds = len(settings.eps) * _rows(network) * len(certification.inputs)
        self._afford(network, passes=attacks + bounds, samples=_batch(len(certification.inputs)))
        sets = [request.validation_set, request.certification_set]
        described = {"kind": "gate", "device": self.device.type, "model": request.model, "sets": sets}
        key = _hash(described | asdict(settings))

        def run(control: Control) -> bytes:
            return work.gate(
                network, validation, certification, settings, control=control, device=self.device, limits=self.limits
            )

        return self._question(key, "gate", run)

    def _afford(self, network: Network, *, passes: int, samples: int) -> None:
        """Refuse work or memory beyond what one request may take; `samples` go through the network together."""
        operations, num_bytes = passes * network.operations, 8 * max(samples * network.widest, network.num_kept)
        if operations > self.limits.max_operations:
            raise out_of_range(
                f"this may take {operations:.1e} multiplications, one request may take {self.limits.max_operations:.1e}"
                " here; ask for fewer points, draws, steps or radii, or of a smaller model"
            )
        if num_bytes > self.limits.max_batch_bytes:
            raise out_of_range(
                f"a batch of {samples} points through this model fills {num_bytes} bytes, one request may fill "
                f"{self.limits.max_batch_bytes} here; ask for fewer points or of a narrower model"
            )

    def _settings(self, request: pb.GateRequest) -> GateSettings:
        if len(request.eps) > self.limits.max_radii:
            raise out_of_range(f"at most {self.limits.max_radii} radii at a time, got {len(request.eps)}")
        if request.attack_steps > self.limits.max_attack_steps:
            raise out_of_range(f"attack_steps may be {self.limits.max_attack_steps} here, got {request.attack_steps}")
        return messages.settings(request)

    def deciding(self, request: pb.GateRequest) -> Callable[[bytes], pb.GateDecision]:
        """Return what turns measured metrics into a decision; refuses a policy or a state that cannot be used."""
        policy, state = messages.policy(request.policy), messages.state(request.state)

        def answer(content: bytes) -> pb.GateDecision:
            decision: GateDecision = decide(work.read_metrics(content), state, policy)
            return messages.write_decision(decision)

        return answer

    def _question(self, key: str, kind: str, run: Work) -> Question:
        """Return the question whose work is timed and whose result is kept."""

        def kept(control: Control) -> bytes:
            if (content := self.store.read("results", key)) is not None:  # finished since the question was read
                return content
            start = time.monotonic()
            try:
                with exact_arithmetic():
                    content = run(control)
            except StoppedError:
                self.metrics.stopped.inc()
                raise
            self.metrics.work_seconds.labels(kind).observe(time.monotonic() - start)
            work.keep(self.store, key, content)
            return content

        return Question(key, kept)


def _rows(network: Network) -> int:
    """Return how many rows of coefficients bounds on one point may take: one per ReLU's number and class."""
    inside = [inner for layer in network.layers for inner in layer.inside]
    kinks = sum(layer.numbers for layer in inside if layer.kind in ("relu", "max_pool2d"))
    return 2 + kinks + network.num_classes


def _batch(num_points: int) -> int:
    """Return how many points the clean logits are taken of together."""
    return min(num_points, 128)


def _hash(described: dict[str, Any]) -> str:
    text = json.dumps({"format": FORMAT, **described}, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
