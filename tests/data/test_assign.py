"""Packs, swept over sizes and numbers of ranks without a process group."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_dist.data.assign import Assignment, assign, pack_lengths, padded_length
from vl_dist.data.groups import cost
from vl_dist.data.lengths import Lengths
from vl_dist.data.plan import Step

MAX_TOKENS = 1000


def lengths_of(tokens: list[int]) -> Lengths:
    return Lengths.of_rows([(n, max(1, n // 10), n * 2, 1, n // 2) for n in tokens])


def step_of(count: int, *, shuffled: bool = True) -> Step:
    order = np.random.default_rng(0).permutation(count) if shuffled else np.arange(count)
    return Step(0, 0, order, ends_epoch=True)


sizes = st.lists(st.integers(1, MAX_TOKENS), min_size=1, max_size=60)


def examples_of(assignment: Assignment) -> list[int]:
    return sorted(n for rank in assignment.packs for pack in rank for n in pack.examples)


@settings(max_examples=200, deadline=None)
@given(tokens=sizes, world=st.integers(1, 16))
def test_packs_hold_each_example_once_under_the_cap_and_ranks_have_equally_many(tokens: list[int], world: int) -> None:
    step, lengths = step_of(len(tokens)), lengths_of(tokens)
    assignment = assign(step, lengths, world_size=world, max_tokens=MAX_TOKENS)
    assert examples_of(assignment) == list(range(len(tokens)))
    for rank in assignment.packs:
        for pack in rank:
            assert pack.num_tokens == sum(tokens[n] for n in pack.examples) <= MAX_TOKENS
            assert all(len(document) == 1 for document in pack.documents)
    assert {len(rank) for rank in assignment.packs} == {assignment.num_packs_per_rank}
    assert len(assignment.packs) == world
    assert assignment == assign(step, lengths, world_size=world, max_tokens=MAX_TOKENS)


@settings(max_examples=200, deadline=None)
@given(
    groups=st.lists(
        st.tuples(st.integers(0, 600), st.lists(st.integers(2, 400), min_size=1, max_size=8)), min_size=1, max_size=12
    ),
    world=st.integers(1, 8),
)
def test_a_group_is_one_document_or_as_few_as_a_pack_allows_each_with_the_trunk(
    groups: list[tuple[int, list[int]]], world: int
) -> None:
    rows = [(trunk + branch, 1, 8, 1, trunk) for trunk, branches in groups for branch in branches]
    number = [n for n, (_, branches) in enumerate(groups) for _ in branches]
    lengths = dataclasses.replace(Lengths.of_rows(rows), group=np.array(number))
    step = step_of(len(rows), shuffled=False)
    assignment = assign(step, lengths, world_size=world, max_tokens=MAX_TOKENS)
    assert examples_of(assignment) == list(range(len(rows)))
    documents = [document for rank in assignment.packs for pack in rank for document in pack.documents]
    for document in documents:
        assert len({number[n] for n in document}) == 1
        assert list(document) == list(range(document[0], document[-1] + 1))
    for n, (trunk, branches) in enumerate(groups):
        own = [document for document in documents if number[document[0]] == n]
        assert (len(own) == 1) == (trunk + sum(branches) <= MAX_TOKENS)
    for rank in assignment.packs:
        for pack in rank:
            tokens = sum(
                groups[number[document[0]]][0] + sum(rows[n][0] - rows[n][4] for n in document)
                for document in pack.documents
            )
            assert pack.num_tokens == tokens <= MAX_TOKENS


def test_an_example_that_follows_itself_is_two_documents() -> None:
    step = Step(0, 0, np.array([0, 0, 1]), ends_epoch=True)
    assignment = assign(step, lengths_of([100, 200]), world_size=1, max_tokens=MAX_TOKENS)
    assert assignment.packs[0][0].documents == ((0,), (0,), (1,))


def test_ranks_get_about_the_same_work() -> None:
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(5.5, 0.6, size=256), 20, MAX_TOKENS).astype(int).tolist()
    lengths = lengths_of(tokens)
    assignment = assign(step_of(256), lengths, world_size=8, max_tokens=MAX_TOKENS)
    costs = cost(lengths.tokens, lengths.patches)
    loads = [sum(costs[n] for pack in rank for n in pack.examples) for rank in assignment.packs]
    assert np.mean(loads) / max(loads) > 0.97


def test_a_step_that_fits_one_pack_is_one_pack_in_its_own_order() -> None:
    step = step_of(4)
    assignment = assign(step, lengths_of([100, 300, 200, 50]), world_size=1, max_tokens=MAX_TOKENS)
    assert assignment.packs[0][0].examples == tuple(step.examples.tolist())
    assert assignment.num_packs_per_rank == 1


def test_ranks_without_an_example_get_fillers() -> None:
    assignment = assign(step_of(2), lengths_of([10, 10]), world_size=4, max_tokens=MAX_TOKENS)
    assert sorted((len(pack.examples), pack.num_tokens) for rank in assignment.packs for pack in rank) == [
        (0, 0), (0, 0), (1, 10), (1, 10),
    ]  # fmt: skip


def test_one_giant_example_has_a_rank_of_its_own() -> None:
    assignment = assign(step_of(9, shuffled=False), lengths_of([1000, *[20] * 8]), world_size=2, max_tokens=MAX_TOKENS)
    by_rank = sorted(sorted(n for pack in rank for n in pack.examples) for rank in assignment.packs)
    assert by_rank == [[0], list(range(1, 9))]


def test_an_example_longer_than_a_pack_never_gets_here() -> None:
    with pytest.raises(AssertionError, match="longer than a pack"):
        assign(step_of(1), lengths_of([MAX_TOKENS + 1]), world_size=1, max_tokens=MAX_TOKENS)


@given(max_tokens=st.integers(1, 9000), count=st.integers(1, 16), data=st.data())
def test_a_pack_is_padded_to_the_shortest_length_that_holds_it(max_tokens: int, count: int, data: st.DataObject) -> None:
    lengths = pack_lengths(max_tokens, count)
    tokens = data.draw(st.integers(0, max_tokens))
    chosen = padded_length(tokens, lengths)
    assert len(lengths) <= count
    assert chosen >= tokens
    assert all(length < tokens for length in lengths if length < chosen)
    assert lengths[-1] == max_tokens
