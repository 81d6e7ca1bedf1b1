"""Seeded sampling: the same clients for the same seed, in whatever order they are listed."""

from collections import Counter

from strategies.sampling import forced_clients, sample_clients
from tasks.spec import resolve


def test_the_draw_depends_on_seed_and_round_only():
    a = sample_clients(range(100), 10, seed=1, round=3)
    assert a == sample_clients(list(reversed(range(100))), 10, seed=1, round=3)
    assert len(set(a)) == 10
    assert a != sample_clients(range(100), 10, seed=1, round=4)
    assert a != sample_clients(range(100), 10, seed=2, round=3)


def test_forced_clients_are_in_and_the_rest_is_uniform():
    counts = Counter(c for t in range(4000) for c in sample_clients(range(10), 4, seed=1, round=t, forced=(2, 5)))
    assert counts[2] == counts[5] == 4000
    assert all(800 < counts[c] < 1200 for c in range(10) if c not in (2, 5))  # 1000 expected, sd 27


def test_fewer_available_than_wanted():
    assert sample_clients([3, 1], 5, seed=1, round=1, forced=(9,)) == [1, 3]
    assert sample_clients([], 5, seed=1, round=1) == []
    drawn = {tuple(sample_clients(range(5), 2, seed=1, round=t, forced=(0, 1, 2))) for t in range(40)}
    assert drawn == {(0, 1), (0, 2), (1, 2)}  # more forced than places: each gets its turn


def test_forced_by_schedule():
    assert forced_clients(resolve("schedule", "continuous(start=2)")(), [4, 8], 1) == []
    assert forced_clients(resolve("schedule", "continuous(start=2)")(), [4, 8], 2) == [4, 8]
    assert forced_clients(resolve("schedule", "single_shot(rounds=(5, 7))")(), [4, 8], 7) == [8]
    assert forced_clients(resolve("schedule", "fixed_pool()")(), [4, 8], 2) == []
