"""The gate through the certification service: the same decisions, and none where the service cannot be believed."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from certify.gate import GateState, decide
from certify.service.client import CertifyClient, ServiceError
from certify.service.measure import measure
from certify.service.serve import start
from hawthorn.engines import in_process
from server.crfl import network_of
from server.gate import Gate, gate_settings, held_out
from server.record import read_run
from tasks.errors import ConfigError, HawthornError
from tasks.task import load

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-enough-letters"


@pytest.fixture
def gated(config):
    """In round 4 four of six clients send the opposite of their update, ten times as long."""
    return config.replace(
        num_rounds=6, gate="paper(warmup_rounds=2, loss_share=9.0)", gate_validation=60, gate_certification=30,
        gate_eps="0.01,0.05", gate_attack_eps=0.05, gate_attack_steps=3, gate_workers=1, gate_attempts=1,
        gate_timeout=30.0, malicious_clients="0-3", attack="scale_update(factor=-10)", rule="median()",
        attack_schedule="single_shot(rounds=(4,), together=True)",
    )  # fmt: skip


def run(config, on_round=None):
    in_process.run(config, **({} if on_round is None else {"on_round": on_round}))
    return read_run(config.run_folder)


def decisions(record):
    """What the gate found and decided, without how long it took and where."""
    return [{k: v for k, v in r.gate.items() if k not in ("seconds", "where")} for r in record.rounds]


@pytest.fixture
def here(gated):
    return run(gated.replace(name="here"))


def test_the_service_decides_as_this_process_does(gated, here, tmp_path):
    token = tmp_path / "token"
    token.write_text(TOKEN + "\n")
    with start(store=tmp_path / "store", device="cpu", token=TOKEN) as service:
        where = f"127.0.0.1:{service.port}"
        there = run(gated.replace(gate_service=where, gate_token_file=str(token), workers=2))
        token.write_text("b" + TOKEN)  # another's: nothing is measured
        model = str(here.folder / "model.safetensors")
        other = gated.replace(name="x", gate_service=where, gate_token_file=str(token), from_model=model)
        with pytest.raises(ConfigError, match=r"refuses the model.*UNAUTHENTICATED"):
            run(other)
    assert decisions(there) == decisions(here)
    assert [r.sha256 for r in there.rounds] == [r.sha256 for r in here.rounds]
    assert {r.gate["where"] for r in there.rounds} == {where}
    assert TOKEN not in (there.folder / "run.json").read_text()


def test_a_service_that_is_away_costs_rounds_and_accepts_nothing(gated, tmp_path):
    """Away in rounds 3 and 4: round 4's attack is skipped as round 3 is; then the run goes on where it was."""
    with start(store=tmp_path / "store", device="cpu") as service:
        port = service.port
        there = {"gate_service": f"127.0.0.1:{port}"}
        running = [service]

        def on_round(record):
            if record.round == 2:
                running.pop().close(grace=0.0)
            if record.round == 4:
                running.append(start(store=tmp_path / "store", device="cpu", port=port))

        record = run(gated.replace(**there), on_round)
        running.pop().close(grace=0.0)
    assert [r.gate["accepted"] for r in record.rounds] == [True, True, False, False, True, True]
    for lost in record.rounds[2:4]:
        assert lost.skipped.startswith(f"gate: unreachable: 127.0.0.1:{port}: UNAVAILABLE")
        assert lost.gate["metrics"] is None
        assert lost.sha256 == record.rounds[1].sha256
    assert [r.gate["num_accepted"] for r in record.rounds] == [1, 2, None, None, 3, 4]


def test_a_service_that_comes_back_within_the_round_costs_nothing(gated, here, tmp_path):
    """Its store is gone as well, so that model and sets are sent again."""
    with start(store=tmp_path / "one", device="cpu") as service:
        port, running = service.port, [service]

        def restart():
            running.append(start(store=tmp_path / "two", device="cpu", port=port))

        def on_round(record):
            if record.round == 2:
                running.pop().close(grace=0.0)
                threading.Timer(0.3, restart).start()

        record = run(gated.replace(gate_service=f"127.0.0.1:{port}", gate_attempts=8), on_round)
        running.pop().close(grace=0.0)
    assert decisions(record) == decisions(here)


def test_a_run_with_a_service_is_gone_on_with_without(gated, here, tmp_path):
    """The state is the run's own: what is resumed, elsewhere too, decides as the run that never stopped."""

    def stop(record):
        if record.round == 3:
            raise RuntimeError("stop")

    with start(store=tmp_path / "store", device="cpu") as service, pytest.raises(RuntimeError, match="stop"):
        run(gated.replace(gate_service=f"127.0.0.1:{service.port}"), stop)
    record = run(gated.replace(resume=True))
    assert decisions(record) == decisions(here)
    assert [r.sha256 for r in record.rounds] == [r.sha256 for r in here.rounds]


