"""Which sequences are computed together, and that this is attention, whatever their lengths."""

import math
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vl_dist.model.grouped import SPARE_ROWS, GroupedAttention, Segment, calls_of

DOCUMENTS = st.lists(st.tuples(st.integers(1, 60), st.lists(st.integers(1, 40), max_size=4)), min_size=1, max_size=6)


def segments_of(documents: list[tuple[int, list[int]]]) -> tuple[Segment, ...]:
    found: list[Segment] = []
    for trunk, branches in documents:
        number = len(found)
        found += [Segment(trunk), *(Segment(size, prefix=number) for size in branches)]
    return tuple(found)


def reference(segments: tuple[Segment, ...], causal: bool, rows: list[torch.Tensor], scaling: float) -> torch.Tensor:
    """[T, H, D]: softmax by the book, segment by segment."""
    query, key, value = rows
    starts = [0, *accumulate(segment.num_rows for segment in segments)]
    found = []
    for n, segment in enumerate(segments):
        own = list(range(starts[n], starts[n + 1]))
        prefix = segment.prefix
        before = [] if prefix is None else list(range(starts[prefix], starts[prefix + 1]))
        shared = query.shape[1] // key.shape[1]
        keys, values = (t[before + own].repeat_interleave(shared, dim=1) for t in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[own], keys) * scaling
        if causal:
            mask = torch.ones(len(own), len(before) + len(own), dtype=torch.bool).tril(len(before))
            scores = scores.masked_fill(~mask, -math.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(found)


@settings(max_examples=60)
@given(DOCUMENTS, st.booleans())
def test_every_segment_is_in_one_call_and_filled_up_by_few_rows(
    documents: list[tuple[int, list[int]]], causal: bool
) -> None:
    segments = segments_of(documents)
    calls = calls_of(segments, causal=causal)
    assert sorted(n for call in calls for n in call.members) == list(range(len(segments)))
    for call in calls:
        sizes = [segments[n].num_rows for n in call.members]
        assert max(sizes) == call.num_rows
        assert call.num_rows - min(sizes) <= (SPARE_ROWS if causal else 0)
        for n in call.members:
            prefix = segments[n].prefix
            assert call.num_before == (0 if prefix is None else segments[prefix].num_rows)


def test_captions_that_differ_by_a_word_are_one_call_and_prompts_another() -> None:
    documents = [(123, [17, 14, 20, 13, 16]), (123, [15, 18, 13, 13, 19])]
    assert sorted(len(call.members) for call in calls_of(segments_of(documents), causal=True)) == [2, 10]


def test_images_of_other_sizes_are_never_filled_up() -> None:
    segments = (Segment(400), Segment(396), Segment(400))
    assert {call.members for call in calls_of(segments, causal=False)} == {(0, 2), (1,)}


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from([(4, 4), (6, 2), (6, 1)]), st.booleans())
def test_outputs_and_gradients_are_those_of_the_definition(
    documents: list[tuple[int, list[int]]], heads: tuple[int, int], causal: bool
) -> None:
    segments = segments_of(documents if causal else [(trunk, []) for trunk, _ in documents])
    generator = torch.Generator().manual_seed(len(segments))
    num_rows, size = sum(segment.num_rows for segment in segments), 8
    rows = [
        torch.randn(num_rows, count, size, dtype=torch.float64, generator=generator, requires_grad=True)
        for count in (heads[0], heads[1], heads[1])
    ]
    weights = torch.randn(num_rows, heads[0], size, dtype=torch.float64, generator=generator)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in rows)
    attended = GroupedAttention(segments, causal=causal)(query, key, value, 0.3)[0]
    wanted = reference(segments, causal, rows, 0.3)
    torch.testing.assert_close(attended, wanted)
    found = torch.autograd.grad((attended * weights).sum(), rows)
    for one, other in zip(found, torch.autograd.grad((wanted * weights).sum(), rows), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("spoilt", [float("nan"), 1e30])
def test_rows_that_fill_up_reach_no_result(spoilt: float) -> None:
    """A shorter segment is filled up; what its neighbour has must not matter."""
    segments = (Segment(20), Segment(12))
    rows = [torch.randn(1, 2, 32, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]
    attend = GroupedAttention(segments, causal=True)
    before = attend(*rows, 0.3)
    changed = [row.index_fill(2, torch.arange(20), spoilt) for row in rows]
    assert torch.equal(attend(*changed, 0.3)[:, 20:], before[:, 20:])
