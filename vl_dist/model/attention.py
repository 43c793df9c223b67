"""Who attends to whom: the mask that keeps the documents of a pack apart.

The mask is given to transformers as `{"full_attention": mask}`, which it passes through untouched on every version used
here. Its own detection of packs depends on the shape of the position ids and on the absence of a cache, and silently gives
plain causal attention across documents where it fails.

Legend: T tokens of a pack.
"""

from typing import Literal

import torch

Backend = Literal["sdpa", "eager"]


def resolve_backend(setting: Literal["auto", "sdpa", "eager"]) -> Backend:
    """The attention implementation that a setting stands for."""
    return "sdpa" if setting == "auto" else setting


def sees(document_ids: torch.Tensor, branch_ids: torch.Tensor) -> torch.Tensor:
    """True where a row may attend to a column: not later, of the same document, and in its trunk or in the same branch.

    Args:
        document_ids: [T] int64, ascending.
        branch_ids: [T] int64, 0 in a document's trunk, then the number of the branch from 1.

    Returns:
        [T, T] bool.
    """
    same_document = document_ids[:, None] == document_ids[None, :]
    reachable = (branch_ids[None, :] == 0) | (branch_ids[:, None] == branch_ids[None, :])
    return (same_document & reachable).tril()


def attention_mask(
    document_ids: torch.Tensor, branch_ids: torch.Tensor, backend: Backend, dtype: torch.dtype
) -> torch.Tensor:
    """The mask in the form that a backend takes.

    Args:
        document_ids, branch_ids: [T] int64, as for `sees`.
        backend: sdpa takes booleans; eager adds the mask to its scores, so forbidden places get the lowest number of
            `dtype`, whose softmax is exactly 0.

    Returns:
        [1, 1, T, T].
    """
    allowed = sees(document_ids, branch_ids)[None, None]
    if backend == "sdpa":
        return allowed
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, lowest)
