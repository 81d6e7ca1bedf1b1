"""What clients get under CRFL: in Flower's own loop, after a skipped round, on Flower's engine; and early refusals."""

import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from typer.testing import CliRunner

from certify.cli import app as certify_app
from hawthorn.engines import find_engine, in_process
from server.crfl import read_training_record
from server.record import read_run
from strategies.context import RoundContext
from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from tasks.errors import RecordError
from tasks.params import Layout
from tasks.spec import resolve, resolve_chain
from tasks.wire import from_record, to_record

LAYOUT = Layout(("w",), ((40,),), 40)
ATTACK = "pattern_backdoor(target=0, places=((6, 6), (5, 7)), per_batch=5) | scale_update(factor=10.0)"


@pytest.fixture
def crfl(config):
    """5 clients on digits, 3 rounds, client 0 attacks in round 2."""
    return config.replace(
        num_clients=5, num_rounds=3, training="sgd(lr=0.05, batch_size=50)", malicious_clients="0", attack=ATTACK,
        attack_schedule="single_shot(rounds=(2,))", transform="crfl(rho=1.8, slope=0.02, sigma=0.01)", keep_models=1,
    )  # fmt: skip


class Grid:
    """Three clients that add `step` to what they get, or nothing that is a number in the rounds `broken`."""

    def __init__(self, step: torch.Tensor, broken: tuple[int, ...] = ()):
        self.step, self.broken, self.got = step, broken, list[torch.Tensor]()
        self.waiting: dict[str, Message] = {}
        self.numbers = iter(range(1000))

    def get_node_ids(self):
        return [7, 8, 9]

    def push_messages(self, messages):
        for message in self._numbered(messages):
            self.waiting[message.metadata.message_id] = self._whoami(message)
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        return [self.waiting.pop(number) for number in list(message_ids) if number in self.waiting]

    def send_and_receive(self, messages, *, timeout=None):
        return [self._answer(message) for message in self._numbered(messages)]

    def _numbered(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = str(next(self.numbers))
        return messages

    def _whoami(self, message):
        client = message.metadata.dst_node_id - 7
        content = RecordDict({"whoami": ConfigRecord({"client": client, "role": "benign"})})
        return Message(content, reply_to=message)

    def _answer(self, message):
        if message.metadata.message_type == "query.whoami":
            return self._whoami(message)
        got = torch.empty(LAYOUT.num_params)
        from_record(message.content["arrays"], LAYOUT, got)
        self.got.append(got)
        sent = got + self.step
        if message.content["config"]["server-round"] in self.broken:
            sent = sent * float("nan")
        content = {"arrays": to_record(sent, LAYOUT), "metrics": MetricRecord({"num-examples": 1})}
        return Message(RecordDict(content), reply_to=message)


def strategy(transform):
    return RobustStrategy(
        pipeline=Pipeline(resolve("rule", "mean()")),
        step=ServerStep(resolve("optimizer", "step()"), resolve_chain("transform", transform)),
        layout=LAYOUT, population=Population(3), sample=lambda here, number: list(here), seed=4,
    )  # fmt: skip


def noise(number):
    draw = RoundContext([0], round=number, seed=4).generator("transform 0 crfl")
    return 0.5 * torch.randn(LAYOUT.num_params, generator=draw)


def test_flowers_own_loop_sends_the_noisy_model_and_returns_the_released_one():
    step = torch.linspace(-1, 1, LAYOUT.num_params)
    grid = Grid(step)
    result = strategy("crfl(rho=1000.0, sigma=0.5)").start(grid, to_record(torch.zeros(40), LAYOUT), num_rounds=3)
    after_1, noisy_1 = step, step + noise(1)
    after_2 = noisy_1 + step
    noisy_2 = after_2 + noise(2)
    assert len(grid.got) == 9
    assert all(torch.equal(got, torch.zeros(40)) for got in grid.got[:3])
    assert all(torch.allclose(got, noisy_1, atol=1e-6) for got in grid.got[3:6])
    assert all(torch.allclose(got, noisy_2, atol=1e-6) for got in grid.got[6:])
    final = torch.empty(40)
    from_record(result.arrays, LAYOUT, final)
    assert torch.allclose(final, noisy_2 + step, atol=1e-6)
    assert float((noisy_1 - after_1).norm()) > 1  # the noise is no rounding


def test_a_model_that_was_not_the_last_result_goes_out_as_it_is():
    """A caller who sends a model of its own, as the federation does with the noisy one, has it sent unchanged."""
    robust, grid, own = strategy("crfl(rho=1000.0, sigma=0.5)"), Grid(torch.ones(40)), torch.full((40,), 3.0)
    for number in (1, 2):
        messages = robust.configure_train(number, to_record(own, LAYOUT), ConfigRecord(), grid)
        robust.aggregate_train(number, grid.send_and_receive(messages))
    assert all(torch.equal(got, own) for got in grid.got)


def test_the_last_result_is_not_overwritten_by_the_next_broadcast():
    robust, grid = strategy("crfl(rho=1000.0, sigma=0.5)"), Grid(torch.ones(40), broken=(2,))
    start = torch.zeros(40)
    messages = robust.configure_train(1, to_record(start, LAYOUT), ConfigRecord(), grid)
    robust.aggregate_train(1, grid.send_and_receive(messages))
    released = robust.model
    before = released.clone()
    messages = robust.configure_train(2, to_record(released, LAYOUT), ConfigRecord(), grid)
    assert robust.aggregate_train(2, grid.send_and_receive(messages))[0] is None
    assert torch.equal(released, before)


def test_a_round_skipped_in_a_run_releases_the_model_before_it(crfl):
    """The attacker's update is too long and four replies are too few: round 2 leaves both models as they were."""
    in_process.run(crfl.replace(max_update_norm=1.0, min_replies=5, attack=ATTACK.replace("10.0", "1000.0")))
    first, second, third = read_run(crfl.run_folder).rounds
    assert second.skipped
    assert (second.sha256, second.model_norm) == (first.sha256, first.model_norm)
    assert second.broadcast_norm == first.broadcast_norm
    assert not third.skipped
    with pytest.raises(RecordError, match="the attacked round 2 was skipped"):
        read_training_record(crfl.run_folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attack_schedule": "continuous()"}, "attacked were: 1, 2, 3. A scaled update is no average"),
        ({"attack_schedule": "single_shot(rounds=(1, 3))"}, "attacked were: 1, 3"),
        ({"attack": "sign_flip()"}, "does other things"),
    ],
)
def test_what_has_no_certificate_is_said_before_the_first_round_and_when_it_is_asked_for(crfl, changes, says, caplog):
    config = crfl.replace(**changes)
    with caplog.at_level("WARNING", logger="flwr"):
        in_process.run(config)
    warnings = [record.getMessage() for record in caplog.records if "training record" in record.getMessage()]
    assert "this run will have no training record" in warnings[0]
    assert says in warnings[0]
    asked = ["crfl", str(config.run_folder), "--form", "margin", "--out", str(config.run_folder / "c.jsonl")]
    told = CliRunner().invoke(certify_app, asked)
    assert told.exit_code != 0
    assert says in " ".join(told.output.split())


