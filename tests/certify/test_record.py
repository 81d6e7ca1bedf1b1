"""Certificates: a round trip through one JSON line, refusals, soundness, immutability."""

import copy
import json
import math
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certify.record import SCHEMA, Assumption, Certificate
from tasks.errors import CertificationError, RecordError

SHA = "0123456789abcdef" * 4
CONVEX = Assumption("convex_loss", "checked", "logistic regression")
FIXED = Assumption("fixed_weights", "stated")
FLIPPED = Assumption("labels_unchanged", "violated", "the attack relabels")
WHOLE = Certificate(
    level="feature", method="crfl", unit="l2", label=3, radius=1.28516003878, model_sha256=SHA, data_sha256=SHA[::-1],
    sample=17, seed=1, parameters={"sigma": 0.01, "rounds": 100, "rho": [3.0, 4.0], "rule": "fedavg()", "clip": None},
    assumptions=(CONVEX, FIXED), counts=(10, 20, 0, 970), bounds={"pa_lower": 0.94, "pb_upper": 0.06},
)  # fmt: skip


def changed(**entries: Any) -> str:
    """Return the JSON line of WHOLE with raw entries replaced."""
    return json.dumps(json.loads(WHOLE.to_json()) | entries)


def test_round_trip_is_one_line_and_loses_nothing() -> None:
    line = WHOLE.to_json()
    assert "\n" not in line
    assert Certificate.from_json(line) == WHOLE
    assert Certificate.from_json(line).to_json() == line
    assert json.loads(line)["schema"] == SCHEMA
    assert WHOLE.parameters["rho"] == (3.0, 4.0)


names = st.text(min_size=1, max_size=8)
plain = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8)
)


@given(
    label=st.none() | st.integers(0, 9), radius=st.floats(min_value=0), closed=st.booleans(),
    parameters=st.dictionaries(names, plain | st.lists(plain | st.lists(plain, max_size=2), max_size=3), max_size=4),
    counts=st.lists(st.integers(0, 10**6), max_size=5),
    bounds=st.dictionaries(names.map(lambda name: name + "_lower"), st.floats(allow_nan=False), max_size=3),
    details=st.lists(st.text(max_size=8), max_size=3), status=st.sampled_from(["checked", "stated", "violated"]),
)  # fmt: skip
def test_any_certificate_survives_its_line(
    label: int | None, radius: float, details: Any, status: Any, **rest: Any
) -> None:
    assumptions = tuple(Assumption(f"a{i}", status, detail) for i, detail in enumerate(details))
    certificate = replace(WHOLE, label=label, radius=0.0 if label is None else radius, assumptions=assumptions, **rest)
    line = certificate.to_json()
    assert len(line.splitlines()) == 1
    assert Certificate.from_json(line) == certificate
    assert certificate.sound == (status != "violated" or not details)


def test_infinity_is_text_and_nan_is_refused() -> None:
    endless = replace(WHOLE, radius=math.inf, bounds={"margin_lower": -math.inf})
    assert json.loads(endless.to_json())["radius"] == "inf"
    assert json.loads(endless.to_json())["bounds"] == {"margin_lower": "-inf"}
    assert Certificate.from_json(endless.to_json()) == endless
    for wrong in ({"radius": math.nan}, {"bounds": {"pa_lower": math.nan}}, {"parameters": {"sigma": math.nan}}):
        with pytest.raises(CertificationError, match=r"NaN|finite"):
            replace(WHOLE, **wrong)
    with pytest.raises(CertificationError, match="sigma must be finite"):
        replace(WHOLE, parameters={"sigma": (1.0, math.inf)})


def test_soundness_is_no_violated_assumption() -> None:
    assert WHOLE.sound
    broken = replace(WHOLE, assumptions=(CONVEX, FLIPPED))
    assert not broken.sound
    assert broken.violated == (FLIPPED,)
    assert Certificate.from_json(broken.to_json()).violated == (FLIPPED,)


def test_the_claim_is_a_sentence() -> None:
    assert WHOLE.claim == "the label stays 3 under every feature-level change of size < 1.28516 (l2)"
    clients = replace(WHOLE, level="client", unit="clients", radius=12, closed=True)
    assert clients.claim == "the label stays 3 under every client-level change of size <= 12 (clients)"
    nothing = replace(WHOLE, label=None, radius=0.0)
    assert nothing.abstained
    assert "nothing is claimed" in nothing.claim


