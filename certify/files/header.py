"""The first line of a file of certificates: which model, which points, which settings, and made by what."""

import hashlib
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from certify.crfl.training_record import TrainingRecord
from certify.files.settings import KINDS, Settings, ZonotopeSettings, kind_of, read_entries, write_settings
from tasks.dataset import Split
from tasks.errors import CertificationError, RecordError

SCHEMA = 2
TOOL = "hawthorn"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ENTRIES = {
    "tool",
    "schema",
    "kind",
    "model",
    "points",
    "settings",
    "record",
    "record_sha256",
    "record_file",
    "versions",
}


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the model is found: its file (relative to the certificates'), its architecture as text, its identity."""

    file: str
    architecture: str
    sha256: str  # of `certify.network.Network`, which knows the architecture as well as the numbers


@dataclass(frozen=True, kw_only=True)
class PointSource:
    """Where the points are found: data set, split, indices; and what they are: hash of the inputs, true labels."""

    dataset: str
    split: Split
    indices: tuple[int, ...]
    labels: tuple[int, ...]
    sha256: str

    def __post_init__(self) -> None:
        _want(len(self.indices) == len(self.labels) > 0, "points must be some, with one label each")
        _want(len(set(self.indices)) == len(self.indices), "indices of points must differ")
        _want(min(self.indices) >= 0 and min(self.labels) >= 0, "indices and labels are whole numbers from 0")


@dataclass(frozen=True, kw_only=True)
class Header:
    """What all certificates of one file have in common, and how to make them again."""

    model: ModelSource
    points: PointSource
    settings: Settings
    record: TrainingRecord | None = None  # of "crfl" alone
    record_file: str | None = None
    versions: Mapping[str, str] = field(default_factory=lambda: MappingProxyType(versions()))

    def __post_init__(self) -> None:
        for name, value in (("model", self.model.sha256), ("points", self.points.sha256)):
            _want(_SHA256.fullmatch(value) is not None, f"the sha256 of {name} must be 64 hexadecimal digits")
        _want((self.kind == "crfl") == (self.record is not None), "a training record goes with crfl and only with it")

    @property
    def kind(self) -> str:
        """smooth, crfl or zonotope."""
        return kind_of(self.settings)

    @property
    def record_sha256(self) -> str | None:
        """Hash of the training record, None without one; a run can publish it beside its model."""
        return None if self.record is None else record_sha256(self.record)

    @property
    def num_points(self) -> int:
        return len(self.points.indices)

    @property
    def num_certificates(self) -> int:
        """How many certificates a complete file has."""
        return self.num_points * (len(self.settings.eps) if isinstance(self.settings, ZonotopeSettings) else 1)

    def same_work(self, other: "Header") -> bool:
        """True where both files have the same certificates, wherever the model lies and whatever made them."""
        return self._work() == other._work()

    def _work(self) -> tuple[Any, ...]:
        return self.model.architecture, self.model.sha256, self.points, self.settings, self.record

    def to_json(self) -> str:
        """Return the header as one line of strict JSON."""
        entries = {
            "tool": TOOL, "schema": SCHEMA, "kind": self.kind, "model": asdict(self.model),
            "points": asdict(self.points), "settings": write_settings(self.settings),
            "record": None if self.record is None else json.loads(self.record.to_json()),
            "record_sha256": self.record_sha256, "record_file": self.record_file, "versions": dict(self.versions),
        }  # fmt: skip
        return json.dumps(entries, allow_nan=False, separators=(",", ":"))

    @staticmethod
    def from_json(line: str) -> "Header":
        """Read what `to_json` wrote; raises `RecordError` for anything else."""
        try:
            entries = json.loads(line, object_pairs_hook=_unique)
        except (ValueError, RecursionError) as error:
            raise RecordError(f"the first line must be the header of a file of certificates: {error}") from None
        if not isinstance(entries, dict) or entries.get("tool") != TOOL or "points" not in entries:
            raise RecordError("the first line must be the header of a file of certificates, it is something else")
        if type(entries.get("schema")) is not int or entries["schema"] != SCHEMA:
            raise RecordError(f"this version reads files of schema {SCHEMA}, got {entries.get('schema')!r}")
        if entries.keys() != _ENTRIES or not isinstance(entries["kind"], str) or entries["kind"] not in KINDS:
            missing, unknown = sorted(_ENTRIES - entries.keys()), sorted(entries.keys() - _ENTRIES)
            kind = entries.get("kind")
            raise RecordError(f"the header has other entries: missing {missing}, unknown {unknown}, kind {kind!r}")
        try:
            header = Header(
                model=read_entries(ModelSource, entries["model"]),
                points=read_entries(PointSource, entries["points"]),
                settings=read_entries(KINDS[entries["kind"]], entries["settings"]),
                record=None if entries["record"] is None else TrainingRecord.from_json(json.dumps(entries["record"])),
                record_file=_text(entries["record_file"]),
                versions=_versions(entries["versions"]),
            )
        except (CertificationError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise RecordError(f"the header contradicts its schema: {error}") from None
        if (told := entries["record_sha256"]) != header.record_sha256:
            raise RecordError(f"record_sha256 is {told!r:.80}, the training record has {header.record_sha256}")
        return header


def record_sha256(record: TrainingRecord) -> str:
    """Return the hash of a training record's entries, however the file that holds them is spaced."""
    return hashlib.sha256(record.to_json().encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of what computes certificates."""
    packages = {name: _version(name) for name in ("hawthorn", "torch", "numpy", "scipy")}
    return {**packages, "python": platform.python_version()}


def relative_to(path: Path, file: Path) -> str:
    """Return `path` as seen from the folder of `file`, so that both can be moved together."""
    return os.path.relpath(path.resolve(), file.resolve().parent)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise RecordError(f"the header has each entry once, got {str(twice)[:80]} twice")
    return dict(pairs)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _text(value: object) -> str | None:
    if value is not None and not isinstance(value, str):
        raise CertificationError(f"record_file must be text or null, got {value!r}")
    return value


def _versions(value: object) -> Mapping[str, str]:
    if not isinstance(value, dict) or not all(isinstance(version, str) for version in value.values()):
        raise CertificationError(f"versions must be text by name, got {value!r:.80}")
    return MappingProxyType(value)


def _want(holds: bool, message: str) -> None:
    if not holds:
        raise CertificationError(message)