def test_a_run_that_may_be_certified_says_nothing_and_a_record_ends_a_refusal(crfl, caplog):
    refused = crfl.run_folder / "crfl-refused.txt"
    with caplog.at_level("WARNING", logger="flwr"):
        in_process.run(crfl)
        in_process.run(crfl.replace(name="clean", attack="", malicious_clients=""))
    assert not [record for record in caplog.records if "training record" in record.getMessage()]
    assert not refused.exists()
    refused.write_text("of an earlier try\n")
    in_process.run(crfl.replace(resume=True, num_rounds=4))
    assert not refused.exists()
    assert (crfl.run_folder / "crfl.json").exists()


@pytest.mark.slow
def test_flowers_engine_gives_the_same_models_and_record(crfl):
    folders = []
    for engine in ("in_process", "flower"):
        config = crfl.replace(name=engine)
        find_engine(engine).run(config)
        folders.append(config.run_folder)
    mine, flowers = (read_run(folder) for folder in folders)
    assert flowers.status == "finished"
    assert [r.sha256 for r in mine.rounds] == [r.sha256 for r in flowers.rounds]
    assert [r.broadcast_norm for r in mine.rounds] == [r.broadcast_norm for r in flowers.rounds]
    assert (folders[0] / "crfl.json").read_bytes() == (folders[1] / "crfl.json").read_bytes()
