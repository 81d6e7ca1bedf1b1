"""RobustStrategy between Flower messages and one stack: bad replies, weights, skipped rounds, late clients."""

import re

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from strategies.pipeline import Pipeline, ServerStep
from strategies.population import Population
from strategies.robust import RobustStrategy
from strategies.sampling import sample_clients
from tasks.errors import ConfigError
from tasks.params import Layout
from tasks.spec import resolve
from tasks.wire import to_record

LAYOUT = Layout(("w", "b"), ((3, 4), (3,)), 15)
SIZE = LAYOUT.num_params


class FakeGrid:
    """Answers with `answer(client, message)`; None means no reply."""

    def __init__(self, num: int, answer, claims=None):
        self.nodes = {100 + 7 * i: i for i in range(num)}
        self.answer, self.claims, self.late, self.asked = answer, claims or {}, {}, []
        self.mute, self.errors = set(), {}

    def get_node_ids(self):
        return list(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for i, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"{message.metadata.message_type}-{len(self.asked)}-{i}"
            client = self.nodes[message.metadata.dst_node_id]
            self.asked.append((message.metadata.message_type, client))
            if message.metadata.message_type == "query.whoami" and client in self.mute:
                continue
            if message.metadata.message_type == "query.whoami" and self.errors.get(client, 0):
                self.errors[client] -= 1
                replies.append(Message(Error(2, "not yet"), reply_to=message))
            elif message.metadata.message_type == "query.whoami":
                claim = self.claims.get(client, client)
                content = RecordDict({"whoami": ConfigRecord({"client": claim, "role": "benign"})})
                replies.append(Message(content, reply_to=message))
            elif (reply := self.answer(client, message)) is not None:
                replies.append(reply)
        return reversed(replies)

    def push_messages(self, messages):
        for reply in self.send_and_receive(messages):
            self.late[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids):
        return [self.late.pop(i) for i in list(message_ids) if i in self.late]


def answer_with(vector, examples=10):
    def make(message):
        content = {"arrays": to_record(vector, LAYOUT), "metrics": MetricRecord({"num-examples": examples})}
        return Message(RecordDict(content), reply_to=message)

    return make


def strategy(num, rule="mean()", server_lr=1.0, **changes):
    fields = {
        "pipeline": Pipeline(resolve("rule", rule)),
        "step": ServerStep(resolve("optimizer", "step()"), server_lr=server_lr),
        "layout": LAYOUT,
        "population": Population(num),
        "sample": lambda here, t: sample_clients(here, num, seed=1, round=t),
        "round_timeout": 5.0,
    }
    return RobustStrategy(**{**fields, **changes})


def play(robust, grid, model=None, number=1):
    start = torch.zeros(SIZE) if model is None else model
    messages = list(robust.configure_train(number, to_record(start, LAYOUT), ConfigRecord(), grid))
    arrays, metrics = robust.aggregate_train(number, grid.send_and_receive(messages, timeout=5))
    return arrays, metrics


def test_mean_of_updates_times_the_server_step():
    grid = FakeGrid(4, lambda c, m: answer_with(torch.full((SIZE,), float(c)))(m))
    robust = strategy(4, server_lr=0.5)
    arrays, _ = play(robust, grid, torch.ones(SIZE))
    assert torch.allclose(robust.model, torch.full((SIZE,), 1 + 0.5 * (1.5 - 1)))
    assert arrays["b"].numpy() == pytest.approx([1.25] * 3)
    assert robust.outcome.clients == [0, 1, 2, 3]  # by client, though replies came in reverse
    assert robust.outcome.weights == pytest.approx([0.25] * 4)
    assert robust.outcome.norms[3] == pytest.approx(2 * SIZE**0.5)


def bad(message, arrays=None, **records):
    return Message(RecordDict({"arrays": arrays or to_record(torch.ones(SIZE), LAYOUT), **records}), reply_to=message)


BAD = {
    "error": (lambda m: Message(Error(2, "boom\nsecond line"), reply_to=m), "error 2: boom second line"),
    "empty": (lambda m: Message(RecordDict(), reply_to=m), "no arrays"),
    "kind": (lambda m: Message(RecordDict({"arrays": MetricRecord({"a": 1})}), reply_to=m), "no arrays"),
    "nan": (lambda m: bad(m, to_record(torch.full((SIZE,), float("nan")), LAYOUT)), "not finite"),
    "one nan": (lambda m: bad(m, to_record(torch.tensor([*[0.0] * (SIZE - 1), float("nan")]), LAYOUT)), "not finite"),
    "inf": (lambda m: bad(m, to_record(torch.full((SIZE,), float("inf")), LAYOUT)), "not finite"),
    "1e30": (lambda m: bad(m, to_record(torch.full((SIZE,), 1e30), LAYOUT)), "above max-update-norm"),
    "float max": (lambda m: bad(m, to_record(torch.full((SIZE,), 3.4e38), LAYOUT)), "above max-update-norm"),
    "shape": (
        lambda m: bad(m, ArrayRecord({"w": Array(np.zeros((4, 3), "f4")), "b": Array(np.zeros(3, "f4"))})),
        "shape",
    ),
    "dtype": (lambda m: bad(m, ArrayRecord({"w": Array(np.zeros((3, 4))), "b": Array(np.zeros(3))})), "dtype float64"),
    "strings": (
        lambda m: bad(m, ArrayRecord({"w": Array(np.full((3, 4), "a")), "b": Array(np.zeros(3, "f4"))})),
        "dtype",
    ),
    "names": (lambda m: bad(m, ArrayRecord({"x": Array(np.zeros(3, "f4"))})), "names differ"),
    "nothing": (lambda m: bad(m, ArrayRecord({"w": Array(np.zeros((3, 4), "f4"))})), "missing \\['b'\\]"),
    "absent": (lambda m: None, "no reply within 5 s"),
}


@pytest.mark.parametrize("name", BAD)
def test_one_bad_client_is_dropped_with_a_reason_and_the_round_goes_on(name):
    make, says = BAD[name]
    honest = answer_with(torch.full((SIZE,), 2.0))
    robust = strategy(5, "median()")
    arrays, metrics = play(robust, FakeGrid(5, lambda c, m: make(m) if c == 2 else honest(m)))
    assert robust.outcome.clients == [0, 1, 3, 4]
    assert list(robust.outcome.dropped) == [2]
    assert re.search(says, robust.outcome.dropped[2])
    assert torch.equal(robust.model, torch.full((SIZE,), 2.0))
    assert metrics["dropped-replies"] == 1
    assert arrays is not None


def test_extra_metrics_and_lies_about_samples_change_nothing_by_default():
    def liar(client, message):
        content = {
            "arrays": to_record(torch.full((SIZE,), float(client)), LAYOUT),
            "x": MetricRecord({"num-examples": 1e30}),
        }
        if client == 1:
            content["metrics"] = MetricRecord({"num-examples": 10**12, "other": [1.0, 2.0]})
        return Message(RecordDict(content), reply_to=message)

    robust = strategy(3)
    play(robust, FakeGrid(3, liar))
    assert torch.allclose(robust.model, torch.ones(SIZE))


def test_claimed_weights_when_the_setting_trusts_them():
    counts = {0: 10, 1: 30, 2: float("nan"), 3: 10**12, 4: -5, 5: 0}
    grid = FakeGrid(6, lambda c, m: answer_with(torch.full((SIZE,), float(c)), counts[c])(m))
    robust = strategy(6, client_weights="claimed")
    play(robust, grid)
    assert robust.outcome.clients == [0, 1]
    assert robust.outcome.weights == pytest.approx([0.25, 0.75])
    assert all("num-examples" in reason for reason in robust.outcome.dropped.values())
    assert torch.allclose(robust.model, torch.full((SIZE,), 0.75))
    with pytest.raises(ConfigError, match="weighs clients"):
        strategy(3, "median()", client_weights="claimed")


def test_too_few_usable_replies_skip_the_round_and_keep_the_model():
    grid = FakeGrid(3, lambda c, m: Message(Error(2, "no"), reply_to=m) if c else answer_with(torch.ones(SIZE))(m))
    robust = strategy(3, min_replies=2)
    arrays, _ = play(robust, grid, torch.full((SIZE,), 5.0))
    assert arrays is None
    assert "1 usable replies, min-replies is 2" in str(robust.outcome.skipped)
    assert torch.equal(robust.model, torch.full((SIZE,), 5.0))


def test_a_broken_precondition_skips_the_round():
    robust = strategy(4, "krum(num_byzantine=2)")
    arrays, _ = play(robust, FakeGrid(4, lambda c, m: answer_with(torch.ones(SIZE))(m)))
    assert arrays is None
    assert "krum" in str(robust.outcome.skipped)


def test_no_clients_at_all():
    robust = strategy(3)
    arrays, _ = play(robust, FakeGrid(0, lambda c, m: None))
    assert arrays is None


def test_a_client_that_missed_the_deadline_is_not_asked_until_it_answers():
    silent = {2}
    grid = FakeGrid(4, lambda c, m: None if c in silent else answer_with(torch.ones(SIZE))(m))
    robust = strategy(4)
    play(robust, grid, number=1)
    assert robust.outcome.sampled == [0, 1, 2, 3]
    play(robust, grid, number=2)
    assert robust.outcome.sampled == [0, 1, 3]
    assert not robust.outcome.dropped
    play(robust, grid, number=3)
    assert robust.outcome.sampled == [0, 1, 3]  # still silent
    message_id = next(iter(robust.population.owing.values()))
    late = Message(RecordDict(), 1, "train")
    late.metadata.__dict__["_reply_to_message_id"] = message_id
    grid.late[message_id] = late
    silent.clear()
    play(robust, grid, number=4)
    assert robust.outcome.sampled == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_node_that_was_restarted_unnoticed_is_asked_again(lost):
    """It is the same node and never away, but its reply was lost with its process; so may be the question whether it is
    free. Until it answers that one, it is not trained with."""
    forgetful = {2}
    grid = FakeGrid(4, lambda c, m: None if c in forgetful else answer_with(torch.ones(SIZE))(m))
    robust = strategy(4, population=Population(4, restarts=True))
    play(robust, grid)
    assert robust.outcome.dropped == {2: "no reply within 5 s"}
    forgetful.clear()
    grid.mute = {2} if lost else set()
    back = []
    for number in range(2, 40):
        play(robust, grid, number=number)
        back += [number] * (2 in robust.outcome.clients)
        grid.mute = set()
    assert back[0] in ((3,) if not lost else range(10, 30))
    assert back == list(range(back[0], 40))
    asked = [client for kind, client in grid.asked if kind == "query.whoami"]
    assert asked.count(2) == 2 + lost
    assert asked.count(1) == 1


def test_a_node_that_hangs_for_ever_is_asked_ever_less_often():
    grid = FakeGrid(2, lambda c, m: None if c == 1 else answer_with(torch.ones(SIZE))(m))
    robust = strategy(2, population=Population(2, restarts=True))
    play(robust, grid)
    grid.mute = {1}
    for number in range(2, 1000):
        play(robust, grid, number=number)
        assert robust.outcome.clients == [0]
    assert 3 <= [client for kind, client in grid.asked if kind == "query.whoami"].count(1) <= 12


def test_a_client_that_is_late_every_time_costs_ever_fewer_rounds():
    """Each late reply comes right after its deadline: the client may be asked in rounds 1, 3, 6, 11, 20, ... only."""
    late = []

    def answer(client, message):
        if client == 2:
            late.append(message.metadata.message_id)
            return None
        return answer_with(torch.ones(SIZE))(message)

    grid, waits = FakeGrid(4, answer), []
    robust = strategy(4)
    for number in range(1, 61):
        play(robust, grid, number=number)
        waits += [number] * bool(robust.outcome.dropped)
        for message_id in late:
            reply = Message(RecordDict(), 1, "train")
            reply.metadata.__dict__["_reply_to_message_id"] = message_id
            grid.late[message_id] = reply
        late.clear()
    assert waits == [1, 3, 6, 11, 20, 37]


def test_a_mute_node_costs_nothing_and_an_error_is_no_refusal():
    """Node 999 never says who it is; client 1 answers its first question with an error, then right."""
    grid = FakeGrid(3, lambda c, m: answer_with(torch.ones(SIZE))(m))
    grid.nodes[999] = 7
    grid.mute, grid.errors = {7}, {1: 1}
    robust = strategy(3)
    play(robust, grid)
    assert robust.outcome.sampled == [0, 2]
    play(robust, grid, number=2)
    assert robust.outcome.sampled == [0, 1, 2]
    assert [client for kind, client in grid.asked if kind == "query.whoami"].count(7) == 1


def test_a_client_whose_stand_in_left_is_itself_again():
    """Client 1's node loses a heartbeat, another node takes its place and leaves: the first one must count again."""
    grid = FakeGrid(2, lambda c, m: answer_with(torch.ones(SIZE))(m))
    robust = strategy(2)
    play(robust, grid)
    old = robust.population.node_of[1]
    grid.nodes = {n: c for n, c in grid.nodes.items() if n != old} | {300: 1}
    play(robust, grid, number=2)
    assert robust.population.node_of[1] == 300
    grid.nodes = {n: c for n, c in grid.nodes.items() if n != 300} | {old: 1}
    play(robust, grid, number=3)
    assert robust.population.node_of[1] == old
    assert robust.outcome.clients == [0, 1]


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "\x1b[2J", "a\nb", "\x9b31m", "\u202eevil"])
def test_foreign_text_reaches_no_terminal(text):
    robust = strategy(3)
    play(
        robust, FakeGrid(3, lambda c, m: Message(Error(2, text), reply_to=m) if c else answer_with(torch.ones(SIZE))(m))
    )
    assert all(reason.isprintable() for reason in robust.outcome.dropped.values())


