"""The gate in a federation: what it takes, what it refuses, and that a refused round never happened."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from certify.gate import BoundMetrics, GateMetrics, GateState, decide, policy
from certify.gate_limits import limits
from certify.service.measure import measure
from hawthorn.engines import in_process
from hawthorn.replay import replay
from server.crfl import network_of, training_record
from server.evaluate import Evaluator
from server.gate import Gate, gate_settings, held_out
from server.record import RoundRecord, read_model, read_run
from server.writer import RunWriter
from strategies.context import BROADCAST
from tasks.config import RunConfig
from tasks.errors import ConfigError, RecordError
from tasks.params import digest
from tasks.task import load

ROOT = Path(__file__).parents[2]
SMALL = {
    "gate_validation": 60, "gate_certification": 30, "gate_eps": "0.01,0.05", "gate_attack_eps": 0.05,
    "gate_attack_steps": 3, "gate_workers": 1,
}  # fmt: skip
WRECK = {
    "malicious_clients": "0-3", "attack": "scale_update(factor=-10)", "rule": "median()",
    "attack_schedule": "single_shot(rounds=(4,), together=True)",
}  # fmt: skip


@pytest.fixture
def gated(config) -> RunConfig:
    """6 clients on digits, 6 rounds; in round 4 four of them send the opposite of their update, ten times as long."""
    return config.replace(num_rounds=6, gate="paper(warmup_rounds=9)", **SMALL)


@pytest.fixture
def attacked(gated) -> RunConfig:
    """The gate compares from the third accepted model on, and lets the loss move as it likes."""
    return gated.replace(gate="paper(warmup_rounds=2, loss_share=9.0)", **WRECK)


def run(config):
    in_process.run(config)
    return read_run(config.run_folder)


def metrics(protocol="p", normal=0.9, pgd=0.8, certified=0.7, loss=0.1, margin=-0.5, probes=True) -> GateMetrics:
    bound = BoundMetrics(eps=0.1, certified_accuracy=certified, mean_loss=loss, relative_margin=margin)
    probed = {"margin_pgd_accuracy": pgd, "temperature_pgd_accuracy": pgd} if probes else {}
    return GateMetrics(protocol=protocol, normal_accuracy=normal, pgd_accuracy=pgd, bounds=(bound,), **probed)


def gate_of(config, found) -> Gate:
    """Return a gate that measures what `found`, a value or an error, says."""

    def measured(network, state):
        if isinstance(found, BaseException):
            raise found
        return found

    return Gate(config, load(config), measured, config.component("gate")())


def test_the_held_out_points_are_no_clients_and_no_test_points(gated):
    task = load(gated.replace(root_samples=50))
    kept = torch.cat([task.root, task.validation, task.certification])
    assert [len(t) for t in (task.root, task.validation, task.certification)] == [50, 60, 30]
    assert len(kept.unique()) == 140
    dealt = torch.cat(task.partition)
    assert not torch.isin(dealt, kept).any()
    assert len(dealt) == len(task.dataset.train_labels) - 140
    inputs, labels = held_out(task)[1]
    assert torch.equal(inputs, task.dataset.batch("train", task.certification)[0])
    assert torch.equal(labels, task.dataset.train_labels[task.certification])
    without = load(gated.replace(gate="", root_samples=50))
    assert torch.equal(without.root, task.root)  # a gate leaves the root data of a run as it was
    assert not len(without.validation)


def test_every_decision_is_on_record_with_its_numbers(attacked):
    record = run(attacked.replace(keep_models=1))
    assert [r.gate["accepted"] for r in record.rounds] == [True, True, True, False, True, True]
    task, state = load(attacked), GateState()
    chosen = attacked.component("gate")()
    for line in record.rounds:
        found = line.gate
        bounds = tuple(BoundMetrics(**b) for b in found["metrics"]["bounds"])
        measured = GateMetrics(**{**found["metrics"], "bounds": bounds})
        decision = decide(measured, state, chosen)
        assert found["accepted"] == decision.accepted
        assert found["reasons"] == list(decision.reasons)
        assert found["notes"] == list(decision.notes)
        assert found["limits"] == {name: list(pair) for name, pair in limits(measured, state, chosen).items()}
        assert found["num_accepted"] == decision.state.num_accepted
        assert found["where"] == "in process"
        assert line.seconds_gate == pytest.approx(found["seconds"], abs=1e-3)
        state = decision.state
        if found["accepted"]:
            vector = read_model(record.folder / f"models/round-{line.round:05d}.safetensors", task.layout)
            points = held_out(task)
            assert measure(network_of(task, vector), *points, gate_settings(attacked)) == measured
    assert record.rounds[3].skipped.startswith("gate: normal accuracy")
    assert "more reasons" in record.rounds[3].skipped
    assert "rejected" not in json.dumps(record.initial)


def test_a_refused_round_never_happened(attacked):
    """Without the gate the attack takes the model; with it model, momentum and CRFL's broadcast stay as they were."""
    given = attacked.replace(
        optimizer="momentum(beta=0.5)", transform="crfl(rho=30.0, sigma=0.001)", keep_updates=True, num_rounds=3
    )
    before = run(given)
    kept = RunWriter.resume(given.replace(resume=True), load(given).layout)
    kept[0].close()
    after = run(given.replace(resume=True, num_rounds=4))
    assert after.rounds[3].skipped.startswith("gate: ")
    assert after.rounds[3].sha256 == before.rounds[2].sha256
    assert after.rounds[3].broadcast_norm == before.rounds[2].broadcast_norm
    writer, last, vector, memory = RunWriter.resume(given.replace(resume=True, num_rounds=5), load(given).layout)
    writer.close()
    assert last == 4
    assert torch.equal(vector, kept[2])
    assert {"momentum", BROADCAST, "gate.state"} <= memory.keys() == kept[3].keys()
    changed = [name for name in memory if not torch.equal(memory[name], kept[3][name])]
    assert changed == ["gate.state"]  # round 4 was checked
    states = [json.loads(m["gate.state"].numpy().tobytes()) for m in (kept[3], memory)]
    assert states[0]["state"] == states[1]["state"]
    without = run(given.replace(name="without", gate="", num_rounds=4))
    assert without.rounds[3].skipped is None
    assert without.rounds[3].acc < 0.5 < after.rounds[3].acc