def answering(monkeypatch, change):
    """Let the service's client give what `change` makes of the true decision."""

    def gate(self, network, validation, certification, settings, *, state, policy, options):
        from certify.gate import policy as policy_of

        found = decide(measure(network, validation, certification, settings), state, policy_of(policy, **options))
        return change(found)

    monkeypatch.setattr(CertifyClient, "gate", gate)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: replace(d, metrics=replace(d.metrics, protocol="0" * 64)), "with other data or settings"),
        (lambda d: replace(d, accepted=not d.accepted), "decided differently on its own metrics"),
        (lambda d: replace(d, metrics=replace(d.metrics, bounds=d.metrics.bounds[:1])), "radii"),
        (lambda d: (_ for _ in ()).throw(ServiceError("DEADLINE_EXCEEDED", "late")), "unreachable: .*DEADLINE"),
        (lambda d: (_ for _ in ()).throw(ServiceError("INTERNAL", "a defect")), "not measured: INTERNAL: a defect"),
        (lambda d: (_ for _ in ()).throw(HawthornError("odd")), "not measured: odd"),
        (lambda d: None, "not measured: AttributeError"),
    ],
)
def test_an_answer_that_cannot_be_believed_refuses(gated, monkeypatch, change, says):
    given = gated.replace(gate_service="127.0.0.1:9", gate="paper()")
    task = load(given)
    gate, good = Gate.of(given, task), task.initial_vector()
    answering(monkeypatch, lambda d: d)
    assert gate(1, good) is None
    state = gate.state
    answering(monkeypatch, change)
    assert re.search(says, gate(2, good))
    assert gate.state == state


def test_a_service_is_asked_for_the_whole_policy(gated, tmp_path):
    with start(store=tmp_path / "store", device="cpu") as service:
        given = gated.replace(
            gate="hardened(max_masking_gap=0.5, loss_floor=0.125)", gate_service=f"127.0.0.1:{service.port}"
        )
        gate, task = Gate.of(given, load(given)), load(given)
        asked = []
        service.servicer.engine.gate, real = lambda r: (asked.append(r), real(r))[1], service.servicer.engine.gate
        assert gate(1, task.initial_vector()) is None
    request = asked[-1]  # the ones before missed model and sets
    options = json.loads(request.policy.options)
    assert (request.policy.name, options["max_masking_gap"], options["loss_floor"]) == ("hardened", 0.5, 0.125)
    assert {**vars(gate.policy)} == {"name": "hardened", **options}
    assert measure(network_of(task, task.initial_vector()), *held_out(task), gate_settings(given)).protocol == (
        gate.state.last_accepted.protocol
    )
    assert gate.state != GateState()


def serving(store: Path, port: int = 0) -> "tuple[subprocess.Popen[str], int]":
    code = f"from certify.service.serve import serve; serve(port={port}, store={str(store)!r}, device='cpu')"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    found = re.search(r"ready on grpc://127\.0\.0\.1:(\d+)", process.stdout.readline())
    assert found is not None
    return process, int(found[1])


@pytest.mark.slow
def test_a_service_killed_while_it_measures(gated, tmp_path, monkeypatch):
    """SIGKILL in the middle of round 3's measurement: the round is skipped; a new service takes up with the next."""
    given = gated.replace(gate_attack_steps=100, num_rounds=5)
    process, port = serving(tmp_path / "store")
    processes, asked, real = [process], [], CertifyClient.gate

    def gate(self, *args, **more):
        asked.append(1)
        return real(self, *args, **more, **({"on_progress": lambda tick: process.kill()} if len(asked) == 3 else {}))

    monkeypatch.setattr(CertifyClient, "gate", gate)

    def on_round(record):
        if record.round == 3:
            assert process.wait(60) == -signal.SIGKILL
            processes.append(serving(tmp_path / "store", port)[0])

    try:
        record = run(given.replace(gate_service=f"127.0.0.1:{port}"), on_round)
    finally:
        for each in processes:
            each.kill()
            each.communicate()
    assert record.rounds[2].skipped.startswith("gate: unreachable")
    assert record.rounds[2].sha256 == record.rounds[1].sha256
    assert [r.gate["accepted"] for r in record.rounds] == [True, True, False, False, True]
    assert "normal accuracy" in record.rounds[3].skipped  # the attack was measured and rejected
    here = run(given.replace(name="here"))
    assert decisions(here)[:2] == decisions(record)[:2]