def test_a_model_that_would_not_be_finite_is_not_taken():
    huge = torch.full((SIZE,), 3e38)
    robust = strategy(3, max_update_norm=1e60, server_lr=1000.0)
    arrays, _ = play(robust, FakeGrid(3, lambda c, m: answer_with(huge)(m)))
    assert arrays is None
    assert "not finite" in str(robust.outcome.skipped)
    assert robust.outcome.weights is None
    assert torch.equal(robust.model, torch.zeros(SIZE))


def test_running_variances_stay_at_or_above_zero():
    layout = Layout(("w", "bn.running_var"), ((2,), (3,)), 2)
    robust = strategy(1, layout=layout)
    content = RecordDict({"arrays": to_record(torch.tensor([-1.0, 1.0, -20.0, 0.5, -1.0]), layout)})
    grid = FakeGrid(1, lambda c, m: Message(content, reply_to=m))
    messages = list(robust.configure_train(1, to_record(torch.ones(5), layout), ConfigRecord(), grid))
    robust.aggregate_train(1, grid.send_and_receive(messages))
    assert robust.model.tolist() == [-1.0, 1.0, 0.0, 0.5, 0.0]


def test_two_nodes_cannot_claim_one_client():
    grid = FakeGrid(4, lambda c, m: answer_with(torch.full((SIZE,), float(c)))(m), claims={3: 1, 2: 99})
    robust = strategy(4)
    play(robust, grid)
    assert robust.outcome.sampled == [0, 1]
    grid.nodes = {
        200: 1,
        **{n: c for n, c in grid.nodes.items() if c == 0},
    }  # node of client 1 died, it came back as 200
    play(robust, grid, number=2)
    assert robust.outcome.sampled == [0, 1]
    assert robust.population.node_of[1] == 200