def test_numpy_and_torch_numbers_become_plain() -> None:
    certificate = replace(
        WHOLE, label=np.int64(2), radius=np.float32(0.5), sample=torch.tensor(4), counts=torch.tensor([3, 997]),
        parameters={"sigma": np.float64(0.25), "steps": np.int32(7)}, bounds={"pa_lower": torch.tensor(0.5)},
    )  # fmt: skip
    assert (certificate.label, certificate.radius, certificate.sample, certificate.counts) == (2, 0.5, 4, (3, 997))
    assert {type(value) for value in certificate.parameters.values()} == {float, int}
    assert Certificate.from_json(certificate.to_json()) == certificate


def test_nothing_in_it_can_change_and_it_travels() -> None:
    given_parameters = {"sigma": 0.01}
    certificate = replace(WHOLE, parameters=given_parameters)
    given_parameters["sigma"] = 9.0
    assert certificate.parameters == {"sigma": 0.01}
    with pytest.raises(FrozenInstanceError):
        certificate.radius = 9.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        certificate.bounds["pa_lower"] = 1.0  # type: ignore[index]
    assert pickle.loads(pickle.dumps(WHOLE)) == copy.deepcopy(WHOLE) == WHOLE  # noqa: S301  (our own bytes)
    assert len({WHOLE, copy.copy(WHOLE), certificate}) == 2


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"level": "pixel"}, "feature or sample or client or model or input, got 'pixel'"),
    ({"method": ""}, "method must be a name"),
    ({"unit": None}, "unit must be a name"),
    ({"label": -1}, "label must be None or a whole number"),
    ({"label": True}, "label must be None or a whole number"),
    ({"label": None}, "abstained certificate .* radius 0, got 1.28"),
    ({"radius": -1.0}, "radius must be 0 or more"),
    ({"radius": "inf"}, "radius must be a number"),
    ({"radius": None}, "radius must be a number"),
    ({"radius": 10**400}, "radius must be exact"),
    ({"model_sha256": SHA.upper()}, "model_sha256 must be 64 lower-case"),
    ({"data_sha256": SHA + "\n"}, "data_sha256 must be 64 lower-case"),
    ({"seed": 1.5}, "seed must be None or a whole number"),
    ({"closed": 1}, "closed must be True or False"),
    ({"counts": (1, -1)}, "counts must be whole numbers"),
    ({"bounds": {"pa": 0.5}}, "ends in _lower or _upper, got 'pa'"),
    ({"parameters": {"model": object()}}, "parameter model must be None"),
    ({"parameters": {1: 2}}, "name of a parameter must be text"),
    ({"assumptions": ("convex",)}, "must be Assumption objects"),
    ({"assumptions": (CONVEX, replace(CONVEX, status="violated"))}, "one status"),
]


@pytest.mark.parametrize(("entries", "message"), WRONG, ids=[message for _, message in WRONG])
def test_contradictions_are_refused(entries: dict[str, Any], message: str) -> None:
    with pytest.raises(CertificationError, match=message):
        replace(WHOLE, **entries)


@pytest.mark.parametrize("entries", [("", "stated"), ("convex", "hoped"), ("convex", "stated", None)])
def test_assumptions_are_checked(entries: tuple[Any, ...]) -> None:
    with pytest.raises(CertificationError, match="must"):
        Assumption(*entries)


UNREADABLE = {
    "one line of JSON": "{",
    "schema 1, got 'list'": "[]",
    "schema 1, got None": "{}",
    "schema 1, got 2": changed(schema=2),
    "schema 1, got True": changed(schema=True),
    r"unknown \['more'\]": changed(more=1),
    r"missing \['radius'\]": WHOLE.to_json().replace('"radius":1.28516003878,', ""),
    "without NaN": changed(radius=math.nan),
    "without Infinity": changed(radius=math.inf),
    "radius must be a number, got 'nan'": changed(radius="nan"),
    "level must be": changed(level="pixel"),
    "hoped": changed(assumptions=[{"name": "convex", "status": "hoped", "detail": ""}]),
    "unexpected keyword": changed(assumptions=[{"name": "convex", "status": "stated", "why": ""}]),
    "contradicts": changed(bounds=[1]),
    "contradicts its schema": changed(parameters=None),
    "contradicts its": changed(counts=7),
    r"\['label'\] twice": WHOLE.to_json().replace("{", '{"label":9,', 1),
}


@pytest.mark.parametrize("message", UNREADABLE)
def test_lines_that_are_no_certificate_are_refused(message: str) -> None:
    with pytest.raises(RecordError, match=message):
        Certificate.from_json(UNREADABLE[message])
