"""Replay of stored updates: what another rule chooses, checked against numbers worked out by hand here."""

import json
from io import StringIO

import pytest
import torch
from rich.console import Console

from hawthorn.engines import in_process
from hawthorn.replay import replay, replay_table
from server.record import RoundRecord
from server.writer import RunWriter
from strategies.checks import update_norm
from tasks import spec
from tasks.config import RunConfig
from tasks.errors import AggregationError, RecordError, SpecError
from tasks.params import Layout, digest
from tasks.rng import generator

LAYOUT = Layout(("w",), ((6,),), 6)
ATTACKERS = {0, 3}


def updates(round: int, num_clients: int = 9) -> torch.Tensor:
    """Benign updates near (1, ..., 1), and far ones of the two attackers."""
    stack = 1 + 0.1 * torch.randn(num_clients, 6, generator=generator(1, "replay", round))
    stack[sorted(ATTACKERS)] -= 20.0
    return stack


def write(config, *, rounds=3, keep=True, change=lambda record: record, stored=lambda stack: stack, beside=None):
    """Write a run folder as the round loop does; `change` edits a record's fields, `stored` what is kept."""
    config = config.replace(
        keep_updates=keep, num_clients=9, num_rounds=rounds, malicious_clients="0,3", attack="sign_flip()"
    )
    writer, vector = RunWriter.create(config, LAYOUT), torch.zeros(6)
    for number in range(1, rounds + 1):
        stack, clients = updates(number), list(range(9))
        weights, aggregate, skipped = None, torch.zeros(6), None
        rule = config.component("rule")
        try:
            if hasattr(rule.function, "weights"):
                weights = rule.function.weights(stack, **rule.arguments).tolist()
            aggregate = rule(stack)
        except AggregationError as error:
            weights, skipped = None, str(error)
        fields = {
            "round": number,
            "acc": 0.5,
            "asr": None,
            "seconds": 0.1,
            "sampled": clients,
            "malicious": sorted(ATTACKERS),
            "attacking": sorted(ATTACKERS),
            "clients": clients,
            "dropped": {},
            "weights": weights,
            "norms": [update_norm(row) for row in stack],
            "aggregate_norm": update_norm(aggregate),
            "model_norm": 1.0,
            "skipped": skipped,
            "sha256": digest(vector),
        }
        writer.write_round(RoundRecord(**change(fields)), vector, (clients, stored(stack)), {}, beside or {})
    writer.finish(vector)
    writer.close()
    return config.run_folder


def text(table, width: int = 200) -> str:
    console = Console(file=StringIO(), width=width)
    console.print(table)
    return console.file.getvalue()


def test_the_own_rule_replays_to_itself(config):
    for own in ("mean()", "multi_krum(num_byzantine=2)", "median()"):
        result = replay(write(config.replace(rule=own)), own)
        assert len(result.rounds) == 3
        for record in result.rounds:
            assert record.impossible is None
            assert record.cosine == pytest.approx(1.0)
            assert record.distance == 0.0
            assert (record.share, record.norm) == (record.run_share, record.run_norm)


def test_another_rule_gives_the_numbers_of_its_definition(config):
    result = replay(write(config.replace(rule="mean()")), "multi_krum(num_byzantine=2)")
    assert (result.run_rule, result.rule) == ("mean()", "multi_krum(num_byzantine=2)")
    for record in result.rounds:
        stack = updates(record.round).double()
        benign = [c for c in range(9) if c not in ATTACKERS]
        assert record.selected == benign  # the two attackers are far off
        assert (record.run_share, record.share) == (pytest.approx(2 / 9), 0.0)
        used, other, oracle = stack.mean(dim=0), stack[benign].mean(dim=0), stack[benign].mean(dim=0)
        assert record.norm == pytest.approx(float(other.norm()), rel=1e-5)
        assert record.distance == pytest.approx(float((used - other).norm()), rel=1e-5)
        assert record.cosine == pytest.approx(float(used @ other / used.norm() / other.norm()), rel=1e-5)
        assert record.benign_distance == pytest.approx(0.0, abs=1e-5)
        assert record.run_benign_distance == pytest.approx(float((used - oracle).norm()), rel=1e-5)


def test_a_rule_without_weights_has_norms_and_distances_only(config):
    record = replay(write(config), "median()").rounds[0]
    assert record.weights is record.selected is record.share is None
    expected = spec.resolve("rule", "median()")(updates(1)).double()
    assert record.norm == pytest.approx(float(expected.norm()))
    assert record.benign_distance < record.run_benign_distance


def test_a_rule_whose_precondition_is_broken_marks_the_round(config):
    result = replay(write(config), "krum(num_byzantine=4)")
    for record in result.rounds:
        assert "2f + 3" in record.impossible
        assert record.norm is record.cosine is record.distance is record.benign_distance is record.weights is None
    assert "not possible: krum wants n >= 2f + 3 = 11" in text(replay_table(result))


def test_min_replies_holds_for_the_replayed_rule_too(config):
    skip = lambda fields: fields | {"skipped": "9 usable replies", "weights": None, "aggregate_norm": 0.0}  # noqa: E731
    record = replay(write(config.replace(min_replies=10), change=skip), "mean()").rounds[0]
    assert record.impossible == "9 usable replies, min-replies is 10"


