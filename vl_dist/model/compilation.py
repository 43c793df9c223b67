"""Regional compilation: the code of one decoder layer, and of one block of the tower, compiled once for all of them.

Norms, rotary embeddings, SwiGLU and LoRA's sums become a few kernels; attention, which loops over the documents of a pack,
stays outside (`vl_dist.model.attention.attend_apart`). Modules and the names of their weights stay as they are.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vl_dist.errors import UserError
from vl_dist.model.last_layer import pass_last_layer
from vl_dist.model.tower import pass_block

SHORTEST = 2  # tokens; a filler's only one would be compiled as a special case, for no use
VARIANTS = 8  # of one piece of code at one length, at most: its input has a gradient or not, or is a view of another shape


def compile_layers(base: Any, num_lengths: int | None) -> None:
    """Compiles what runs in training; evaluation, whose lengths grow word by word, runs as before.

    Args:
        base: a Qwen2-VL with LoRA or without.
        num_lengths: packs have one of so many lengths (`batch.pack_lengths`), for each of which code is made; None: they
            have any, and the code leaves them open. The tower's always does, as patches are not padded.
    """
    settings: Any = torch._dynamo.config
    # With regions this small, data parallel overlaps without having them cut at its buckets.
    settings.optimize_ddp = False
    # Beyond its limits torch would go on without compiling.
    limit = VARIANTS * (num_lengths or 1)
    settings.recompile_limit = max(settings.recompile_limit, limit)
    settings.accumulated_recompile_limit = max(settings.accumulated_recompile_limit, limit)
    layers, blocks = base.model.language_model.layers, base.model.visual.blocks
    layer_pass = type(layers[0]).forward
    compiled = torch.compile(layer_pass, dynamic=num_lengths is None)
    for layer in layers[:-1]:
        layer.forward = partial(_choose, layer_pass, compiled, layer)
    # Its rows after attention are as many as a pack has targets, whatever the pack's length.
    compiled = torch.compile(pass_last_layer, dynamic=True)
    layers[-1].forward = partial(_choose, pass_last_layer, compiled, layers[-1])
    compiled = torch.compile(pass_block, dynamic=True)
    for block in blocks:
        block.pass_images = partial(_choose, pass_block, compiled)


def _choose(
    plain: Callable[..., torch.Tensor], compiled: Callable[..., torch.Tensor], layer: Any, hidden: torch.Tensor, *more: Any,
    **others: Any,
) -> torch.Tensor:  # fmt: skip
    run = compiled if layer.training and hidden.shape[-2] >= SHORTEST else plain
    return run(layer, hidden, *more, **others)


def refuse_without_compiler(device: torch.device) -> None:
    """Compiles the least there is.

    Raises:
        UserError: nothing can be compiled here.
    """
    try:
        torch.compile(_add_one)(torch.zeros(8, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
        what = "triton, a C compiler and Python's headers" if device.type == "cuda" else "a C++ compiler (as g++)"
        raise UserError(
            f"run.compile=true, but torch cannot compile on this machine: {first_line} It needs {what}. Install that, or "
            "set run.compile=false."
        ) from None


def _add_one(values: torch.Tensor) -> torch.Tensor:
    return values + 1


def num_compilations() -> int:
    """Graphs compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
