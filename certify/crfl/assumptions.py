"""What CRFL's certificates take for granted, each held against the record of the run.

Three statements, which need different things:

- "printed": Corollary 1 of Xie et al., "CRFL" (ICML 2021). Besides what it says, its proof needs inputs of norm at
  most 1 and unchanged labels (Lemma 1), local models within rho, and votes over the training noise: Theorem 2 bounds
  laws over trainings, while Algorithm 2 adds noise to the one model there is.
- "coupled": the released model's own distance (`certify.crfl.coupled`). Training noise and clipping are not needed.
- "marginal": the divergence of the laws over trainings, as Theorem 2 but with amplification by iteration.
"""

import math
from typing import Literal

from certify.crfl.evidence import Evidence
from certify.crfl.settings_texts import one_of, settings_texts, softmax_regression
from certify.crfl.training_record import CLIP_ERROR, RoundWork, TrainingRecord
from certify.linear import gradient_norm_upper, smoothness_upper
from certify.record import Assumption, Status

Statement = Literal["printed", "coupled", "marginal"]


def assumptions(
    record: TrainingRecord, evidence: Evidence, statement: Statement, replaced: bool = False,
    client_level: bool = False,
) -> tuple[Assumption, ...]:  # fmt: skip
    """Return every assumption of `statement` with its status; `replaced`: samples may become any other."""
    after = record.rounds[record.attack_round - 1 :]
    found = [*_training(record, after, statement), *_federation(record, after), *_data(record, statement, replaced)]
    found += settings_texts(record)
    found += _attack(record, statement, client_level)
    found += _released(record, evidence)
    if statement != "printed":
        detail = "local training and averaging are taken as exact; their float32 rounding is not modelled"
        found.append(_told("real_arithmetic", None, detail))
        detail = f"the clip lies within {record.clip_error:g} rho of the exact one, charged in rounds that may clip"
        found.append(_told("clip_error", _clip_error(record), detail))
    if statement == "coupled":
        found.append(_start(record))
    else:
        found += _law(record, evidence, after, statement)
    return tuple(found)


def _clip_error(record: TrainingRecord) -> bool | None:
    """Return whether the charge covers the product's own clip, where that is known to be the one."""
    if record.clip_error >= CLIP_ERROR:
        return True
    return False if record.transform is not None and record.transform.strip() else None


def _training(record: TrainingRecord, after: tuple[RoundWork, ...], statement: Statement) -> list[Assumption]:
    convex, told = softmax_regression(record)
    beta = smoothness_upper(record.data_norm_bound, record.bias) + record.weight_decay
    limit = (1 if statement == "printed" else 2) / beta if beta > 0 else math.inf
    rate = max(rate for work in after for rate in work.learning_rates)
    decay = record.weight_decay == 0 or (statement != "printed" and rate * record.weight_decay <= 1)
    plain = record.momentum == 0 and decay and record.gradient_clip is None
    sgd = f"momentum {record.momentum:g}, weight decay {record.weight_decay:g}, gradient clip {record.gradient_clip}"
    least = 1 if statement == "printed" else 2
    return [
        _told("convex_loss", convex, f"{told}; the theorems speak of softmax regression with cross entropy"),
        _told("step_size", rate <= limit, f"largest rate {rate:g}, limit {least}/beta = {limit:g}"),
        _told("plain_sgd", plain, sgd),
        _told("same_batches", record.same_batches, "batches and noise follow from seeds, whatever the data are"),
    ]


def _federation(record: TrainingRecord, after: tuple[RoundWork, ...]) -> list[Assumption]:
    present = min(len(work.participants) for work in after)
    fixed = one_of("rule", record.rule) == "mean"
    weight = max(math.fsum(work.weights) for work in after) * record.server_lr
    heuristic = "" if fixed else "; weights that depend on the updates differ between the worlds: a heuristic"
    # weights are kept in float32: what they sum to above 1 is charged (`certify.crfl.coupled.expansion_upper`)
    plain = record.server_optimizer == "none" and weight <= 1 + 1e-6
    return [
        _told("full_participation", present == record.num_clients, f"{present} of {record.num_clients} clients"),
        _told("fixed_weights", fixed, f"rule {record.rule}{heuristic}"),
        _told("server_step", plain, f"optimiser {record.server_optimizer}, weights sum to {weight:g} at most"),
        _update_limit(record, after),
    ]


