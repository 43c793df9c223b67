"""FlexAttention with a mask by document and branch (Dong et al., 2024): blocks that nobody sees are skipped, on CUDA.

Legend: T tokens of a pack, H query heads, G key and value heads, D values of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def visible(document_ids: torch.Tensor, branch_ids: torch.Tensor) -> Rule:
    """`vl_dist.model.attention.sees`, row by row, in the form that FlexAttention compiles.

    Args:
        document_ids, branch_ids: [T] int64.
    """

    def rule(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        reachable = (branch_ids[column] == 0) | (branch_ids[column] == branch_ids[row])
        return (column <= row) & (document_ids[row] == document_ids[column]) & reachable

    return rule


class FlexKernel:
    """The compiled kernel; one for all packs, whose lengths are left open."""

    def __init__(self) -> None:
        self._attend: Any = torch.compile(flex_attention, dynamic=True)

    def of_pack(self, document_ids: torch.Tensor, branch_ids: torch.Tensor) -> "FlexAttention":
        """The attention of one pack."""
        length = len(document_ids)
        blocks = create_block_mask(
            visible(document_ids, branch_ids), B=None, H=None, Q_LEN=length, KV_LEN=length, device=document_ids.device.type
        )
        return FlexAttention(blocks, self._attend)


@dataclass(frozen=True, slots=True)
class FlexAttention:
    """The attention of one pack."""

    blocks: BlockMask
    attend: Any

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """[1, T, H, D] from query [1, H, T, D], key and value [1, G, T, D]."""
        attended: torch.Tensor = self.attend(query, key, value, block_mask=self.blocks, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2)
