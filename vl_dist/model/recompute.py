"""Layers that keep nothing for the backward but their input, and run again there (Chen et al., 2016).

Not by transformers' `gradient_checkpointing_enable`, which makes the embeddings of the frozen tower require a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from vl_dist.model.tower import block_pass
from vl_dist.recomputed import recomputed_layers

Pass = Callable[..., torch.Tensor]


def recompute_layers(base: Any, setting: str) -> None:
    """Makes layers of the language model, and blocks of the tower as far as it trains, run again in the backward.

    Args:
        base: a Qwen2-VL; names of its weights stay.
        setting: `model.recompute`.
    """
    layers, blocks = base.model.language_model.layers, base.model.visual.blocks
    for number in recomputed_layers(setting, len(layers)):
        layers[number].forward = recomputing(layers[number].forward)
    for number in recomputed_layers(setting, len(blocks)):
        blocks[number].pass_images = recomputing(block_pass(blocks[number]))


def recomputing(run: Pass) -> Pass:
    """The same function, whose intermediate results are computed again in the backward, with the same dropout.

    Where no gradient is recorded it runs as it is: in evaluation, and in a frozen tower.
    """

    def again(*tensors: Any, **others: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return run(*tensors, **others)
        found: torch.Tensor = checkpoint(run, *tensors, use_reentrant=False, **others)
        return found

    return again
