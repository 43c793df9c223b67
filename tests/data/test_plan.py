"""The plan and the packs, swept over sizes without a process group."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import (
    assign,
    cost,
    num_steps_per_epoch,
    pack_lengths,
    padded_length,
    plan_epoch,
    plan_run,
    total_steps,
)

MAX_TOKENS = 1000


def lengths_of(tokens: list[int]) -> Lengths:
    array = np.array(tokens, dtype=np.int64)
    return Lengths(array, array // 10, array * 2, np.ones_like(array))


def flat(count: int) -> NDArray[np.float64]:
    return np.ones(count)


sizes = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=60)


@given(count=st.integers(1, 300), per_step=st.integers(1, 40), seed=st.integers(0, 9), shuffle=st.booleans())
def test_an_epoch_has_each_example_once_in_steps_of_the_wanted_size(
    count: int, per_step: int, seed: int, shuffle: bool
) -> None:
    steps = plan_epoch(flat(count), per_step, seed=seed, epoch=3, shuffle=shuffle)
    assert sorted(n for step in steps for n in step.examples) == list(range(count))
    assert [len(step.examples) for step in steps[:-1]] == [per_step] * (len(steps) - 1)
    assert len(steps) == num_steps_per_epoch(count, per_step)
    assert [step.number for step in steps] == list(range(3 * len(steps), 4 * len(steps)))


def test_the_same_seed_makes_the_same_plan_and_each_epoch_another() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [int(n) for step in plan_epoch(flat(100), 7, seed=seed, epoch=epoch, shuffle=True) for n in step.examples]

    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in (0, 1)}) == 4


def test_without_shuffling_steps_are_consecutive_examples() -> None:
    steps = plan_epoch(flat(7), 3, seed=5, epoch=1, shuffle=False)
    assert [step.examples.tolist() for step in steps] == [[0, 1, 2], [3, 4, 5], [6]]


@given(count=st.integers(1, 60), per_step=st.integers(1, 20), epochs=st.integers(1, 4), data=st.data())
def test_resuming_is_the_rest_of_the_same_plan(count: int, per_step: int, epochs: int, data: st.DataObject) -> None:
    num_steps = total_steps(count, per_step, epochs, data.draw(st.none() | st.integers(1, 30)))
    first = data.draw(st.integers(0, num_steps))

    def plan(first_step: int) -> list[tuple[int, int, list[int]]]:
        steps = plan_run(flat(count), per_step, seed=4, shuffle=True, num_steps=num_steps, first_step=first_step)
        return [(step.number, step.epoch, step.examples.tolist()) for step in steps]

    assert [number for number, _, _ in plan(0)] == list(range(num_steps))
    assert plan(first) == plan(0)[first:]


@settings(max_examples=200, deadline=None)
@given(tokens=sizes, world=st.integers(1, 16))
def test_packs_hold_each_example_once_under_the_cap_and_ranks_have_equally_many(tokens: list[int], world: int) -> None:
    step = plan_epoch(flat(len(tokens)), len(tokens), seed=0, epoch=0, shuffle=True)[0]
    assignment = assign(step, lengths_of(tokens), world_size=world, max_tokens=MAX_TOKENS)
    packs = [pack for rank in assignment.packs for pack in rank]
    assert sorted(n for pack in packs for n in pack) == list(range(len(tokens)))
    assert all(sum(tokens[n] for n in pack) <= MAX_TOKENS for pack in packs)
    assert {len(rank) for rank in assignment.packs} == {assignment.num_packs_per_rank}
    assert len(assignment.packs) == world
    assert assignment == assign(step, lengths_of(tokens), world_size=world, max_tokens=MAX_TOKENS)


def test_ranks_get_about_the_same_work() -> None:
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(5.5, 0.6, size=256), 20, MAX_TOKENS).astype(int).tolist()
    lengths = lengths_of(tokens)
    step = plan_epoch(flat(256), 256, seed=0, epoch=0, shuffle=True)[0]
    assignment = assign(step, lengths, world_size=8, max_tokens=MAX_TOKENS)
    costs = cost(lengths.tokens, lengths.patches)
    loads = [sum(costs[n] for pack in rank for n in pack) for rank in assignment.packs]
    assert np.mean(loads) / max(loads) > 0.97


def test_a_step_that_fits_one_pack_is_one_pack_in_its_own_order() -> None:
    step = plan_epoch(flat(4), 4, seed=0, epoch=0, shuffle=True)[0]
    assignment = assign(step, lengths_of([100, 300, 200, 50]), world_size=1, max_tokens=MAX_TOKENS)
    assert assignment.packs == ((tuple(int(n) for n in step.examples),),)


def test_ranks_without_an_example_get_fillers() -> None:
    step = plan_epoch(flat(2), 2, seed=0, epoch=0, shuffle=False)[0]
    assignment = assign(step, lengths_of([10, 10]), world_size=4, max_tokens=MAX_TOKENS)
    assert sorted(len(pack) for rank in assignment.packs for pack in rank) == [0, 0, 1, 1]


def test_max_steps_ends_a_run_early_and_never_makes_it_longer() -> None:
    assert total_steps(10, 4, 2, None) == 6
    assert total_steps(10, 4, 2, 5) == 5
    assert total_steps(10, 4, 2, 50) == 6


def test_an_example_longer_than_a_pack_never_gets_here() -> None:
    step = plan_epoch(flat(1), 1, seed=0, epoch=0, shuffle=False)[0]
    with pytest.raises(AssertionError, match="longer than a pack"):
        assign(step, lengths_of([MAX_TOKENS + 1]), world_size=1, max_tokens=MAX_TOKENS)


def mixed_costs(count: int) -> NDArray[np.float64]:
    return np.clip(np.random.default_rng(5).lognormal(6.6, 0.9, count), 100, 8192)


def test_bucketed_steps_hold_like_examples_and_follow_each_other_at_random() -> None:
    costs = mixed_costs(32_000)
    spreads, means = {}, {}
    for bucket_steps in (1, 8):
        steps = plan_epoch(costs, 16, seed=0, epoch=0, shuffle=True, bucket_steps=bucket_steps)
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
    steps = plan_epoch(mixed_costs(count), per_step, seed=1, epoch=epoch, shuffle=True, bucket_steps=bucket_steps)
    assert sorted(n for step in steps for n in step.examples) == list(range(count))
    assert [len(step.examples) for step in steps[:-1]] == [per_step] * (len(steps) - 1)
    assert [step.number for step in steps] == [epoch * len(steps) + n for n in range(len(steps))]


@given(max_tokens=st.integers(1, 9000), count=st.integers(1, 16), data=st.data())
def test_a_pack_is_padded_to_the_shortest_length_that_holds_it(max_tokens: int, count: int, data: st.DataObject) -> None:
    lengths = pack_lengths(max_tokens, count)
    tokens = data.draw(st.integers(0, max_tokens))
    chosen = padded_length(tokens, lengths)
    assert len(lengths) <= count
    assert chosen >= tokens
    assert all(length < tokens for length in lengths if length < chosen)
    assert lengths[-1] == max_tokens
