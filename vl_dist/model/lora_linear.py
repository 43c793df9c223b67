"""LoRA's sum in one operation, in the precision of the base; weights, gradients and files stay in float32.

PEFT multiplies the update by its scale, adds it to the base's output, and turns every input into float32 where the base has
less: three passes over the widest activations of a layer in each direction, and copies at twice their size. Here the small
matrices are rounded instead, as autocast would, and the product, the scale and the sum are one `addmm`.
"""

from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from torch import nn
from torch.nn import functional

from vl_dist.model.dropout import SparseDropout


class RoundedLinear(nn.Linear):
    """A linear layer in float32, without a bias, that computes in the precision of its input."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "RoundedLinear":
        """The same layer, with the same weight."""
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False)
        layer.weight = linear.weight
        return layer

    def forward(self, inputs: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0) -> torch.Tensor:
        """[..., outputs] from [..., inputs]; with `onto` [..., outputs], that plus the scaled product."""
        weight = self.weight.to(inputs.dtype)
        if onto is None:
            return functional.linear(inputs, weight)
        # ZeRO-3 hands on views of what layers give, and compiled code needs no help.
        if onto._is_view() or torch.compiler.is_compiling():
            summed = torch.addmm(onto.flatten(0, -2), inputs.flatten(0, -2), weight.t(), alpha=scale)
            return summed.view(onto.shape)
        added: torch.Tensor = _AddProduct.apply(onto, inputs, weight, scale)
        return added


class _AddProduct(torch.autograd.Function):
    """`addmm` into its first argument, which autograd's own in-place operation would copy in the backward."""

    @staticmethod
    def forward(ctx: Any, onto: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.mark_dirty(onto)
        ctx.save_for_backward(inputs, weight)
        ctx.scale = scale
        onto.view(-1, onto.shape[-1]).addmm_(inputs.flatten(0, -2), weight.t(), alpha=scale)
        return onto

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        inputs, weight = ctx.saved_tensors
        rows = gradients[0].flatten(0, -2)
        of_inputs = (rows @ weight).mul_(ctx.scale).view(inputs.shape)
        of_weight = (rows.t() @ inputs.flatten(0, -2)).mul_(ctx.scale)
        return gradients[0], of_inputs, of_weight, None


class FusedLora(LoraLayer):  # type: ignore[misc]
    """PEFT's layer, which computes its usual case by itself: one adapter, active and not merged."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """[..., outputs] from [..., inputs]."""
        if args or kwargs or self.disable_adapters or self.merged or list(self.active_adapters) != list(self.lora_A):
            found: torch.Tensor = super().forward(x, *args, **kwargs)
            return found
        [name] = self.active_adapters
        down = self.lora_A[name](self.lora_dropout[name](x))
        # Through the modules, whose weights ZeRO-3 gathers when they are called.
        added: torch.Tensor = self.lora_B[name](down, onto=self.base_layer(x), scale=self.scaling[name])
        return added


def fuse_lora(model: nn.Module) -> None:
    """Makes LoRA layers compute as above; names of weights stay.

    DoRA, which takes norms of the whole weight, and layers of a quantised base are left as PEFT computes them.
    """
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if type(layer) is not LoraLayer or len(layer.lora_A) != 1 or _has_variants(layer):
            continue
        [name] = layer.lora_A
        layer.__class__ = FusedLora
        layer.cast_input_dtype_enabled = False
        for matrices in (layer.lora_A, layer.lora_B):
            assert matrices[name].bias is None, "LoRA without biases"
            matrices[name] = RoundedLinear.of(matrices[name])
        if isinstance(layer.lora_dropout[name], nn.Dropout):
            layer.lora_dropout[name] = SparseDropout(layer.lora_dropout[name].p)


def _has_variants(layer: Any) -> bool:
    return bool(getattr(layer, "lora_variant", None)) or any(getattr(layer, "use_dora", {}).values())