def _update_limit(record: TrainingRecord, after: tuple[RoundWork, ...]) -> Assumption:
    """Hold the norm beyond which updates are dropped against the longest update that there can be in either world."""
    limit, name = record.max_update_norm, "update_limit"
    if limit is None:
        return _told(name, None, "no update was dropped for its norm, nor would one be in the other world")
    rate = max(rate for work in after for rate in work.learning_rates)
    steps = max(len(work.batch_sizes) for work in record.work)
    scale = max(1.0, *(work.scale for work in record.attacking))
    if record.weight_decay > 0:
        return _told(name, None, f"no update is dropped for a norm beyond {limit:g}; with weight decay none is bounded")
    longest = 2 * record.data_norm_bound  # a changed sample may be longer than those that were found
    reach = scale * steps * rate * gradient_norm_upper(longest, record.bias) * (1 + 1e-3)
    detail = f"updates on samples of norm {longest:g} reach {reach:g} at most, those beyond {limit:g} are dropped"
    return _told(name, reach <= limit, detail)


def _data(record: TrainingRecord, statement: Statement, replaced: bool) -> list[Assumption]:
    bound, found = record.data_norm_bound, record.data_norm_found
    detail = f"inputs have norm {bound:g} at most, found {'nothing' if found is None else f'{found:g}'}"
    if replaced:
        detail += "; a replaced sample keeps to it too"
    fits: bool | None = None if found is None or replaced else found <= bound
    fits = False if found is not None and found > bound else fits
    if statement != "printed":
        flips = "charged with sqrt(2) X~ per poisoned sample" if record.label_flips else "labels stay"
        return [_told("data_norm", fits, detail), _told("labels", True, "any other" if replaced else flips)]
    lemma = _told("data_norm", fits if bound <= 1 else False, f"{detail}; Lemma 1 needs 1")
    return [lemma, _told("labels", not record.label_flips, "Lemma 1 covers unchanged labels alone")]


def _attack(record: TrainingRecord, statement: Statement, client_level: bool) -> list[Assumption]:
    scales = sorted({work.scale for work in record.attacking})
    detail = f"by {', '.join(f'{scale:g}' for scale in scales)}"
    scaled: bool | None = True if scales == [1.0] else None
    if scaled is None and client_level:
        scaled = statement != "printed" and (statement == "marginal" or _updates_known(record))
        detail += ": other clients were recorded without" + (", charged with their updates" if scaled else "")
        if record.counterpart_scaled:
            detail += "; whoever attacks multiplies his honest update as well"
    elif scaled is None and record.counterpart_scaled:
        detail += ": the same client multiplies its honest update as well"
    elif scaled is None:
        known = statement == "marginal" or all(work.update_norm is not None for work in record.attacking)
        scaled = statement != "printed" and known
        detail += ": an honest client would not" + (", charged with its update" if scaled else "")
    return [
        _told("one_attacked_round", None, f"round {record.attack_round} of {record.num_rounds}, known beforehand"),
        _told("scaled_counterpart", scaled, detail),
    ]


def _updates_known(record: TrainingRecord) -> bool:
    return all(work.update_norm is not None for work in record.work)


def _released(record: TrainingRecord, evidence: Evidence) -> list[Assumption]:
    same = None if record.model_sha256 is None else record.model_sha256 == evidence.model_sha256
    found = [_told("released_model", same, "the votes or margins are of the recorded run's last model")]
    found.append(_model_form(record, evidence))
    if evidence.kind == "votes":
        match = 0 < evidence.sigma == record.smoothing_sigma
        detail = f"votes under sigma {evidence.sigma:g}, recorded {record.smoothing_sigma:g}"
        found.append(_told("smoothing_noise", match, detail))
        level = not evidence.method.startswith("crfl_top_two")
        detail = f"{evidence.method} fails with probability {evidence.alpha:g} over {evidence.num_points} points"
        found.append(_told("confidence", level, detail if level else "the printed pair fails with more than alpha"))
    return found


