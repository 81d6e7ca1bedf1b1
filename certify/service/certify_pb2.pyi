from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServiceInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServiceInfo(_message.Message):
    __slots__ = ("version", "device", "max_model_bytes", "max_set_bytes", "max_points", "max_draws", "queue_size", "workers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_SET_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_POINTS_FIELD_NUMBER: _ClassVar[int]
    MAX_DRAWS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SIZE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    device: str
    max_model_bytes: int
    max_set_bytes: int
    max_points: int
    max_draws: int
    queue_size: int
    workers: int
    def __init__(self, version: _Optional[str] = ..., device: _Optional[str] = ..., max_model_bytes: _Optional[int] = ..., max_set_bytes: _Optional[int] = ..., max_points: _Optional[int] = ..., max_draws: _Optional[int] = ..., queue_size: _Optional[int] = ..., workers: _Optional[int] = ...) -> None: ...

class UploadRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: UploadHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[UploadHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("sha256", "num_bytes")
    SHA256_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    sha256: str
    num_bytes: int
    def __init__(self, sha256: _Optional[str] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("id", "network_sha256", "input_shape", "num_classes", "num_params")
    ID_FIELD_NUMBER: _ClassVar[int]
    NETWORK_SHA256_FIELD_NUMBER: _ClassVar[int]
    INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    NUM_CLASSES_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMS_FIELD_NUMBER: _ClassVar[int]
    id: str
    network_sha256: str
    input_shape: _containers.RepeatedScalarFieldContainer[int]
    num_classes: int
    num_params: int
    def __init__(self, id: _Optional[str] = ..., network_sha256: _Optional[str] = ..., input_shape: _Optional[_Iterable[int]] = ..., num_classes: _Optional[int] = ..., num_params: _Optional[int] = ...) -> None: ...

class GetCertificationSetRequest(_message.Message):
    __slots__ = ("set",)
    SET_FIELD_NUMBER: _ClassVar[int]
    set: str
    def __init__(self, set: _Optional[str] = ...) -> None: ...

class CertificationSetInfo(_message.Message):
    __slots__ = ("id", "num_points", "input_shape")
    ID_FIELD_NUMBER: _ClassVar[int]
    NUM_POINTS_FIELD_NUMBER: _ClassVar[int]
    INPUT_SHAPE_FIELD_NUMBER: _ClassVar[int]
    id: str
    num_points: int
    input_shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[str] = ..., num_points: _Optional[int] = ..., input_shape: _Optional[_Iterable[int]] = ...) -> None: ...

class Accepted(_message.Message):
    __slots__ = ("request_sha256", "cached", "waiting")
    REQUEST_SHA256_FIELD_NUMBER: _ClassVar[int]
    CACHED_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    request_sha256: str
    cached: bool
    waiting: int
    def __init__(self, request_sha256: _Optional[str] = ..., cached: _Optional[bool] = ..., waiting: _Optional[int] = ...) -> None: ...

class Progress(_message.Message):
    __slots__ = ("done", "total", "phase")
    DONE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    done: int
    total: int
    phase: str
    def __init__(self, done: _Optional[int] = ..., total: _Optional[int] = ..., phase: _Optional[str] = ...) -> None: ...

class ArrayPart(_message.Message):
    __slots__ = ("name", "dtype", "shape", "offset", "data")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    data: bytes
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Summary(_message.Message):
    __slots__ = ("json", "result_sha256")
    JSON_FIELD_NUMBER: _ClassVar[int]
    RESULT_SHA256_FIELD_NUMBER: _ClassVar[int]
    json: str
    result_sha256: str
    def __init__(self, json: _Optional[str] = ..., result_sha256: _Optional[str] = ...) -> None: ...

class CertifySmoothingRequest(_message.Message):
    __slots__ = ("model", "set", "sigma", "num_draws", "seed", "stream", "claim")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    SIGMA_FIELD_NUMBER: _ClassVar[int]
    NUM_DRAWS_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    STREAM_FIELD_NUMBER: _ClassVar[int]
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    model: str
    set: str
    sigma: float
    num_draws: int
    seed: int
    stream: str
    claim: Claim
    def __init__(self, model: _Optional[str] = ..., set: _Optional[str] = ..., sigma: _Optional[float] = ..., num_draws: _Optional[int] = ..., seed: _Optional[int] = ..., stream: _Optional[str] = ..., claim: _Optional[_Union[Claim, _Mapping]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("training_record", "certificate", "level", "form", "change_norm", "bounds", "interval", "alpha", "num_points", "selection_draws")
    TRAINING_RECORD_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    LEVEL_FIELD_NUMBER: _ClassVar[int]
    FORM_FIELD_NUMBER: _ClassVar[int]
    CHANGE_NORM_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    ALPHA_FIELD_NUMBER: _ClassVar[int]
    NUM_POINTS_FIELD_NUMBER: _ClassVar[int]
    SELECTION_DRAWS_FIELD_NUMBER: _ClassVar[int]
    training_record: str
    certificate: str
    level: str
    form: str
    change_norm: float
    bounds: str
    interval: str
    alpha: float
    num_points: int
    selection_draws: int
    def __init__(self, training_record: _Optional[str] = ..., certificate: _Optional[str] = ..., level: _Optional[str] = ..., form: _Optional[str] = ..., change_norm: _Optional[float] = ..., bounds: _Optional[str] = ..., interval: _Optional[str] = ..., alpha: _Optional[float] = ..., num_points: _Optional[int] = ..., selection_draws: _Optional[int] = ...) -> None: ...

class CertifySmoothingResponse(_message.Message):
    __slots__ = ("accepted", "progress", "array", "summary")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ARRAY_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    array: ArrayPart
    summary: Summary
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., array: _Optional[_Union[ArrayPart, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class CheckZonotopeRequest(_message.Message):
    __slots__ = ("model", "set", "eps", "method", "dtype", "input_range")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    INPUT_RANGE_FIELD_NUMBER: _ClassVar[int]
    model: str
    set: str
    eps: float
    method: str
    dtype: str
    input_range: InputRange
    def __init__(self, model: _Optional[str] = ..., set: _Optional[str] = ..., eps: _Optional[float] = ..., method: _Optional[str] = ..., dtype: _Optional[str] = ..., input_range: _Optional[_Union[InputRange, _Mapping]] = ...) -> None: ...

class InputRange(_message.Message):
    __slots__ = ("low", "high")
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    low: float
    high: float
    def __init__(self, low: _Optional[float] = ..., high: _Optional[float] = ...) -> None: ...

class CheckZonotopeResponse(_message.Message):
    __slots__ = ("accepted", "progress", "array", "summary")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    ARRAY_FIELD_NUMBER: _ClassVar[int]
    SUMMARY_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    array: ArrayPart
    summary: Summary
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., array: _Optional[_Union[ArrayPart, _Mapping]] = ..., summary: _Optional[_Union[Summary, _Mapping]] = ...) -> None: ...

class GateRequest(_message.Message):
    __slots__ = ("model", "validation_set", "certification_set", "eps", "attack_eps", "attack_steps", "attack_step_size", "temperature", "seed", "probes", "input_range", "policy", "state")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VALIDATION_SET_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATION_SET_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    ATTACK_EPS_FIELD_NUMBER: _ClassVar[int]
    ATTACK_STEPS_FIELD_NUMBER: _ClassVar[int]
    ATTACK_STEP_SIZE_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    PROBES_FIELD_NUMBER: _ClassVar[int]
    INPUT_RANGE_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    model: str
    validation_set: str
    certification_set: str
    eps: _containers.RepeatedScalarFieldContainer[float]
    attack_eps: float
    attack_steps: int
    attack_step_size: float
    temperature: float
    seed: int
    probes: bool
    input_range: InputRange
    policy: GatePolicy
    state: GateState
    def __init__(self, model: _Optional[str] = ..., validation_set: _Optional[str] = ..., certification_set: _Optional[str] = ..., eps: _Optional[_Iterable[float]] = ..., attack_eps: _Optional[float] = ..., attack_steps: _Optional[int] = ..., attack_step_size: _Optional[float] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., probes: _Optional[bool] = ..., input_range: _Optional[_Union[InputRange, _Mapping]] = ..., policy: _Optional[_Union[GatePolicy, _Mapping]] = ..., state: _Optional[_Union[GateState, _Mapping]] = ...) -> None: ...

class GatePolicy(_message.Message):
    __slots__ = ("name", "options")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    name: str
    options: str
    def __init__(self, name: _Optional[str] = ..., options: _Optional[str] = ...) -> None: ...

class GateBound(_message.Message):
    __slots__ = ("eps", "certified_accuracy", "mean_loss", "relative_margin")
    EPS_FIELD_NUMBER: _ClassVar[int]
    CERTIFIED_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MEAN_LOSS_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_MARGIN_FIELD_NUMBER: _ClassVar[int]
    eps: float
    certified_accuracy: float
    mean_loss: float
    relative_margin: float
    def __init__(self, eps: _Optional[float] = ..., certified_accuracy: _Optional[float] = ..., mean_loss: _Optional[float] = ..., relative_margin: _Optional[float] = ...) -> None: ...

class GateMetrics(_message.Message):
    __slots__ = ("protocol", "normal_accuracy", "pgd_accuracy", "bounds", "margin_pgd_accuracy", "temperature_pgd_accuracy")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NORMAL_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    PGD_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    BOUNDS_FIELD_NUMBER: _ClassVar[int]
    MARGIN_PGD_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_PGD_ACCURACY_FIELD_NUMBER: _ClassVar[int]
    protocol: str
    normal_accuracy: float
    pgd_accuracy: float
    bounds: _containers.RepeatedCompositeFieldContainer[GateBound]
    margin_pgd_accuracy: float
    temperature_pgd_accuracy: float
    def __init__(self, protocol: _Optional[str] = ..., normal_accuracy: _Optional[float] = ..., pgd_accuracy: _Optional[float] = ..., bounds: _Optional[_Iterable[_Union[GateBound, _Mapping]]] = ..., margin_pgd_accuracy: _Optional[float] = ..., temperature_pgd_accuracy: _Optional[float] = ...) -> None: ...

class GateState(_message.Message):
    __slots__ = ("last_accepted", "best", "num_accepted")
    LAST_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    BEST_FIELD_NUMBER: _ClassVar[int]
    NUM_ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    last_accepted: GateMetrics
    best: GateMetrics
    num_accepted: int
    def __init__(self, last_accepted: _Optional[_Union[GateMetrics, _Mapping]] = ..., best: _Optional[_Union[GateMetrics, _Mapping]] = ..., num_accepted: _Optional[int] = ...) -> None: ...

class GateDecision(_message.Message):
    __slots__ = ("accepted", "reasons", "notes", "metrics", "state")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    REASONS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    accepted: bool
    reasons: _containers.RepeatedScalarFieldContainer[str]
    notes: _containers.RepeatedScalarFieldContainer[str]
    metrics: GateMetrics
    state: GateState
    def __init__(self, accepted: _Optional[bool] = ..., reasons: _Optional[_Iterable[str]] = ..., notes: _Optional[_Iterable[str]] = ..., metrics: _Optional[_Union[GateMetrics, _Mapping]] = ..., state: _Optional[_Union[GateState, _Mapping]] = ...) -> None: ...

class GateResponse(_message.Message):
    __slots__ = ("accepted", "progress", "decision")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    accepted: Accepted
    progress: Progress
    decision: GateDecision
    def __init__(self, accepted: _Optional[_Union[Accepted, _Mapping]] = ..., progress: _Optional[_Union[Progress, _Mapping]] = ..., decision: _Optional[_Union[GateDecision, _Mapping]] = ...) -> None: ...
