"""The plan, swept over sizes without a process group."""

import dataclasses
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vl_dist.data.groups import Groups, group_examples, group_numbers
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import Plan, Step, cut, make_plan, num_steps_per_epoch, plan_epoch


def groups_of(costs: NDArray[np.float64], sizes: list[int] | None = None, **changed: Any) -> Groups:
    """Groups of these costs; of one example each, or of these sizes."""
    starts = np.concatenate([[0], np.cumsum(sizes or np.ones(len(costs), dtype=np.int64))]).astype(np.int64)
    plain: dict[str, Any] = {"files": np.zeros(len(costs), dtype=np.int64), "weights": (1.0,)}
    return Groups(members=np.arange(starts[-1]), starts=starts, costs=costs, **(plain | changed))


def flat(count: int) -> Groups:
    return groups_of(np.ones(count))


def plan_of(groups: Groups, per_step: int, **changed: Any) -> Plan:
    return make_plan(groups, per_step, **({"seed": 4, "shuffle": True, "num_epochs": 1} | changed))


def shown(steps: list[Step]) -> list[tuple[int, int, list[int], bool, float]]:
    return [(s.number, s.epoch, s.examples.tolist(), s.ends_epoch, s.epochs_done) for s in steps]


@given(count=st.integers(1, 300), per_step=st.integers(1, 40), seed=st.integers(0, 9), shuffle=st.booleans())
def test_an_epoch_has_each_example_once_in_steps_of_the_wanted_size(
    count: int, per_step: int, seed: int, shuffle: bool
) -> None:
    steps = plan_epoch(flat(count), per_step, seed=seed, epoch=3, shuffle=shuffle, first=50)
    assert sorted(n for step in steps for n in step.examples) == list(range(count))
    assert [len(step.examples) for step in steps[:-1]] == [per_step] * (len(steps) - 1)
    assert len(steps) == num_steps_per_epoch(count, per_step)
    assert [step.number for step in steps] == list(range(50, 50 + len(steps)))
    assert [step.ends_epoch for step in steps] == [False] * (len(steps) - 1) + [True]
    assert steps[-1].epochs_done == 4


def test_the_same_seed_makes_the_same_plan_and_each_epoch_another() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(n) for step in plan_epoch(flat(100), 7, seed=seed, epoch=epoch, shuffle=True) for n in step.examples]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_without_shuffling_steps_are_consecutive_examples() -> None:
    steps = plan_epoch(flat(7), 3, seed=5, epoch=1, shuffle=False)
    assert [step.examples.tolist() for step in steps] == [[0, 1, 2], [3, 4, 5], [6]]


@given(
    count=st.integers(1, 60),
    per_step=st.integers(1, 20),
    epochs=st.integers(1, 4),
    weight=st.sampled_from([0.3, 1.0, 2.0, 2.5]),
    data=st.data(),
)
def test_resuming_is_the_rest_of_the_same_plan(
    count: int, per_step: int, epochs: int, weight: float, data: st.DataObject
) -> None:
    groups = groups_of(np.ones(count), weights=(weight,))
    plan = plan_of(groups, per_step, num_epochs=epochs, max_steps=data.draw(st.none() | st.integers(1, 30)))
    first = data.draw(st.integers(0, plan.num_steps))
    assert [step.number for step in plan.steps()] == list(range(plan.num_steps))
    assert shown(list(plan.steps(first))) == shown(list(plan.steps()))[first:]


def test_max_steps_ends_a_run_early_and_never_makes_it_longer() -> None:
    assert [plan_of(flat(10), 4, num_epochs=2, max_steps=m).num_steps for m in (None, 5, 50)] == [6, 5, 6]


def mixed_costs(count: int) -> NDArray[np.float64]:
    return np.clip(np.random.default_rng(5).lognormal(6.6, 0.9, count), 100, 8192)


def test_bucketed_steps_hold_like_examples_and_follow_each_other_at_random() -> None:
    costs = mixed_costs(32_000)
    spreads, means = {}, {}
    for bucket_steps in (1, 8):
        steps = plan_epoch(groups_of(costs), 16, seed=0, epoch=0, shuffle=True, bucket_steps=bucket_steps)
        spreads[bucket_steps] = np.mean([costs[step.examples].std() for step in steps])
        means[bucket_steps] = np.array([costs[step.examples].mean() for step in steps])
    assert spreads[8] < 0.5 * spreads[1]
    for series in means.values():
        neighbours = np.corrcoef(series[:-1], series[1:])[0, 1]
        assert abs(neighbours) < 0.05  # 2,000 steps: the standard error is 0.022


@given(count=st.integers(1, 200), per_step=st.integers(1, 20), bucket_steps=st.integers(1, 9), epoch=st.integers(0, 3))
def test_bucketing_keeps_each_example_once_and_every_step_full_but_the_last(
    count: int, per_step: int, bucket_steps: int, epoch: int
) -> None:
    groups = groups_of(mixed_costs(count))
    steps = plan_epoch(groups, per_step, seed=1, epoch=epoch, shuffle=True, bucket_steps=bucket_steps)
    assert sorted(n for step in steps for n in step.examples) == list(range(count))
    assert [len(step.examples) for step in steps[:-1]] == [per_step] * (len(steps) - 1)


grouped = st.integers(1, 12).flatmap(
    lambda per_step: st.tuples(st.just(per_step), st.lists(st.integers(1, per_step), min_size=1, max_size=60))
)


