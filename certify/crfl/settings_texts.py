"""The settings of a run as texts in its training record, read as components and held against the record's numbers.

A text that is missing leaves what rests on it stated; one that contradicts the record, or names what CRFL's theorems do
not speak of, is a violated assumption.
"""

import math
from typing import Any

from certify.crfl.training_record import TrainingRecord
from certify.record import Assumption, Status
from tasks.errors import SpecError
from tasks.spec import Component, hyper_parameters, resolve, resolve_chain

# Arguments of local training that the bounds count; any other changes steps in ways they know nothing of. A gradient
# shortened to a largest norm, for one, makes a step that may move two models apart, where a plain one cannot.
_COUNTED = {"lr", "momentum", "weight_decay", "epochs", "steps", "batch_size", "decay_at", "decay_by", "round_decay"}
_CLOSE = 1e-9  # relative: the record computes rates and norms by the same formulas


def one_of(kind: str, text: str) -> str:
    """Return the name of the one component of `text`, if it has no arguments; otherwise ""."""
    component = _one(kind, text)
    return component.name if component is not None and not component.arguments else ""


def softmax_regression(record: TrainingRecord) -> tuple[bool, str]:
    """Return whether the record's model is a softmax regression on inputs as they come, and what it is."""
    component = _one("model", record.model)
    if component is None or component.name != "logistic_regression":
        return False, record.model
    known = _arguments(component)
    if known.pop("mean", None) is not None or known.pop("std", None) is not None:
        return False, f"{record.model} normalises inside the model, so norms and radii would be of other inputs"
    if known.pop("bias", True) != record.bias:
        return False, f"{record.model}, but bias is {record.bias} in the record"
    return not known, record.model


def settings_texts(record: TrainingRecord) -> list[Assumption]:
    """Return the assumptions that rest on texts of the settings."""
    return [
        _say("local_training", record.training, _training(record), "plain SGD on cross entropy at the recorded rates"),
        _say("transform", record.transform, _transform(record), "the recorded clip and noise, and nothing else"),
        _say("optimizer", record.optimizer, _optimizer(record), "the aggregate is the step"),
        _say("mixing", record.mixing, _empty(record.mixing), "none"),
        _say("collusion", record.collusion, _empty(record.collusion), "none"),
    ]


def _say(name: str, text: str | None, wrong: str, wanted: str) -> Assumption:
    status: Status = "stated" if text is None else "violated" if wrong else "checked"
    return Assumption(name, status, f"{'not recorded' if text is None else text or 'none'}; {wrong or wanted}")


def _training(record: TrainingRecord) -> str:
    """Return what is wrong with the text of local training: nothing for none."""
    if record.training is None:
        return ""
    component = _one("training", record.training)
    if component is None or component.name != "sgd":
        return "the theorems speak of plain SGD"
    known = _arguments(component)
    for name, value in known.items():
        if name not in _COUNTED and value is not None:
            return f"the theorems know of no {name}"
    for name in ("momentum", "weight_decay"):
        if known[name] != getattr(record, name):
            return f"{name} is {getattr(record, name):g} in the record"
    most = float(known["lr"]) * max(1.0, float(known["decay_by"])) ** len(known["decay_at"])
    for number, work in enumerate(record.rounds, start=1):
        largest = most * float(known["round_decay"]) ** (number - 1) * (1 - _CLOSE)
        if number >= record.attack_round and any(rate < largest for rate in work.learning_rates):
            return f"a rate of round {number} is below {largest:g} in the record"
    biggest = max(max(work.batch_sizes) for work in record.work)
    return f"a batch of {biggest} is in the record" if biggest > known["batch_size"] else ""


def _transform(record: TrainingRecord) -> str:
    """Return what is wrong with the text of the transforms: clip and noise must be the record's, round by round."""
    if record.transform is None:
        return ""
    try:
        chain = resolve_chain("transform", record.transform)
    except SpecError as error:
        return str(error)
    if len(chain) > 1 or (chain and chain[0].name not in ("crfl", "clip_model")):
        return "the record has one clip and noise, no other transforms"
    known = _arguments(chain[0]) if chain else {}
    for number, work in enumerate(record.rounds, start=1):
        if number < record.attack_round or not any(work.weights):
            continue  # a round without weights was skipped, and left the model as it was
        bound = _clip_norm(known, number)
        same = bound == work.clip_norm or (work.clip_norm is not None and math.isclose(bound or 0, work.clip_norm))
        if not same:
            return f"round {number} was clipped to {work.clip_norm} in the record"
        if number < record.num_rounds and work.noise != float(known.get("sigma", 0.0)):
            return f"noise of round {number} is {work.noise:g} in the record"
    return ""


def _clip_norm(known: dict[str, Any], number: int) -> float | None:
    if "max_norm" in known:
        return float(known["max_norm"])
    if "rho" not in known:
        return None
    cap = math.inf if known["cap"] is None else float(known["cap"])
    return min(float(known["slope"]) * number + float(known["rho"]), cap)


def _optimizer(record: TrainingRecord) -> str:
    if record.optimizer is None or one_of("optimizer", record.optimizer) == "step":
        return ""
    return "a server optimiser takes other steps than the aggregate"


def _empty(text: str | None) -> str:
    return "the theorems know of none" if text is not None and text.strip() else ""


def _one(kind: str, text: str) -> Component | None:
    try:
        return resolve(kind, text)
    except SpecError:
        return None


def _arguments(component: Component) -> dict[str, Any]:
    """Return the arguments of a component, defaults filled in."""
    defaults = {name: parameter.default for name, parameter in hyper_parameters(component.function).items()}
    return defaults | component.arguments