def _model_form(record: TrainingRecord, evidence: Evidence) -> Assumption:
    """Hold the model behind the evidence against what the record says of it."""
    differ = []
    features, rest = divmod(record.num_params, record.num_classes)
    if rest or features <= record.bias:
        differ.append(f"{record.num_params} parameters are no {record.num_classes} classes, bias {record.bias}")
    classes = {values.shape[1] for values in (evidence.counts,) if values is not None}
    form = evidence.form
    if form is not None:
        classes.add(form.num_classes)
        pairs = [("num_params", record.num_params, form.num_params), ("bias", record.bias, form.bias)]
        pairs += [] if record.dtype is None else [("dtype", record.dtype, form.dtype)]
        differ += [
            f"{name} is {told!r} in the record, {seen!r} in the model" for name, told, seen in pairs if told != seen
        ]
        if form.layers != ("linear",):
            differ.append(f"the model is no softmax regression: {', '.join(form.layers) or 'no layers'}")
    differ += [f"{number} classes, the record has {record.num_classes}" for number in classes - {record.num_classes}]
    if differ:
        return _told("model_form", False, "; ".join(differ))
    if form is None:
        return _told("model_form", None, "the model behind the votes is the recorded kind; its layers were not seen")
    return _told("model_form", True, f"one linear layer, {form.num_params} parameters, {form.dtype}")


def _start(record: TrainingRecord) -> Assumption:
    known = record.start_norm is not None
    detail = f"the attacked round started from norm {record.start_norm:g}" if known else "record start_norm to know it"
    return _told("start_norm", known, detail)


def _law(
    record: TrainingRecord, evidence: Evidence, after: tuple[RoundWork, ...], statement: Statement
) -> list[Assumption]:
    noises = [record.noise(number) for number in range(record.attack_round, record.num_rounds + 1)]
    clipped = all(work.clip_norm is not None for work in after)
    law, detail = _trainings(evidence)
    found = [
        _told("training_noise", min(noises) > 0, f"smallest sigma from the attacked round on: {min(noises):g}"),
        _told("clipped", clipped, "every round from the attacked one on is clipped"),
        _told("law_of_votes", law, f"{detail}; the theorem speaks of trainings"),
    ]
    if statement == "printed":
        found.append(_local_models(record))
    return found


def _trainings(evidence: Evidence) -> tuple[bool | None, str]:
    """Return whether every vote is of a training of its own: known from the models' hashes, one per vote."""
    if not evidence.independent_trainings or evidence.around_one_model:
        return False, "votes around one trained model"
    if not evidence.trainings:
        return None, "votes of independent trainings, as is said; name their models' hashes"
    votes = 0 if evidence.counts is None or not evidence.counts.size else int(evidence.counts.sum(axis=1).max())
    each = len(set(evidence.trainings)) == len(evidence.trainings) >= max(votes, 2)
    return each, f"votes of {len(set(evidence.trainings))} models for {votes} votes"


def _local_models(record: TrainingRecord) -> Assumption:
    clip_norm = record.rounds[record.attack_round - 1].clip_norm
    if record.start_norm is None or clip_norm is None:
        return _told("local_models", None, "local models of the attacked round stay within rho; nothing recorded")
    gradient = gradient_norm_upper(record.data_norm_bound, record.bias)
    reach = record.start_norm + max(len(w.batch_sizes) * w.learning_rate for w in record.attacking) * gradient
    return _told("local_models", reach <= clip_norm, f"they reach {reach:g} at most, rho is {clip_norm:g}")


def _told(name: str, holds: bool | None, detail: str) -> Assumption:
    status: Status = "stated" if holds is None else "checked" if holds else "violated"
    return Assumption(name, status, detail)