def test_a_round_that_the_run_skipped_is_compared_with_an_unchanged_model(config):
    folder = write(config.replace(rule="krum(num_byzantine=4)"))
    record = replay(folder, "median()").rounds[0]
    assert "2f + 3" in record.run_skipped
    assert (record.run_norm, record.run_share, record.cosine) == (0.0, None, None)
    assert record.distance == record.norm > 0


def test_missing_updates_name_the_option(config):
    folder = write(config, keep=False)
    with pytest.raises(RecordError, match="--keep-updates"):
        replay(folder, "median()")


def test_one_missing_round_is_an_error_not_a_shorter_result(config):
    folder = write(config)
    (folder / "updates/round-00002.safetensors").unlink()
    with pytest.raises(RecordError, match="round-00002"):
        replay(folder, "median()")


def test_a_run_without_rounds_is_an_error(config):
    with pytest.raises(RecordError, match="no finished round"):
        replay(write(config, rounds=0), "median()")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda fields: fields | {"aggregate_norm": fields["aggregate_norm"] * 1.001}, "aggregate of norm"),
        (lambda fields: fields | {"norms": [n * 1.001 for n in fields["norms"]]}, "update of client 0"),
        (lambda fields: fields | {"clients": [*range(8), 10]}, "stored for clients"),
    ],
)
def test_updates_that_do_not_belong_to_the_record_are_refused(config, change, message):
    folder = write(config, change=change)
    with pytest.raises(RecordError, match=message):
        replay(folder, "median()")


def test_updates_changed_after_the_run_are_refused(config):
    signs = torch.ones(9, 1)
    signs[5] = -1
    turned = write(config, stored=lambda stack: stack * signs)
    with pytest.raises(RecordError, match="do not belong together"):  # every norm is the same, the aggregate is not
        replay(turned, "median()")


def test_claimed_weights_come_from_the_record(config):
    claims = torch.arange(1.0, 10.0, dtype=torch.float64)
    weights = claims / claims.sum()

    def change(fields):
        used = weights @ updates(fields["round"]).double()
        return fields | {"weights": weights.tolist(), "aggregate_norm": float(used.norm())}

    result = replay(write(config.replace(client_weights="claimed"), change=change, beside={"claims": claims}), "mean()")
    assert "claimed" in result.note
    assert result.rounds[0].run_share == pytest.approx(float(weights[0] + weights[3]))
    assert result.rounds[0].share == pytest.approx(2 / 9)


def test_an_unknown_rule_lists_those_that_exist(config):
    with pytest.raises(SpecError, match="multi_krum"):
        replay(write(config), "no_such_rule()")


def test_json_and_table_say_that_it_is_counterfactual(config):
    result = replay(write(config), "krum(num_byzantine=2)")
    values = json.loads(result.to_json())
    assert values["rule"] == "krum(num_byzantine=2)"
    assert [r["round"] for r in values["rounds"]] == [1, 2, 3]
    assert len(values["rounds"][0]["selected"]) == 1
    assert "not carried on" in values["note"]
    shown = text(replay_table(result))
    assert "Counterfactual" in shown
    assert "1 of 9" in shown
    assert "22.2 → 0.0" in shown


def test_a_real_run_replays(config):
    real = config.replace(keep_updates=True, malicious_clients="1", attack="sign_flip()", num_rounds=2)
    in_process.run(real)
    result = replay(real.run_folder, "krum(num_byzantine=1)")
    assert [record.impossible for record in result.rounds] == [None, None]
    assert all(record.benign_distance > 0 for record in result.rounds)
    assert all(record.run_share == pytest.approx(1 / 6) for record in result.rounds)


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "fltrust()", "root_samples": 40},
        {"rule": "weak_dp(max_norm=1.0, std=0.01)", "client_weights": "claimed"},
        {"rule": "norm_clipping()", "mixing": "clip_norms(max_norm=0.5)", "client_weights": "claimed"},
        {"rule": "foolsgold()", "mixing": ""},
        {"rule": "geometric_median()", "mixing": "nearest_neighbours(num_byzantine=1) | bucketing(bucket_size=2)"},
        {"rule": "median()", "collusion": "min_max()", "malicious_clients": "1,2"},
    ],
    ids=lambda settings: settings["rule"],
)
def test_a_run_with_all_that_a_rule_may_ask_for_is_recomputed_exactly(tmp_path, settings):
    config = RunConfig.read({"num-clients": 7, "num-rounds": 3, "workers": 1, "runs-dir": str(tmp_path)})
    config = config.replace(keep_updates=True, **settings)
    in_process.run(config)
    result = replay(config.run_folder, "median()")
    assert all(each.impossible is None for each in result.rounds)
    assert replay(config.run_folder, config.rule).rounds[-1].cosine == pytest.approx(1) or config.mixing


def test_a_rule_that_trusts_the_server_cannot_be_replayed_on_a_run_without_root_data(tmp_path):
    config = RunConfig.read({"num-clients": 5, "num-rounds": 1, "workers": 1, "runs-dir": str(tmp_path)})
    config = config.replace(keep_updates=True)
    in_process.run(config)
    with pytest.raises(RecordError, match="stored none"):
        replay(config.run_folder, "fltrust()")
