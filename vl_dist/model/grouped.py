"""Attention sequence by sequence, sequences of about one length in one call: memory grows with the pack, not its square.

Sequences lie one after the other in a row. They are cut and joined by Python integers, which costs one copy in each
direction; no index is computed and no mask made, but a small one for the branches of a document. A causal sequence may end
in a few rows too many, which none of its own rows sees and which are thrown away: with them, captions that differ by a word
go together.

Legend: T rows, H query heads, G key and value heads, D values of a head; B sequences of one call, Q queries and K keys of
each, of which the last Q are their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn import functional

SPARE_ROWS = 16  # most rows that a causal sequence is filled up by


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows that are queries together; their keys are the rows of another segment, if any, and then their own."""

    num_rows: int
    prefix: int | None = None  # the number of the segment that these rows see whole


@dataclass(frozen=True, slots=True)
class Call:
    """Segments that are computed together."""

    num_before: int  # rows of their prefixes
    num_rows: int  # of the longest; the others are filled up to it
    members: tuple[int, ...]  # the segments' numbers


def calls_of(segments: Sequence[Segment], *, causal: bool) -> tuple[Call, ...]:
    """All segments, in as few calls as there are lengths that are more than `SPARE_ROWS` apart."""
    spare = SPARE_ROWS if causal else 0
    open_calls: dict[int, tuple[int, list[int]]] = {}  # by rows of the prefix: rows, and members
    found: list[Call] = []
    for number in sorted(range(len(segments)), key=lambda n: -segments[n].num_rows):
        segment = segments[number]
        num_before = 0 if segment.prefix is None else segments[segment.prefix].num_rows
        num_rows, members = open_calls.get(num_before, (segment.num_rows, []))
        if num_rows - segment.num_rows > spare:
            found.append(Call(num_before, num_rows, tuple(members)))
            num_rows, members = segment.num_rows, []
        open_calls[num_before] = num_rows, [*members, number]
    found += [Call(before, num_rows, tuple(members)) for before, (num_rows, members) in open_calls.items()]
    return tuple(found)


@dataclass(frozen=True)
class GroupedAttention:
    """Scaled dot-product attention within segments (Vaswani et al., 2017), by torch's fused kernels."""

    segments: tuple[Segment, ...]  # in the order of their rows, which are all rows
    causal: bool

    @cached_property
    def _calls(self) -> tuple[Call, ...]:
        return calls_of(self.segments, causal=self.causal)

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """
        Args:
            query: [1, H, T, D]. key, value: [1, G, T, D].
            scaling: of the scores.

        Returns:
            [1, T, H, D].
        """
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
        sizes = [segment.num_rows for segment in self.segments]
        if len(set(sizes)) == 1 and len(self._calls) == 1 and self._calls[0].num_before == 0:
            return self._attend(rows, self._calls[0], scaling)[None]
        queries, keys, values = (torch.split(tensor, sizes) for tensor in rows)
        found: list[torch.Tensor | None] = [None] * len(sizes)
        for call in self._calls:
            joined = [self._join(queries, call), *(self._join(parts, call, with_prefix=True) for parts in (keys, values))]
            cuts = [size for n in call.members for size in (sizes[n], call.num_rows - sizes[n])]
            attended = torch.split(self._attend(joined, call, scaling), cuts)
            for n, one in zip(call.members, attended[::2], strict=True):
                found[n] = one
        return torch.cat([one for one in found if one is not None])[None]

    def _join(self, parts: Sequence[torch.Tensor], call: Call, *, with_prefix: bool = False) -> torch.Tensor:
        """[B·(Q or K), heads, D]: the call's segments one after the other, each filled up."""
        filling = parts[0].new_zeros(SPARE_ROWS, *parts[0].shape[1:])
        joined: list[torch.Tensor] = []
        for n in call.members:
            prefix, missing = self.segments[n].prefix, call.num_rows - self.segments[n].num_rows
            if with_prefix and prefix is not None:
                joined.append(parts[prefix])
            joined.append(parts[n])
            if missing:
                joined.append(filling[:missing])
        return torch.cat(joined)

    def _attend(self, rows: Sequence[torch.Tensor], call: Call, scaling: float) -> torch.Tensor:
        """[B·Q, H, D] from queries [B·Q, H, D], keys and values [B·K, G, D]."""
        query, key, value = (
            tensor.reshape(len(call.members), -1, *tensor.shape[1:]).transpose(1, 2) for tensor in rows
        )  # [B, heads, Q or K, D]
        if call.num_before:
            return _attend_after_prefix(query, key, value, call.num_before, scaling)
        attended = functional.scaled_dot_product_attention(
            query, key, value, is_causal=self.causal, scale=scaling, enable_gqa=query.shape[1] > key.shape[1]
        )
        return attended.transpose(1, 2).flatten(0, 1)


def _attend_after_prefix(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_before: int, scaling: float
) -> torch.Tensor:
    """[B·Q, H, D] from query [B, H, Q, D], key and value [B, G, K, D]; the last query sees the last key.

    torch counts its causal mask from the first key, so that one is made here; and its fused kernels take a mask only where
    both sides have as many heads. Instead of copies of the keys, query heads that read one key head stand as rows of it.
    """
    num_sequences, heads, num_rows, size = query.shape
    groups = key.shape[1]
    shared = heads // groups
    stacked = query.reshape(num_sequences, groups, shared, num_rows, size).transpose(2, 3).flatten(2, 3)
    mask = query.new_ones(num_rows, num_before + num_rows, dtype=torch.bool).tril(num_before)
    attended = functional.scaled_dot_product_attention(
        stacked, key, value, attn_mask=mask.repeat_interleave(shared, dim=0), scale=scaling
    )  # [B, G, Q·shared, D]
    return attended.view(num_sequences, groups, num_rows, shared, size).transpose(1, 2).reshape(-1, heads, size)
