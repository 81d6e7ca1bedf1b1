"""FLIP's local training: both variants, what survives between rounds, attackers beside it, resumed runs."""

import dataclasses
import shutil

import pytest
import torch

from client.attack import read_attack
from client.trainer import LocalJob, honest
from hawthorn.engines import ENGINES, find_engine, in_process
from server.record import read_run
from tasks.config import RunConfig
from tasks.errors import SpecError
from tasks.model import build
from tasks.params import Layout, bind, model_vector
from tasks.rng import generator
from tasks.spec import resolve
from tasks.task import load_dataset
from tasks.vocabulary import Vocabulary

QUICK = (
    "epochs=3, batch_size=16, min_images=2, warm_steps=12, first_steps=12, second_steps=4, threshold=0.5, alpha=0.01"
)
TRIGGER = "patch_backdoor(target=2, grid=(1, 1), size=(2, 2), per_batch=4)"


def job(model="logistic_regression()", clients=64, **changes) -> LocalJob:
    dataset = load_dataset("digits()", "")
    network = build(resolve("model", model), dataset.input_shape, 10, generator(1, "model"))
    layout, vector = Layout.of(network), model_vector(network)
    bind(network, layout, vector)
    fields = {
        "dataset": dataset,
        "indices": torch.arange(clients),
        "model": network,
        "layout": layout,
        "start": vector.clone(),
        "vector": vector,
        "client": 0,
        "round": 1,
        "seed": 1,
        "state": {},
    }
    return LocalJob(**{**fields, **changes})


def train(work: LocalJob, text: str):
    return honest(resolve("training", text))(work)


def test_a_client_with_few_batches_finishes_its_warm_up_and_hardens_pairs_when_distances_are_measured_anew():
    state, pairs = {}, []
    for round in (1, 2, 3):
        result = train(
            job(clients=40, round=round, state=state), f"flip(warm_each_round=True, max_size=64.0, {QUICK}, steps=6)"
        )
        pairs.append(result.metrics["flip-pairs"])
    assert pairs == [0, 1, 3]  # six batches each: six classes, then four and a pair, then three pairs


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_both_variants_train_harden_and_keep_their_state(variant):
    work = job()
    before = work.dataset.train_inputs[:64].clone()
    text = f"flip(variant={variant!r}, max_size=64.0, {QUICK})"
    result = train(work, text)
    assert torch.isfinite(result.vector).all()
    assert result.num_examples == 64
    assert not torch.equal(result.vector, work.start)
    assert torch.equal(work.dataset.train_inputs[:64], before)
    assert work.state["flip.sizes"].max() > 0
    again = dataclasses.replace(work, round=2)
    second = train(again, text)  # the warm-up is behind it: every batch has a pair
    assert second.metrics["flip-pairs"] >= 4
    assert second.metrics["flip-triggers"] > 0
    assert 0 < second.metrics["flip-size"] <= 64
    assert len(work.state["flip.pairs"]) > 0
    assert work.state["flip.masks"].dtype == torch.float16


def test_the_same_seed_and_state_give_the_same_model_and_another_order_of_inversion_another():
    texts = [f"flip({QUICK})", f"flip({QUICK})", f"flip(pairs_at_once=1, {QUICK})"]
    vectors = []
    for text in texts:
        work = job()
        train(work, text)
        vectors.append(train(dataclasses.replace(work, round=2), text).vector.clone())
    assert torch.equal(vectors[0], vectors[1])
    assert not torch.equal(vectors[0], vectors[2])


def test_a_client_that_finds_nothing_trains_as_without_triggers():
    work = job()
    result = train(work, f"flip(max_size=0.0, {QUICK})")
    assert result.loss > 0
    assert not torch.equal(result.vector, work.start)
    blind = job()
    blind.vector.fill_(torch.nan)
    result = train(blind, f"flip({QUICK})")
    assert result.metrics["flip-triggers"] == 0
    assert train(job(clients=0), f"flip({QUICK})").num_examples == 0


@pytest.mark.parametrize("inversion", ["neuron_stimulation", "random_white", "random_colour", "oracle"])
def test_the_other_ways_to_get_triggers(inversion):
    settings = RunConfig.read({"attack": TRIGGER, "malicious-clients": "0", "name": "made"})
    work = job(settings=settings)
    result = train(work, f"flip(inversion={inversion!r}, max_size=64.0, {QUICK})")
    assert torch.isfinite(result.vector).all()
    assert result.metrics["flip-triggers"] > 0
    if inversion == "oracle":
        assert result.metrics["flip-size"] == 4.0
        with pytest.raises(SpecError, match="attack with a trigger"):
            train(job(), f"flip(inversion='oracle', {QUICK})")


