"""Who attends to whom, and by which kernel: what keeps the documents of a pack apart.

transformers passes what stands in `{"full_attention": ...}` untouched to the attention function of every layer, on all
versions used here. We put there what computes a pack's attention, and register a function that calls it. Where it finds a
mask or nothing instead, as in generation, it is transformers' own SDPA. transformers' detection of packs depends on the
shape of the position ids and on the absence of a cache, and silently gives plain causal attention across documents where it
fails.

Legend: T tokens of a pack, H query heads, G key and value heads, D values of a head.
"""

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from vl_dist.data.collate import Batch
from vl_dist.errors import UserError
from vl_dist.model.flex import FlexKernel
from vl_dist.model.grouped import GroupedAttention, Segment
from vl_dist.model.varlen import VarlenAttention, has_varlen

Backend = Literal["varlen", "flex", "sdpa", "eager"]
REGISTERED = "vl_dist_packs"  # a name with "flash" in it would be looked for on a hub


class PackAttention(Protocol):
    """The attention of one pack."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float) -> torch.Tensor:
        """[1, T, H, D] from query [1, H, T, D], key and value [1, G, T, D]."""


Kernel = Callable[[Batch, torch.dtype], PackAttention | torch.Tensor]
"""What stands for the mask of a pack, given the precision of the model."""


def resolve_backend(
    setting: Literal["auto", "varlen", "flex", "sdpa", "eager"],
    device_type: str,
    dtype: torch.dtype,
    *,
    branches: bool,
) -> Backend:
    """The attention that a setting stands for.

    Args:
        branches: whether documents may have several branches (`data.share_prefix`).

    Raises:
        UserError: it cannot run here.
    """
    reasons = {
        "varlen": _why_no_varlen(device_type, dtype, branches=branches),
        "flex": None if device_type == "cuda" else "FlexAttention has no backward on a CPU",
    }
    if setting == "auto":
        if device_type != "cuda":
            return "sdpa"
        return "varlen" if reasons["varlen"] is None else "flex"
    reason = reasons.get(setting)
    if reason is not None:
        raise UserError(
            f"model.attention={setting} cannot be used: {reason}. Set model.attention=auto, which takes what can run here."
        )
    return setting


def _why_no_varlen(device_type: str, dtype: torch.dtype, *, branches: bool) -> str | None:
    if device_type != "cuda":
        return "it runs on CUDA only"
    if not has_varlen():
        return f"torch {torch.__version__} does not have it (2.10 and newer do)"
    if dtype != torch.bfloat16:
        return f"it takes bfloat16, and model.dtype is {str(dtype).removeprefix('torch.')}"
    return "a document of data.share_prefix has several branches, which it cannot keep apart" if branches else None


def make_kernel(backend: Backend) -> Kernel:
    """What computes the attention of packs."""
    if backend == "eager":
        return lambda batch, dtype: dense_mask(batch.document_ids, batch.branch_ids, dtype)
    if backend == "flex":
        flex = FlexKernel()
        return lambda batch, _dtype: flex.of_pack(batch.document_ids, batch.branch_ids)
    if backend == "varlen":
        return lambda batch, _dtype: VarlenAttention(batch.document_ends, batch.longest_document, causal=True)
    return lambda batch, _dtype: by_document(batch)


def by_document(batch: Batch) -> GroupedAttention:
    """Attention document by document: each trunk within itself, and each branch to its trunk and itself."""
    segments: list[Segment] = []
    for document in batch.documents:
        if len(document.branches) == 1:
            segments.append(Segment(document.num_tokens))
            continue
        trunk = len(segments)
        segments += [Segment(document.trunk), *(Segment(size, prefix=trunk) for size in document.branches)]
    if batch.num_padding:
        segments.append(Segment(batch.num_padding))
    return GroupedAttention(tuple(segments), causal=True)


def by_image(batch: Batch, backend: Backend) -> PackAttention:
    """Attention of the tower: all patches of an image to each other."""
    if backend == "varlen":
        return VarlenAttention(batch.image_ends, max(batch.image_patches), causal=False)
    return GroupedAttention(tuple(Segment(size) for size in batch.image_patches), causal=False)


def register() -> str:
    """Tells transformers of our attention function; the name under which it knows it."""
    AttentionInterface.register(REGISTERED, packed_attention)
    AttentionMaskInterface.register(REGISTERED, sdpa_mask)
    return REGISTERED


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in each layer: the pack's own attention, or SDPA where there is a mask or nothing."""
    if callable(attention_mask):
        assert not others.get("dropout"), "Qwen2-VL has no dropout in attention"
        return attend_apart(attention_mask, query, key, value, scaling), None
    attended, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **others)
    return attended, None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_apart(
    attend: PackAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The same call, never part of a compiled layer: its loops and calls are others for each pack."""
    return attend(query, key, value, scaling)


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


def dense_mask(document_ids: torch.Tensor, branch_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What eager attention adds to its scores: forbidden places get the lowest number, whose softmax is exactly 0.

    Args:
        document_ids, branch_ids: [T] int64, as for `sees`.

    Returns:
        [1, 1, T, T].
    """
    allowed = sees(document_ids, branch_ids)[None, None]
    return torch.zeros_like(allowed, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