@pytest.mark.parametrize("name", ["normal", "pgd", "certified", "loss", "margin"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("text", ["paper(warmup_rounds=9)", "hardened()"])
def test_a_metric_that_is_no_number_refuses(gated, text, name, value):
    gate = gate_of(gated.replace(gate=text), metrics(**{name: value}))
    assert "not a finite number" in gate(1, load(gated).initial_vector())
    found = json.loads(json.dumps(gate.this_round.to_record(), allow_nan=False))
    assert found["accepted"] is False
    assert str(value) in json.dumps(found["metrics"])
    assert gate.state == GateState()


@pytest.mark.parametrize("error", [RuntimeError("boom"), MemoryError(), ZeroDivisionError("x")])
def test_an_error_while_measuring_refuses(gated, error):
    gate = gate_of(gated, error)
    assert gate(1, load(gated).initial_vector()).startswith("gate: not measured: ")
    assert gate.this_round.to_record()["metrics"] is None
    assert gate.this_round.accepted is False
    assert gate.state == GateState()


def test_what_ends_a_process_is_no_decision(gated):
    with pytest.raises(KeyboardInterrupt):
        gate_of(gated, KeyboardInterrupt())(1, load(gated).initial_vector())


def test_a_model_whose_logits_overflow_is_refused(gated):
    gate = Gate.of(gated, load(gated))
    huge = 3e38 * load(gated).initial_vector().sign()
    assert torch.isfinite(huge).all()
    assert "not a finite number" in gate(1, huge)
    assert gate.state == GateState()


def test_a_measurement_that_takes_too_long_refuses(gated):
    slow = gated.replace(gate_attack_steps=1000, gate_timeout=0.1, gate_validation=600)
    gate = Gate.of(slow, load(slow))
    assert "no metrics within gate-timeout, 0.1 s" in gate(1, load(slow).initial_vector())


def test_a_given_model_is_the_first_that_others_are_held_against(attacked):
    trained = run(attacked.replace(name="trained", attack="", malicious_clients=""))
    start = str(trained.folder / "model.safetensors")
    later = {"from_model": start, "attack_schedule": "single_shot(rounds=(1,), together=True)", "num_rounds": 2}
    record = run(attacked.replace(gate="hardened(loss_share=9.0, anchor_loss_share=9.0, margin_slack=9.0)", **later))
    assert record.initial["gate"]["accepted"] is True
    assert record.rounds[0].gate["accepted"] is False  # the very first round is compared, warm-up or not
    assert record.rounds[0].sha256 == digest(read_model(Path(start), load(attacked).layout))
    assert record.initial["acc"] == trained.rounds[-1].acc
    bad = attacked.replace(name="bad", from_model=start, gate="hardened(max_masking_gap=0.0, accuracy_floor=1.0)")
    gate = gate_of(bad, metrics(pgd=math.nan))
    with pytest.raises(ConfigError, match="refuses the model that the run starts from"):
        gate.begin(load(bad).initial_vector())


def test_models_taken_on_trial_go_with_the_one_that_is_rejected(attacked):
    """Checked are rounds 2, 4 and 6; round 4 is rejected, so round 3 goes as well, with its momentum."""
    given = attacked.replace(
        gate_every=2, gate="paper(warmup_rounds=1, loss_share=9.0)", optimizer="momentum(beta=0.5)"
    )
    whole = run(given)
    assert [r.gate["accepted"] for r in whole.rounds] == [None, True, None, False, None, True]
    assert whole.rounds[3].gate["back_to"] == 2
    assert whole.rounds[3].sha256 == whole.rounds[1].sha256 != whole.rounds[2].sha256
    _, _, _, two = resumed(run(given.replace(name="two", num_rounds=2)).config)
    _, _, _, four = resumed(run(given.replace(name="four", num_rounds=4)).config)
    assert torch.equal(two["momentum"], four["momentum"])
    with pytest.raises(Stop):
        in_process.run(given.replace(name="short"), on_round=stop_after(3))
    again = run(given.replace(name="short", resume=True))
    assert [r.sha256 for r in again.rounds] == [r.sha256 for r in whole.rounds]


def test_a_run_does_not_end_on_trial(gated):
    """Round 3 is the last and gets no usable reply: the unmeasured model of round 2 is not what the run gives."""
    task, given = load(gated), gated.replace(gate_every=3, num_rounds=3)
    gate = gate_of(given, metrics())
    start = task.initial_vector()
    gate.begin(start)
    for number in (1, 2):
        gate.open()
        assert gate(number, start + number) is None
        gate.settle(number, start + number, {"momentum": start}, None)
    gate.open()
    vector, memory = gate.settle(3, start + 2, {"momentum": start}, "0 usable replies")
    assert torch.equal(vector, start)
    assert memory == {}
    assert gate.this_round.to_record()["back_to"] == 0


def test_a_gated_run_has_no_training_record_for_crfl(attacked):
    """Other data may have made the gate decide otherwise; CRFL's theorems know no such choice."""
    once = attacked.replace(
        num_rounds=4, transform="crfl(rho=30.0, sigma=0.001)", rule="mean()", attack="scale_update(factor=2)",
        malicious_clients="0", gate="paper(warmup_rounds=9)",
    )  # fmt: skip
    record = run(once)
    assert not (record.folder / "crfl.json").exists()
    with pytest.raises(RecordError, match=r"gate paper.* chooses by what it measures"):
        training_record(once, load(once), record.rounds)
    assert (run(once.replace(gate="", name="without")).folder / "crfl.json").exists()


@pytest.mark.parametrize("every", [1, 2])
def test_replay_goes_with_the_gate(attacked, every):
    """FoolsGold's history of rounds that were given up is not there in the replay, as it was not in the run."""
    given = attacked.replace(
        rule="foolsgold()", keep_updates=True, gate_every=every, gate="paper(warmup_rounds=1, loss_share=9.0)",
        attack="scale_update(factor=-40)",
    )  # fmt: skip
    record = run(given)
    assert record.rounds[3].gate["accepted"] is False
    result = replay(record.folder, "mean()")  # recomputes the run's own aggregates, and compares their norms
    assert [r.run_skipped for r in result.rounds] == [r.skipped for r in record.rounds]
    assert record.rounds[3].gate["back_to"] == (2 if every == 2 else None)
    assert result.rounds[4].run_norm == pytest.approx(record.rounds[4].aggregate_norm, rel=1e-5)


class Stop(Exception):
    """Ends a run between two rounds."""


def stop_after(number):
    def stop(record):
        if record.round == number:
            raise Stop

    return stop


def resumed(config):
    found = RunWriter.resume(config.replace(resume=True), load(config).layout)
    found[0].close()
    return found


def test_resuming_goes_on_with_the_same_decisions(attacked):
    given = attacked.replace(gate="hardened(loss_share=9.0, anchor_loss_share=9.0, warmup_rounds=2)")
    whole = run(given.replace(name="whole"))
    with pytest.raises(Stop):
        in_process.run(given, on_round=stop_after(3))
    again = run(given.replace(resume=True))
    strip = {"seconds": 0.0}
    assert [r.gate | strip for r in again.rounds] == [r.gate | strip for r in whole.rounds]
    assert [r.sha256 for r in again.rounds] == [r.sha256 for r in whole.rounds]
    assert not again.rounds[3].gate["accepted"]
    with pytest.raises(RecordError, match="cannot resume with gate-eps"):
        in_process.run(given.replace(resume=True, num_rounds=7, gate_eps="0.01"))


@pytest.mark.slow
def test_a_kill_while_measuring_loses_nothing(attacked):
    """SIGKILL comes inside the measurement of round 3; resuming gives the same decisions and the same model."""
    whole = run(attacked.replace(name="whole"))
    code = """
import os, signal, sys, json
from hawthorn.engines import in_process
from server import gate
from tasks.config import RunConfig
count, real = 0, gate.measure
def measure(*args, **more):
    global count
    count += 1
    if count == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **more)
gate.measure = measure
in_process.run(RunConfig.read(json.loads(sys.argv[1])))
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, json.dumps(attacked.settings())], cwd=ROOT, env=os.environ, capture_output=True
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert len(read_run(attacked.run_folder).rounds) == 2
    again = run(attacked.replace(resume=True))
    assert [r.sha256 for r in again.rounds] == [r.sha256 for r in whole.rounds]
    assert [r.gate["metrics"] for r in again.rounds] == [r.gate["metrics"] for r in whole.rounds]


def test_a_checkpoint_without_a_gate_is_not_gone_on_with(gated):
    gate = Gate.of(gated, load(gated))
    with pytest.raises(RecordError, match="holds nothing of the gate"):
        gate.restore({"momentum": torch.zeros(2)})
    assert gate.restore(gate.tensors() | {"momentum": torch.zeros(2)}).keys() == {"momentum"}


def test_records_made_before_there_were_gates_are_read():
    fields = {f.name: None for f in dataclasses.fields(RoundRecord)} | {"round": 1}
    old = {name: value for name, value in fields.items() if not name.endswith("gate")}
    assert RoundRecord.from_json(json.dumps(old)).gate is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"gate": "papr()"}, "unknown gate 'papr'; there are: hardened, paper"),
        ({"gate": "paper(accuracy_share=2.0)"}, "from 0 to 1"),
        ({"gate": "hardened()", "gate_probes": False}, "set gate-probes to true"),
        ({"gate_validation": 1400}, "together are 1430, but digits has 1437"),
        ({"gate_eps": "0.2,0.1"}, "ascending"),
        ({"gate_eps": "1/0"}, "gate-eps must be radii"),
        ({"gate_eps": "a"}, "gate-eps must be radii"),
        ({"gate_tls_cert": "x"}, "go together"),
        ({"gate_service": "127.0.0.1:1", "gate_token_file": "/nothing"}, "cannot read gate-token-file"),
        ({"gate_service": "example.org:1", "gate_tls_ca": "/nothing"}, "cannot read /nothing"),
    ],
)
def test_wrong_settings_say_so_before_the_run(gated, changes, says):
    if "gate_validation" in changes:
        says, changes = "together are", {"gate_validation": len(load(gated).dataset.train_labels)}
    with pytest.raises(ConfigError, match=says):
        in_process.run(gated.replace(**changes))


def test_radii_may_be_fractions(gated):
    assert gated.replace(gate_eps="1/255, 4/255").gate_radii == (1 / 255, 4 / 255)


def test_the_gate_does_not_touch_what_is_evaluated(gated):
    """A gate that accepts all changes the run only by the samples that it keeps from the clients."""
    record = run(gated)
    task = load(gated)
    assert record.rounds[-1].acc == pytest.approx(
        Evaluator(task, None)(read_model(record.folder / "model.safetensors", task.layout)).acc, abs=1e-6
    )
    assert record.facts["test_samples"] == len(task.dataset.test_labels)


def test_neither_threads_nor_layout_change_what_is_measured(gated):
    """On a convolution of a channels-last batch, bit for bit: shares of points are whole batches of the certifier."""
    task = load(gated.replace(model="cfat_mnist(padding=1)", gate_certification=52, gate_validation=260))
    network = network_of(task, task.initial_vector())
    points, settings = held_out(task), gate_settings(gated.replace(gate_eps="0.02", gate_attack_steps=1))
    plain = [(inputs.clone(memory_format=torch.contiguous_format), labels) for inputs, labels in points]
    assert points[0][0].stride() != plain[0][0].stride()
    found = [measure(network, *points, settings, workers=workers) for workers in (1, 3)]
    found.append(measure(network, *plain, settings))
    assert found[0] == found[1] == found[2]


def test_limits_are_what_decides():
    """Every metric at its limit passes; a little outside of it, alone, it does not."""
    for chosen in (policy("paper"), policy("paper", loss_floor=0.05, two_sided=False), policy("hardened")):
        state = GateState()
        for _ in range(3):
            state = decide(metrics(), state, chosen).state
        allowed = limits(metrics(), state, chosen)
        assert {"normal accuracy", "PGD accuracy", "certified accuracy at 0.1", "mean loss at 0.1"} <= allowed.keys()
        fields = {"normal accuracy": "normal", "certified accuracy at 0.1": "certified", "mean loss at 0.1": "loss"}
        fields |= {"relative margin at 0.1": "margin"} if "relative margin at 0.1" in allowed else {}
        for name, field in fields.items():
            for side, limit in zip((-1, 1), allowed[name], strict=True):
                if limit is not None:
                    assert decide(metrics(**{field: limit}), state, chosen).accepted, (chosen.name, name)
                    assert not decide(metrics(**{field: limit + side * 1e-6}), state, chosen).accepted
