"""Variable-length flash attention as torch ships it (Dao, 2023): sequences of any lengths in one call, on CUDA.

Legend: S sequences, T rows of all, H query heads, G key and value heads, D values of a head.
"""

import inspect
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch


def has_varlen() -> bool:
    """Whether this torch has it."""
    return find_spec("torch.nn.attention.varlen") is not None


@dataclass(frozen=True, slots=True)
class VarlenAttention:
    """Attention within each sequence."""

    ends: torch.Tensor  # [S + 1] int32: 0, then where each sequence ends
    longest: int  # rows of the longest
    causal: bool

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """[1, T, H, D] from query [1, H, T, D], key and value [1, G, T, D]."""
        from torch.nn.attention import varlen  # newer than the oldest torch that this project runs on

        rows = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # [T, heads, D]
        options = varlen_options(varlen.varlen_attn, causal=self.causal)
        if "enable_gqa" not in options and query.shape[1] != key.shape[1]:
            rows[1:] = [tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in rows[1:]]
        function: Any = varlen.varlen_attn
        attended: torch.Tensor = function(*rows, self.ends, self.ends, self.longest, self.longest, scale=scaling, **options)
        return attended[None]


def varlen_options(function: Any, *, causal: bool) -> dict[str, Any]:
    """How this version of `varlen_attn` is told of causality and of shared heads.

    torch 2.10 and 2.11 take `is_causal`, later ones a window of no rows ahead and all rows behind.
    """
    known = inspect.signature(function).parameters
    options: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in known else {}
    if "is_causal" in known:
        return options | {"is_causal": causal}
    return options | {"window_size": (-1, 0) if causal else (-1, -1)}
