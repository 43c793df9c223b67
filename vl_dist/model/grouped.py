"""Attention sequence by sequence, sequences of one shape in one call: memory grows with the pack, not with its square.

Sequences lie one after the other in a row. They are cut and joined by Python integers, which costs one copy in each
direction; no index is computed and no mask made, but a small one for the branches of a document.

Legend: T rows, H query heads, G key and value heads, D values of a head; B sequences of one shape, Q queries and K keys of
each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows that are queries together; their keys are the rows of another segment, if any, and then their own."""

    num_rows: int
    prefix: int | None = None  # the number of the segment that these rows see whole


@dataclass(frozen=True, slots=True)
class GroupedAttention:
    """Scaled dot-product attention within segments (Vaswani et al., 2017), by torch's fused kernels."""

    segments: tuple[Segment, ...]  # in the order of their rows, which are all rows
    causal: bool

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """
        Args:
            query: [1, H, T, D]. key, value: [1, G, T, D].
            scaling: of the scores.

        Returns:
            [1, T, H, D].
        """
        calls = self._calls()
        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
        if len(calls) == 1 and next(iter(calls))[0] == 0:
            return self._attend(rows, len(self.segments), 0, scaling)[None]
        sizes = [segment.num_rows for segment in self.segments]
        queries, keys, values = (torch.split(tensor, sizes) for tensor in rows)
        found: list[torch.Tensor | None] = [None] * len(sizes)
        for (num_before, num_rows), members in calls.items():
            joined = [
                torch.cat([queries[n] for n in members]),
                *(torch.cat([part for n in members for part in self._keys_of(n, parts)]) for parts in (keys, values)),
            ]
            attended = self._attend(joined, len(members), num_before, scaling)
            for n, one in zip(members, torch.split(attended, num_rows), strict=True):
                found[n] = one
        return torch.cat([one for one in found if one is not None])[None]

    def _calls(self) -> dict[tuple[int, int], list[int]]:
        """The segments of each shape: rows before their own that they see, and their own."""
        calls: dict[tuple[int, int], list[int]] = {}
        for n, segment in enumerate(self.segments):
            num_before = 0 if segment.prefix is None else self.segments[segment.prefix].num_rows
            calls.setdefault((num_before, segment.num_rows), []).append(n)
        return calls

    def _keys_of(self, number: int, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        prefix = self.segments[number].prefix
        return [parts[number]] if prefix is None else [parts[prefix], parts[number]]

    def _attend(self, rows: Sequence[torch.Tensor], num_sequences: int, num_before: int, scaling: float) -> torch.Tensor:
        """[B·Q, H, D] from queries [B·Q, H, D], keys and values [B·K, G, D]."""
        query, key, value = (
            tensor.reshape(num_sequences, -1, *tensor.shape[1:]).transpose(1, 2) for tensor in rows
        )  # [B, heads, Q or K, D]
        shared = query.shape[1] // key.shape[1]
        mask = None
        if num_before:
            # torch counts its causal mask from the first key; here the last query sees the last key.
            num_rows = query.shape[2]
            mask = query.new_ones(num_rows, num_before + num_rows, dtype=torch.bool).tril(num_before)
            key, value = (tensor.repeat_interleave(shared, dim=1) for tensor in (key, value))  # fused kernels want it so
            shared = 1
        attended = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=self.causal and mask is None,
            scale=scaling,
            enable_gqa=shared > 1,
        )
        return attended.transpose(1, 2).flatten(0, 1)