def test_a_node_that_came_back_waits_until_its_old_self_is_gone():
    grid = FakeGrid(2, lambda c, m: answer_with(torch.full((SIZE,), float(c)))(m))
    robust = strategy(2)
    play(robust, grid)
    old = robust.population.node_of[1]
    grid.nodes[300] = 1  # restarted, while the old node's heartbeat has not lapsed yet
    play(robust, grid, number=2)
    assert robust.population.node_of[1] == old
    del grid.nodes[old]
    asked = sum(kind == "query.whoami" for kind, _ in grid.asked)
    play(robust, grid, number=3)
    assert robust.outcome.clients == [0, 1]
    assert robust.population.node_of[1] == 300
    assert sum(kind == "query.whoami" for kind, _ in grid.asked) == asked  # its first answer was kept


def test_replies_to_other_messages_are_ignored():
    def forge(client, message):
        reply = answer_with(torch.ones(SIZE))(message)
        if client == 0:
            reply.metadata.__dict__["_reply_to_message_id"] = "made-up"
        return reply

    robust = strategy(3)
    play(robust, FakeGrid(3, forge))
    assert robust.outcome.clients == [1, 2]
    assert 0 in robust.outcome.dropped


def test_flowers_own_start_loop_works_with_it():
    robust = strategy(3)
    result = robust.start(
        FakeGrid(3, lambda c, m: answer_with(torch.ones(SIZE))(m)), to_record(torch.zeros(SIZE), LAYOUT), num_rounds=2
    )
    assert result.arrays["b"].numpy() == pytest.approx([1.0] * 3)
