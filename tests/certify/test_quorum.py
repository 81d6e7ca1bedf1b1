"""Quorum arithmetic against the paper's numbers, brute force and sampling by hand."""

import itertools
import json
import math
from fractions import Fraction

import pytest
from scipy.stats import hypergeom
from typer.testing import CliRunner

from certify.quorum import Quorum, median_tolerates
from hawthorn.cli import app
from tasks.errors import ConfigError

PAPER = Quorum(num_clients=500, malicious=175, per_round=5, tolerated=2)


def test_the_papers_federation():
    """500 clients, 175 malicious, 5 a round, a median that withstands 2."""
    assert median_tolerates(5) == 2
    assert float(PAPER.dominated) == pytest.approx(0.234231, abs=5e-7)
    assert float(PAPER.dominated) == pytest.approx(hypergeom.sf(2, 500, 175, 5), rel=1e-12)
    assert PAPER.dominated_within(1) == pytest.approx(float(PAPER.dominated), rel=1e-15)
    assert PAPER.dominated_within(10) == pytest.approx(1 - (1 - 0.234231) ** 10, abs=1e-5)
    assert PAPER.expected(100) == pytest.approx(23.4231, abs=5e-5)
    assert PAPER.rounds_until == pytest.approx(1 / 0.234231, abs=1e-4)
    assert sum(PAPER.drawn(number) for number in range(6)) == 1


@pytest.mark.parametrize(
    ("clients", "bad", "sampled"), [(6, 2, 3), (7, 3, 4), (8, 4, 4), (5, 5, 2), (6, 0, 3), (4, 1, 4)]
)
def test_brute_force(clients, bad, sampled):
    draws = list(itertools.combinations(range(clients), sampled))
    for tolerated in range(sampled + 1):
        found = Quorum(num_clients=clients, malicious=bad, per_round=sampled, tolerated=tolerated)
        dominated = sum(sum(client < bad for client in draw) > tolerated for draw in draws)
        assert found.dominated == Fraction(dominated, len(draws))


def test_an_even_round_is_dominated_by_half():
    """The mean of the two middle values of 4 is partly the attackers' where they are 2."""
    assert [median_tolerates(number) for number in (1, 2, 3, 4, 5, 6)] == [0, 0, 1, 1, 2, 2]


def test_chances_near_0_and_1_keep_their_digits():
    rare = Quorum(num_clients=10_000, malicious=11, per_round=21, tolerated=10)
    assert 0 < rare.dominated < Fraction(1, 10**20)
    assert rare.dominated_within(1000) == pytest.approx(1000 * float(rare.dominated), rel=1e-9)
    sure = Quorum(num_clients=5, malicious=5, per_round=3, tolerated=1)
    assert (sure.dominated_within(0), sure.dominated_within(3), sure.rounds_until) == (0.0, 1.0, 1.0)
    never = Quorum(num_clients=5, malicious=1, per_round=3, tolerated=1)
    assert (never.dominated_within(9), never.rounds_until) == (0.0, math.inf)
    likely = Quorum(num_clients=1000, malicious=900, per_round=31, tolerated=15)
    assert likely.dominated_within(1) == pytest.approx(float(likely.dominated), rel=1e-12)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((5, 2, 6, 0), "samples from 1 to 5"),
        ((5, 2, 0, 0), "samples from 1 to 5"),
        ((5, 6, 2, 0), "malicious must be from 0 to 5"),
        ((5, 2, 2, 3), "tolerated must be from 0 to 2"),
    ],
)
def test_impossible_federations_say_why(values, says):
    with pytest.raises(ConfigError, match=says):
        Quorum(**dict(zip(("num_clients", "malicious", "per_round", "tolerated"), values, strict=True)))


def test_the_command():
    words = ["quorum", "--num-clients", "500", "--malicious", "175", "--per-round", "5", "--rounds", "100"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0, shown.output
    assert "0.234231" in shown.output
    assert "23.42 of 100" in shown.output
    found = json.loads(CliRunner().invoke(app, [*words, "--tolerated", "3", "--json"]).output)
    assert found["tolerated"] == 3
    assert found["dominated_round"] == pytest.approx(hypergeom.sf(3, 500, 175, 5))
