"""CRFL in a federation: what is released, what clients get, what the training record says of it."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from certify.cli import app as certify_app
from certify.crfl.training_record import TrainingRecord
from client.attack import read_attack
from client.trainer import LocalJob, LocalResult, honest
from hawthorn.engines import in_process
from server.crfl import model_file, network_of, read_training_record, training_record
from server.crfl_work import batch_sizes, data_norm, read_poison, training_of
from server.evaluate import Evaluator
from server.record import read_model, read_run, read_updates
from strategies.context import RoundContext
from strategies.transforms.clip_model import clip_model
from tasks.errors import ConfigError, RecordError
from tasks.params import bind, digest
from tasks.task import load

ATTACK = "pattern_backdoor(target=0, places=((6, 6), (5, 7)), per_batch=5) | scale_update(factor=10.0)"


@pytest.fixture
def crfl(config):
    """5 clients on digits, 6 rounds, client 0 attacks in round 2; the clip binds."""
    return config.replace(
        num_clients=5, num_rounds=6, training="sgd(lr=0.05, batch_size=50)", malicious_clients="0", attack=ATTACK,
        attack_schedule="single_shot(rounds=(2,))", transform="crfl(rho=1.8, slope=0.02, sigma=0.01)", keep_models=1,
    )  # fmt: skip


def run(config):
    in_process.run(config)
    return read_run(config.run_folder)


def model(record, number):
    return read_model(model_file(record.folder, number, len(record.rounds)), load(record.config).layout)


def test_the_clipped_model_is_released_and_clients_get_the_noisy_one(crfl):
    record = run(crfl.replace(keep_updates=True))
    task, got = load(crfl), load(crfl).initial_vector()
    evaluate = Evaluator(task, read_attack(crfl.attack).triggered)
    for number, line in enumerate(record.rounds, start=1):
        released = model(record, number)
        _, updates = read_updates(record.folder, number)
        bound = 1.8 + 0.02 * number
        wanted = clip_model(got + updates.double().mean(0).float(), max_norm=bound)
        assert torch.allclose(released, wanted, atol=1e-6)
        assert float(released.double().norm()) <= bound
        assert line.model_norm == pytest.approx(float(released.double().norm()))
        assert line.model_norm == pytest.approx(bound, rel=1e-6)  # the clip binds in every round
        assert digest(released) == line.sha256
        assert evaluate(released).acc == pytest.approx(line.acc, abs=1e-6)
        draw = RoundContext([0], round=number, seed=crfl.seed).generator("transform 0 crfl")
        got = released + 0.01 * torch.randn(released.shape, generator=draw)
        assert line.broadcast_norm == pytest.approx(float(got.double().norm()))
    assert torch.equal(read_model(record.folder / "model.safetensors", task.layout), model(record, 6))


def test_one_run_serves_every_number_of_rounds(crfl):
    longest = run(crfl.replace(name="six"))
    for number in (3, 4):
        short = run(crfl.replace(name=f"run{number}", num_rounds=number))
        assert torch.equal(model(short, number), model(longest, number))
        assert read_training_record(longest.folder, number) == TrainingRecord.load(short.folder / "crfl.json")
    assert read_training_record(longest.folder) == TrainingRecord.load(longest.folder / "crfl.json")


def test_resuming_and_lengthening_change_nothing(crfl):
    whole = run(crfl.replace(name="whole"))
    short = run(crfl.replace(name="short", num_rounds=3))
    (short.folder / "crfl.json").unlink()
    again = run(crfl.replace(name="short", resume=True))
    assert [r.sha256 for r in again.rounds] == [r.sha256 for r in whole.rounds]
    assert [r.broadcast_norm for r in again.rounds] == [r.broadcast_norm for r in whole.rounds]
    assert (again.folder / "crfl.json").read_bytes() == (whole.folder / "crfl.json").read_bytes()
    (again.folder / "crfl.json").unlink()
    run(crfl.replace(name="short", resume=True))  # no round is left; the record is made again
    assert (again.folder / "crfl.json").read_bytes() == (whole.folder / "crfl.json").read_bytes()


def test_forked_workers_change_nothing(crfl):
    one, two = run(crfl.replace(name="one")), run(crfl.replace(name="two", workers=2))
    assert [r.sha256 for r in one.rounds] == [r.sha256 for r in two.rounds]


def test_the_record_against_a_computation_by_hand(crfl):
    """1,438 digits on 5 clients are 288, 288, 288, 287 and 287; batches of 50 leave 38 or 37."""
    run(crfl)
    record = TrainingRecord.load(crfl.run_folder / "crfl.json")
    lines, task = read_run(crfl.run_folder).rounds, load(crfl)
    assert (record.attack_round, record.attackers, record.num_rounds, record.num_clients) == (2, (0,), 6, 5)
    assert (record.num_classes, record.num_params, record.bias, record.label_flips) == (10, 650, True, True)
    assert [r.clip_norm for r in record.rounds] == pytest.approx([1.82, 1.84, 1.86, 1.88, 1.9, 1.92])
    assert [r.noise for r in record.rounds] == [0.01] * 5 + [0.0]
    assert record.smoothing_sigma == record.noise(6) == 0.01
    attacker, honest_client = record.work[0], record.work[3]
    assert attacker.batch_sizes == (50, 50, 50, 50, 50, 38)
    assert attacker.poisoned == (5, 5, 5, 5, 5, 5)
    assert attacker.poisoned_share == pytest.approx(5 * 5 / 50 + 5 / 38)
    assert honest_client.batch_sizes == (50, 50, 50, 50, 50, 37)
    assert honest_client.poisoned == (0,) * 6
    assert (attacker.scale, honest_client.scale) == (10.0, 1.0)
    assert (attacker.weight, attacker.learning_rate) == (pytest.approx(0.2), 0.05)
    assert attacker.update_norm == pytest.approx(lines[1].norms[0] / 10)
    assert record.start_norm == pytest.approx(lines[0].broadcast_norm)
    inputs, _ = task.dataset.batch("train", slice(None))
    triggered = inputs.clone()
    for row, column in ((6, 6), (5, 7)):
        triggered[:, 0, row, column] = (triggered[:, 0, row, column] + 0.1 / 2**0.5).clamp(max=1)
    longest = max(float(x.flatten(1).double().norm(dim=1).max()) for x in (inputs, triggered))
    assert record.data_norm_bound == pytest.approx(longest)
    assert record.data_norm_bound >= longest
    assert record.model_sha256 == network_of(task, model(read_run(crfl.run_folder), 6)).sha256()
    assert (record.rule, record.momentum, record.weight_decay, record.server_optimizer) == ("mean()", 0, 0, "none")


def test_an_attack_in_the_first_round_starts_from_the_initial_model(crfl):
    run(crfl.replace(num_rounds=1, attack_schedule="single_shot(rounds=(1,))"))
    record = TrainingRecord.load(crfl.run_folder / "crfl.json")
    initial = float(load(crfl).initial_vector().double().norm())
    assert record.start_norm is not None
    assert initial <= record.start_norm == pytest.approx(initial)
    assert (record.attack_round, record.num_rounds, record.noise(1)) == (1, 1, 0.01)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (288, "sgd(batch_size=50)"),
        (250, "sgd(batch_size=50)"),
        (30, "sgd(batch_size=50)"),
        (130, "sgd(batch_size=50, epochs=2)"),
        (130, "sgd(batch_size=50, steps=5)"),
        (130, "sgd(batch_size=50, epochs=3, steps=2)"),
        (288, "sgd(batch_size=50, steps=1)"),
    ],
)
def test_batches_and_poisoned_rows_are_those_of_real_training(crfl, number, text):
    config = crfl.replace(training=text)
    task, poison, seen, flipped = load(config), read_poison(config), [], []

    def note(inputs, labels, generator, job):
        seen.append(len(labels))
        flipped.append(int((labels == 77).sum()))
        return inputs, torch.zeros_like(labels)

    model, vector = task.build_model(), task.initial_vector()
    bind(model, task.layout, vector)
    before = dataclasses.replace(task.dataset, train_labels=torch.ones_like(task.dataset.train_labels))
    job = LocalJob(
        before, torch.arange(number), model, task.layout, vector.clone(), vector, 0, 1, 1, batch_transforms=(note,)
    )
    relabelling = read_attack("pattern_backdoor(target=77, places=((6, 6),), per_batch=5)")
    relabelling(honest(config.component("training")))(job)
    assert tuple(seen) == batch_sizes(number, training_of(config))
    assert flipped == [poison.count(size) for size in seen]


def test_two_attackers_shares_and_a_robust_rule(crfl):
    both = crfl.replace(
        malicious_clients="1,3", attack=ATTACK.replace("per_batch=5", "per_batch=0.1"), rule="geometric_median()",
        attack_schedule="single_shot(rounds=(2,), together=True)",
    )  # fmt: skip
    run(both)
    record = TrainingRecord.load(both.run_folder / "crfl.json")
    assert record.attackers == (1, 3)
    assert record.rule == "geometric_median()"
    assert record.attacking[0].poisoned == (5, 5, 5, 5, 5, 4)
    lines = read_run(both.run_folder).rounds
    assert [work.weight for work in record.work] == lines[1].weights
    assert record.attacking[0].weight < 0.5 * record.work[0].weight


def test_a_skipped_round_changes_neither_model(crfl):
    """With honest replies dropped for their size nothing is usable; the noisy model stays as it was, too."""
    run(crfl.replace(num_rounds=3))
    before = read_run(crfl.run_folder).rounds
    text = (crfl.run_folder / "run.json").read_text().replace('"max-update-norm": 1000000.0', '"max-update-norm": 1e-9')
    (crfl.run_folder / "run.json").write_text(text)
    after = run(crfl.replace(resume=True, num_rounds=4, max_update_norm=1e-9)).rounds
    assert after[3].skipped
    assert (after[3].sha256, after[3].broadcast_norm) == (before[2].sha256, before[2].broadcast_norm)
    record = TrainingRecord.load(crfl.run_folder / "crfl.json")
    assert (record.rounds[3].clip_norm, set(record.rounds[3].weights)) == (None, {0.0})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attack_schedule": "continuous()"}, "one attacked round; attacked were: 1, 2"),
        ({"attack": "sign_flip()"}, r"sign_flip\(\) does other things"),
        ({"attack": f"{ATTACK} | train_with(lr=1.0)"}, "train_with.* does other things"),
        ({"rule": "median()"}, "no weights per client"),
        ({"collusion": "min_max()"}, "min_max"),
    ],
)
def test_runs_that_the_theorems_do_not_speak_of_have_no_record(crfl, changes, says):
    record = run(crfl.replace(num_rounds=2, **changes))
    assert record.status == "finished"
    assert not (record.folder / "crfl.json").exists()
    with pytest.raises(RecordError, match=says):
        read_training_record(record.folder)


def test_a_run_without_attack_has_no_record_and_one_before_it_neither(crfl):
    assert not (run(crfl.replace(num_rounds=1)).folder / "crfl.json").exists()
    clean = run(crfl.replace(num_rounds=2, name="clean", malicious_clients="", attack=""))
    with pytest.raises(RecordError, match="attacked were: none"):
        training_record(clean.config, load(clean.config), clean.rounds)


def test_a_dropped_attacker_leaves_no_record(crfl):
    record = run(crfl.replace(num_rounds=2, max_update_norm=1.0, attack=ATTACK.replace("10.0", "1000.0")))
    assert "0" in record.rounds[1].dropped
    with pytest.raises(RecordError, match="reply of attacker 0 was not used"):
        read_training_record(record.folder)


def test_crfl_comes_last(crfl):
    with pytest.raises(ConfigError, match="crfl must be the last transform"):
        in_process.run(crfl.replace(transform="crfl(rho=1.0) | clip_model(max_norm=0.5)"))


def test_models_that_were_not_kept_are_missed(crfl):
    record = run(crfl.replace(keep_models=2, num_rounds=4))
    assert read_training_record(record.folder, 2).num_rounds == 2
    with pytest.raises(RecordError, match="set keep-models to a divisor of 3"):
        read_training_record(record.folder, 3)
    with pytest.raises(RecordError, match="has 4 rounds, asked for 9"):
        read_training_record(record.folder, 9)


def test_the_norm_of_the_data_is_what_the_model_sees(crfl):
    plain = data_norm(crfl)
    halved = data_norm(crfl.replace(model="logistic_regression(mean=(0.0,), std=(2.0,))"))
    assert halved == pytest.approx(plain / 2)


PATCH = "patch_backdoor(value=0.5, size=(4, 4), grid=(2, 2), gap=0, per_batch=1.0)"
ALL = ATTACK.replace("per_batch=5", "per_batch=1.0")


@pytest.mark.parametrize("chain", [PATCH, f"label_flip() | {PATCH}", f"{ALL} | {PATCH}", f"{PATCH} | {ALL}"])
def test_no_poisoned_sample_is_longer_than_recorded(crfl, chain):
    """An attacker stamps a part of his own, the test the whole trigger; a chain stamps several on one sample."""
    config = crfl.replace(malicious_clients="0-3", attack=chain)
    bound, task, lengths = data_norm(config), load(config), []
    everything, vector = torch.arange(len(task.dataset.train_labels)), task.initial_vector()

    def look(job):
        inputs, labels = job.dataset.batch("train", everything)
        for transform in job.batch_transforms:
            inputs, labels = transform(inputs, labels, torch.Generator(), job)
        lengths.append(float(inputs.flatten(1).double().norm(dim=1).max()))
        return LocalResult(vector, 1, 0.0)

    for rank in range(4):
        model = task.build_model()
        job = LocalJob(
            task.dataset, everything, model, task.layout, vector, vector, rank, 1, 1, rank=rank, num_attackers=4
        )
        read_attack(chain)(look)(job)
    assert max(lengths) <= bound
    assert max(lengths) > float(task.dataset.batch("train", everything)[0].flatten(1).norm(dim=1).max())


@pytest.mark.parametrize("certificate", ["paper", "sound"])
def test_certificates_are_made_of_the_folder(crfl, tmp_path, certificate):
    run(crfl.replace(transform="crfl(rho=3.0, sigma=0.01)", training="sgd(lr=0.02, batch_size=50)"))
    out = tmp_path / "certificates.jsonl"
    words = ["crfl", str(crfl.run_folder), "--out", str(out), "--points", "50", "--num-draws", "200"]
    words += ["--certificate", certificate, *(["--bound", "paper"] if certificate == "paper" else [])]
    words += ["--interval", "hoeffding"] if certificate == "paper" else []
    done = CliRunner().invoke(certify_app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    certificates = [json.loads(line) for line in out.read_text().splitlines()][1:]
    assert len(certificates) == 50
    found = {a["name"]: a["status"] for a in certificates[0]["assumptions"]}
    assert found["released_model"] == "checked"
    assert found["full_participation"] == "checked"
    assert found["labels"] == ("violated" if certificate == "paper" else "checked")
