"""The gate is the server's: on every engine, in process or through the service, it decides alike."""

import pytest

from certify.service.serve import start
from hawthorn.engines import ENGINES, find_engine
from server.record import read_run


@pytest.mark.slow
def test_one_seed_one_decision_on_every_engine(config, tmp_path):
    config = config.replace(
        num_clients=3, num_rounds=4, gate="paper(warmup_rounds=2, loss_share=9.0)", gate_validation=60,
        gate_certification=30, gate_eps="0.01,0.05", gate_attack_eps=0.05, gate_attack_steps=3, rule="median()",
        malicious_clients="0,2", attack="scale_update(factor=-10)",
        attack_schedule="single_shot(rounds=(3,), together=True)",
    )  # fmt: skip
    records = []
    with start(store=tmp_path / "store", device="cpu") as service:
        for engine in ENGINES:
            where = f"127.0.0.1:{service.port}" if engine == "cluster" else ""
            given = config.replace(name=engine, gate_service=where)
            find_engine(engine).run(given)
            records.append(read_run(given.run_folder))
    assert [r.gate["accepted"] for r in records[0].rounds] == [True, True, False, True]
    assert len({tuple(r.sha256 for r in record.rounds) for record in records}) == 1
    assert len({str([(r.gate["metrics"], r.gate["reasons"]) for r in record.rounds]) for record in records}) == 1