def test_out_of_range_settings_are_refused():
    for text in (
        "flip(portion=1.5)",
        "flip(epochs=-1)",
        "flip(pairs_at_once=0)",
        "flip(max_size=-1.0)",
        "flip(lr=-0.1)",
    ):
        with pytest.raises(SpecError, match="flip wants"):
            train(job(), text)
    with pytest.raises(SpecError, match="'random_white' has no precision 'bfloat16'"):
        train(job(), "flip(inversion='random_white', precision='bfloat16')")


@pytest.mark.parametrize("inversion", ["neural_cleanse", "random_white"])
def test_a_task_of_text_is_refused(inversion):
    work = job()
    tokens = dataclasses.replace(work.dataset, vocabulary=Vocabulary(("a",)), scale=1.0)
    with pytest.raises(SpecError, match="images or feature vectors"):
        train(dataclasses.replace(work, dataset=tokens), f"flip(inversion={inversion!r}, {QUICK})")


def test_attackers_may_train_their_own_way():
    text = "train_with(training='sgd(batch_size=16)', lr=0.05, epochs=2)"
    plain, own = job(), job()
    train(plain, "sgd(batch_size=16, lr=0.05, epochs=2)")
    read_attack(text)(honest(resolve("training", f"flip({QUICK})")))(own)
    assert torch.equal(plain.vector, own.vector)
    assert not own.state
    with pytest.raises(SpecError, match="the attack trains with decay_at, which flip does not have; give it"):
        read_attack("train_with(decay_at=(0.5,))")(honest(resolve("training", f"flip({QUICK})")))(job())


@pytest.mark.parametrize("labels", ["true", "target"])
def test_the_adaptive_attack_stamps_inverted_triggers_beside_the_poison(labels):
    work, seen = job(batch_transforms=()), []

    def watch(inputs, targets, draw, _):
        seen.append((inputs.clone(), targets.clone()))
        return inputs, targets

    attack = read_attack(f"adaptive_inversion(steps=20, threshold=0.4, per_batch=4, labels={labels!r}) | {TRIGGER}")
    plain = []

    def keep(inputs, targets, draw, _):
        plain.append((inputs.clone(), targets.clone()))
        return inputs, targets

    work = dataclasses.replace(work, batch_transforms=(watch,))
    attack(honest(resolve("training", "sgd(batch_size=16)")))(work)
    train(job(batch_transforms=(keep,)), "sgd(batch_size=16)")
    for (inputs, targets), (clean, true) in zip(seen, plain, strict=True):
        changed = (inputs != clean).flatten(1).any(1)
        assert changed[-4:].all()
        assert not changed[4:-4].any()
        assert (targets[:4] == 2).all()
        assert torch.equal(targets[4:-4], true[4:-4])
        assert (labels == "target") != torch.equal(targets[-4:], true[-4:])


@pytest.mark.slow
def test_clients_keep_their_state_on_every_engine(config):
    config = config.replace(
        training=f"flip({QUICK})", num_clients=4, clients_per_round=2, num_rounds=3, attack="", malicious_clients=""
    )
    hashes, memoryless = set(), config.replace(name="forgetful")
    for engine in ENGINES:
        find_engine(engine).run(config.replace(name=engine))
        hashes.add(read_run(config.replace(name=engine).run_folder).facts["sha256"])
    assert len(hashes) == 1
    for round in range(1, 4):  # every round in a new process: clients that forget end elsewhere
        in_process.run(memoryless.replace(num_rounds=round, resume=round > 1))
        shutil.rmtree(memoryless.run_folder / "clients")
    assert read_run(memoryless.run_folder).facts["sha256"] not in hashes


def test_runs_resume_with_their_clients_states_on_any_number_of_workers(config):
    config = config.replace(
        training=f"flip({QUICK})", clients_per_round=3, num_rounds=4, attack="", malicious_clients=""
    )
    whole = config.replace(name="whole", workers=1)
    in_process.run(whole)
    wanted = read_run(whole.run_folder).facts["sha256"]
    part = config.replace(name="part", workers=2)

    def stop(record):
        if record.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_process.run(part, stop)
    kept = sorted(path.name for path in (part.run_folder / "clients").iterdir())
    assert any("round-00002" in name for name in kept)
    late = part.run_folder / "clients" / kept[0].replace("round-00001", "round-00003")
    late.write_bytes(b"of a round that was never finished")
    in_process.run(part.replace(resume=True))
    assert read_run(part.run_folder).facts["sha256"] == wanted
    stateless = config.replace(name="plain", training="sgd()")
    in_process.run(stateless)
    assert not (stateless.run_folder / "clients").exists()
