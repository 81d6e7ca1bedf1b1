"""Schedules against the papers' words."""

from tasks.spec import resolve


def attackers(text, rounds, count=4):
    schedule = resolve("schedule", text)()
    return [sorted(schedule.attackers(t, count)) for t in rounds]


def test_single_shot_as_dba_plots_it():
    assert attackers("single_shot(rounds=(12, 14, 16, 18))", range(11, 20)) == [[], [0], [], [1], [], [2], [], [3], []]
    assert attackers("single_shot(rounds=(2,), together=True)", [1, 2, 3]) == [[], [0, 1, 2, 3], []]


def test_fixed_frequency_takes_turns():
    assert attackers("fixed_frequency(period=10)", [1, 2, 11, 21, 31, 41]) == [[0], [], [1], [2], [3], [0]]
    assert attackers("fixed_frequency(period=2, num_attackers=9)", [1, 2]) == [[0, 1, 2, 3], []]


def test_fixed_pool_is_not_forced():
    assert not resolve("schedule", "fixed_pool()")().forced
    assert attackers("fixed_pool(start=3)", [2, 3]) == [[], [0, 1, 2, 3]]


def test_continuous_spans():
    assert attackers("continuous(start=2, stop=3)", [1, 2, 3, 4], 2) == [[], [0, 1], [0, 1], []]


def test_no_attackers_no_attack():
    for text in ("continuous()", "single_shot(rounds=(1,))", "fixed_frequency()", "fixed_pool()"):
        assert attackers(text, [1], 0) == [[]]
