"""SwiGLU that keeps two tensors for the backward instead of three (Shazeer, 2020).

transformers' MLP keeps the gate, its activation, and the up projection. The activation comes from the gate alone, so here
it is computed again in the backward: one elementwise pass more there, and one tensor as wide as the MLP less in memory, a
fifth of what a layer keeps.

Legend: T tokens, M width of the MLP.
"""

from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional


def keep_less_in_mlps(base: Any) -> None:
    """Makes the language model's MLPs compute as above.

    Args:
        base: a Qwen2-VL with LoRA or without; names of its weights stay.
    """
    for layer in base.model.language_model.layers:
        if isinstance(layer.mlp.act_fn, nn.SiLU):  # which `hidden_act` of every published Qwen2-VL says
            layer.mlp.forward = partial(_pass_mlp, layer.mlp)


def _pass_mlp(mlp: Any, hidden: torch.Tensor) -> torch.Tensor:
    """[..., H] from [..., H]. Source: `Qwen2MLP.forward` (transformers 5.23)."""
    passed: torch.Tensor = mlp.down_proj(SwiGlu.apply(mlp.gate_proj(hidden), mlp.up_proj(hidden)))
    return passed


class SwiGlu(torch.autograd.Function):
    """silu(gate) · up: [..., M] from two [..., M]."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Both are kept."""
        ctx.save_for_backward(gate, up)
        return functional.silu(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of gate and up."""
        gate, up = ctx.saved_tensors
        of_up = functional.silu(gate).mul_(gradients[0])
        of_gate = torch.ops.aten.silu_backward(gradients[0] * up, gate)
        return of_gate, of_up
