"""The vision tower, called part by part: images of as many patches attend in one call, and nothing is read on the host.

transformers' own forward reads the grids, cuts and loops over images three times in each layer. The parts are the same and
so are the numbers; LoRA layers stay where they are.

Legend: P patches of all images, C values of a patch, E width of the tower, D values of a head, V image tokens, H hidden
size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from vl_dist.model.attention import PackAttention, attend_apart


class PatchProjection(nn.Conv3d):
    """The patch embedding's convolution as the matrix product that it is: its patches do not overlap.

    A Conv3d takes many times as long in some precisions. Name and shape of the weight stay.
    """

    @classmethod
    def of(cls, convolution: nn.Conv3d) -> "PatchProjection":
        """The same layer, with the same weight."""
        assert convolution.kernel_size == convolution.stride and convolution.bias is None, "patches overlap"
        frames, rows, columns = convolution.kernel_size
        with torch.device("meta"):
            layer = cls(
                convolution.in_channels,
                convolution.out_channels,
                kernel_size=(frames, rows, columns),
                stride=(frames, rows, columns),
                bias=False,
            )
        layer.weight = convolution.weight
        return layer

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[P, E, 1, 1, 1] from [P, channels, frames, rows, columns], each patch by itself."""
        product = functional.linear(patches.flatten(1), self.weight.flatten(1))
        return product[:, :, None, None, None]


def encode_images(tower: Any, patches: torch.Tensor, positions: torch.Tensor, attend: PackAttention) -> torch.Tensor:
    """The features of images, as the language model takes them.

    Source: `Qwen2VisionTransformerPretrainedModel.forward` (transformers 5.23), which a test compares.

    Args:
        tower: Qwen2-VL's `visual`.
        patches: [P, C].
        positions: [2, P] row and column of each patch in its image.
        attend: attention within each image.

    Returns:
        [V, H].
    """
    hidden = tower.patch_embed(patches)
    rotation = _rotation(tower.rotary_pos_emb.inv_freq, positions)
    for block in tower.blocks:
        hidden = block_pass(block)(block, hidden, rotation, attend)
    features: torch.Tensor = tower.merger(hidden)
    return features


def pass_block(
    block: Any, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: PackAttention
) -> torch.Tensor:
    """[P, E] from [P, E]: one block over the patches of all images."""
    attended = hidden + _attention(block.attn, block.norm1(hidden), rotation, attend)
    passed: torch.Tensor = attended + block.mlp(block.norm2(attended))
    return passed


def block_pass(block: Any) -> Callable[..., torch.Tensor]:
    """How `encode_images` runs a block: `pass_block`, or what recomputation or compilation put on the block instead."""
    run: Callable[..., torch.Tensor] = getattr(block, "pass_images", pass_block)
    return run


def _rotation(frequencies: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, [P, D] each: a head's quarters turn with the row, the column, the row, the column."""
    angles = positions[..., None].float() * frequencies.float()  # [2, P, D / 4]
    half = torch.cat([angles[0], angles[1]], dim=-1)
    whole = torch.cat([half, half], dim=-1)
    return whole.cos(), whole.sin()


def _attention(
    layer: Any, hidden: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], attend: PackAttention
) -> torch.Tensor:
    """[P, E] from [P, E]."""
    query, key, value = layer.qkv(hidden).unflatten(-1, (3, layer.num_heads, -1)).unbind(1)  # [P, heads, D]
    query, key = apply_rotary_pos_emb_vision(query, key, *rotation)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    attended = attend_apart(attend, query, key, value, layer.head_dim**-0.5)
    projected: torch.Tensor = layer.proj(attended[0].flatten(1))
    return projected