@settings(deadline=None)
@given(sized=grouped, shuffle=st.booleans(), bucket_steps=st.integers(1, 4), seed=st.integers(0, 5))
def test_groups_stay_whole_and_steps_are_as_near_to_the_wanted_size_as_they_allow(
    sized: tuple[int, list[int]], shuffle: bool, bucket_steps: int, seed: int
) -> None:
    per_step, sizes = sized
    groups = groups_of(mixed_costs(len(sizes)), sizes)
    steps = plan_epoch(groups, per_step, seed=seed, epoch=0, shuffle=shuffle, bucket_steps=bucket_steps)
    assert sorted(n for step in steps for n in step.examples) == list(range(sum(sizes)))
    assert len(steps) == num_steps_per_epoch(sum(sizes), per_step)
    assert all(len(step.examples) > 0 for step in steps)
    group_of = np.repeat(np.arange(len(sizes)), sizes)
    for step in steps:
        chosen = group_of[step.examples]
        assert len(np.unique(chosen)) == 1 + int((np.diff(chosen) != 0).sum()), "a group's examples are not neighbours"
        assert all(int((chosen == group).sum()) == sizes[group] for group in chosen)


@given(sized=grouped)
def test_cuts_are_at_the_nearest_boundaries_and_leave_no_step_empty(sized: tuple[int, list[int]]) -> None:
    per_step, sizes = sized
    cuts = cut(np.array(sizes), per_step).tolist()
    ends = np.concatenate([[0], np.cumsum(sizes)])
    assert cuts[0] == 0 and cuts[-1] == len(sizes) and (np.diff(cuts) > 0).all()
    for n, place in enumerate(cuts[1:-1], start=1):
        off = abs(int(ends[place]) - n * per_step)
        nearest = min(abs(int(end) - n * per_step) for end in ends)
        # Farther than the nearest only where a step would be empty otherwise.
        assert off == nearest or place in (cuts[n - 1] + 1, cuts[n + 1] - 1)


def test_five_captions_of_an_image_make_steps_of_about_the_wanted_size() -> None:
    steps = plan_epoch(groups_of(np.ones(400), [5] * 400), 32, seed=0, epoch=0, shuffle=True)
    counts = [len(step.examples) for step in steps]
    assert set(counts[:-1]) == {30, 35} and sum(counts) == 2000 and len(counts) == 63


def test_a_whole_weight_repeats_a_file_and_a_fraction_goes_round_it() -> None:
    files = np.array([0] * 10 + [1] * 7)
    plan = plan_of(groups_of(np.ones(17), files=files, weights=(0.3, 2.0)), 4, num_epochs=10)
    times = np.array([plan.times(epoch) for epoch in range(10)])
    assert (times[:, 10:] == 2).all()
    assert (times[:, :10].sum(axis=1) == 3).all() and (times[:, :10].sum(axis=0) == 3).all()
    assert not (times[0, :10] == times[1, :10]).all()
    assert plan.num_steps == 10 * num_steps_per_epoch(17, 4)
    for epoch in range(10):
        found = np.bincount(np.concatenate([step.examples for step in plan.epoch(epoch)]), minlength=17)
        assert (found == times[epoch]).all()


@given(weight=st.floats(0.05, 3.0), count=st.integers(1, 40), epochs=st.integers(1, 12))
def test_over_many_epochs_a_weight_treats_all_groups_of_a_file_alike(weight: float, count: int, epochs: int) -> None:
    plan = plan_of(groups_of(np.ones(count), weights=(weight,)), 5, num_epochs=epochs)
    total = np.sum([plan.times(epoch) for epoch in range(epochs)], axis=0)
    assert total.max() - total.min() <= 1
    assert abs(total.sum() - weight * count * epochs) <= 1
    assert plan.num_steps == sum(len(plan.epoch(epoch)) for epoch in range(epochs))


def test_weights_of_one_change_nothing() -> None:
    files = np.array([0, 1] * 20)
    one, two = (
        plan_of(groups_of(mixed_costs(40), **of), 6, num_epochs=2, bucket_steps=2)
        for of in ({}, {"files": files, "weights": (1.0, 1.0)})
    )
    assert (two.times(0) == 1).all()
    assert shown(list(one.steps())) == shown(list(two.steps()))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=40), st.integers(1, 5))
def test_group_numbers_follow_the_first_examples_and_large_groups_are_halved_evenly(trunks: list[int], most: int) -> None:
    numbers = group_numbers(np.array(trunks), len(trunks), most)
    first = [numbers.tolist().index(n) for n in range(int(numbers.max()) + 1)]
    assert first == sorted(first)
    sizes = np.bincount(numbers)
    assert sizes.max() <= most and sizes.min() >= 1
    for trunk in set(trunks):
        parts = sizes[np.unique(numbers[np.array(trunks) == trunk])]
        assert parts.sum() == trunks.count(trunk) and parts.max() - parts.min() <= 1
        assert len(parts) == -(-trunks.count(trunk) // most)
    assert (group_numbers(None, len(trunks), most) == np.arange(len(trunks))).all()


def test_a_groups_cost_counts_its_trunk_and_images_once_and_one_branch_is_the_plain_example() -> None:
    rows = [(130, 15, 400, 1, 114), (128, 13, 400, 1, 114), (50, 20, 0, 0, 29)]
    alone = group_examples(Lengths.of_rows(rows))
    shared = group_examples(dataclasses.replace(Lengths.of_rows(rows), group=np.array([0, 0, 1])))
    tokens = np.array([130, 128, 50])
    assert np.allclose(alone.costs, tokens + tokens**2 / 20_000 + 0.25 * np.array([400, 400, 0]))
    pairs = 114**2 + 16**2 + 14**2 + 2 * 114 * (16 + 14)
    assert np.allclose(shared.costs, [114 + 16 + 14 + pairs / 20_000 + 100, alone.costs[2]])
    assert shared.sizes.tolist() == [2, 1]
