"""A client's class distances: warm-up, the choice of pairs, updates, and what survives between rounds."""

import torch

from client.flip.distances import ClassDistances
from client.flip.triggers import Triggers
from tasks.rng import generator

EVERYONE = torch.ones(4, dtype=torch.bool)


def warmed(sizes=(4.0, 8.0, 2.0, 6.0), present=EVERYONE) -> ClassDistances:
    distances = ClassDistances.new(4)
    for target, size in enumerate(sizes):
        assert distances.cold[0] == target
        distances.warm(target, size, present)
    return distances


def trigger(value: float) -> Triggers:
    mask = torch.full((2, 1, 3, 3), value)
    return Triggers(mask, mask.expand(2, 2, 3, 3).clone(), mask.flatten(1).sum(1), torch.tensor([True, False]))


def test_warm_up_sets_the_same_distance_for_every_source_and_scales_priorities():
    present = torch.tensor([True, False, True, True])
    distances = warmed(present=present)
    assert distances.cold == []
    assert distances.sizes[:, 1].tolist() == [8.0, 0.0, 8.0, 8.0]
    assert distances.priority[:, 1].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert distances.priority[0].tolist() == [0.5, 1.0, 0.25, 0.75]


def test_a_warm_up_that_finds_nothing_leaves_only_random_pairs():
    distances = warmed(sizes=(0.0, 0.0, 0.0, 0.0))
    assert torch.isfinite(distances.priority).all()
    assert distances.choose(EVERYONE, 0.0, generator(1)) is None
    assert distances.choose(EVERYONE, 1.0, generator(1)) is not None


def test_the_promising_pair_has_the_largest_priority_and_another_source_than_the_last():
    distances = warmed()
    assert distances.choose(EVERYONE, 0.0, generator(1)) == (0, 1)
    assert distances.choose(EVERYONE, 0.0, generator(1)) == (2, 1)  # source 0 was the last one
    assert distances.choose(torch.tensor([False, True, False, False]), 0.0, generator(1)) == (1, 3)
    assert distances.choose(EVERYONE, 0.0, generator(1), taken=[(0, 1), (1, 2)]) == (3, 1)
    assert distances.choose(torch.zeros(4, dtype=torch.bool), 0.0, generator(1)) is None


def test_the_closest_pair_first_and_none_without_a_distance():
    distances = warmed()
    assert distances.choose(EVERYONE, 0.0, generator(1), closest=True) == (0, 2)
    assert distances.choose(EVERYONE, 0.0, generator(1), closest=True) == (1, 2)  # source 0 was the last one
    distances.update({(3, 0): 0.5}, target_absent=True)
    assert distances.choose(EVERYONE, 0.0, generator(1), closest=True) == (3, 0)
    assert warmed(sizes=(0.0,) * 4).choose(EVERYONE, 0.0, generator(1), closest=True) is None


def test_a_new_warm_up_keeps_the_triggers():
    distances = warmed()
    distances.remember(0, 1, trigger(0.5), 0)
    distances.cool()
    assert distances.cold == [0, 1, 2, 3]
    assert float(distances.sizes.abs().sum()) == 0.0
    assert distances.start(0, 1) is not None


def test_random_pairs_come_as_often_as_asked_and_never_from_absent_classes():
    distances, draw, present = warmed(), generator(3), torch.tensor([True, False, True, False])
    pairs = [distances.choose(present, 1.0, draw) for _ in range(600)]
    counts = {pair: pairs.count(pair) for pair in pairs}
    assert set(counts) == {(s, t) for s in (0, 2) for t in range(4) if s != t}
    assert all(60 < count < 140 for count in counts.values())
    mixed = ClassDistances.new(4)
    mixed.priority.zero_()  # nothing is promising: only random draws give a pair
    share = sum(mixed.choose(EVERYONE, 0.3, draw) is not None for _ in range(1000)) / 1000
    assert 0.25 < share < 0.35


def test_updates_average_relative_changes():
    distances = warmed()
    distances.update({(0, 1): 10.0, (1, 0): 14.0})  # 8 -> 12: change 0.5, priority (1 + 0.5) / 2
    assert distances.sizes[0, 1] == distances.sizes[1, 0] == 12.0
    assert distances.priority[0, 1] == 0.75
    assert distances.priority[1, 0] == (0.5 + (12 - 4) / 4) / 2
    distances.update({(2, 3): 3.0}, target_absent=True)
    assert distances.priority[2, 3] == (0.75 - 0.5) / 2
    assert distances.priority[3, 2] == 0
    assert distances.sizes[3, 2] == 2.0


def test_only_the_direction_that_was_found_is_updated():
    distances, before = warmed(), warmed()
    distances.update({(1, 0): 12.0})
    assert distances.sizes[1, 0] == 12.0
    assert distances.sizes[0, 1] == before.sizes[0, 1]
    assert distances.priority[0, 1] == before.priority[0, 1]
    distances.update({})
    assert distances.sizes[1, 0] == 12.0


def test_what_is_kept_comes_back_and_only_found_triggers_are_kept():
    distances, state = warmed(), {}
    distances.choose(EVERYONE, 0.0, generator(1))
    distances.remember(0, 1, trigger(0.25), 0)
    distances.remember(1, 0, trigger(0.25), 1)
    distances.save(state)
    back = ClassDistances.load({name: value.clone() for name, value in state.items()}, 4, (2, 3, 3))
    assert torch.equal(back.sizes, distances.sizes)
    assert torch.equal(back.priority, distances.priority)
    assert back.previous == 0
    assert list(back.cache) == [(0, 1)]
    start = back.start(0, 1)
    assert start is not None
    mask, pattern = start
    assert mask.dtype == torch.float32
    assert torch.equal(mask, torch.full((1, 3, 3), 0.25))
    assert pattern.shape == (2, 3, 3)
    assert back.start(1, 0) is None


def test_a_state_of_another_task_starts_anew():
    state = {}
    warmed().save(state)
    assert ClassDistances.load(state, 5, (2, 3, 3)).cold == [0, 1, 2, 3, 4]
    assert ClassDistances.load({}, 4, (2, 3, 3)).cold == [0, 1, 2, 3]
