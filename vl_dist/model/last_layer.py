"""The last decoder layer: after its attention, only rows that predict a target are computed.

The loss reads the last hidden state of these rows alone, and nothing comes after this layer that other rows could reach it
by. In a caption's pack that is one row of eight, so that most of this layer's MLP, the largest part of a layer, is not
needed. Other rows still give this layer's keys and values.

Legend: T tokens, N rows that are asked for, H hidden size.
"""

from functools import partial
from typing import Any

import torch


def shorten_last_layer(base: Any) -> None:
    """Makes the last decoder layer take rows; without them it is what it was.

    Args:
        base: a Qwen2-VL with LoRA or without; names of its weights stay.
    """
    layer = base.model.language_model.layers[-1]
    layer.forward = partial(pass_last_layer, layer)


def pass_last_layer(
    layer: Any, hidden: torch.Tensor, *, target_rows: torch.Tensor | None = None, **others: Any
) -> torch.Tensor:
    """[1, N, H] from [1, T, H].

    Source: `Qwen2VLDecoderLayer.forward` (transformers 5.23), which computes all rows, and which a test compares.

    Args:
        target_rows: [N] int64; None: all. It comes through transformers, which hands it to every layer.
        others: what else transformers gives a layer.
    """
    passed: torch.Tensor
    if target_rows is None:
        passed = type(layer).forward(layer, hidden, **others)
        return passed
    attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden), **others)
    chosen = (hidden + attended).index_select(1, target_rows)
    passed = chosen + layer.mlp(layer.post_attention_layernorm(chosen))
    return passed
