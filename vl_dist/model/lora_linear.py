"""LoRA's two matrices as a base in lower precision reads them: rounded on the way in, kept in float32.

PEFT turns every input of an adapter into float32 instead, which copies the widest activations of a layer at twice their
size and multiplies them without tensor cores. Here the small matrices are rounded, as autocast would; the optimizer, the
sum of gradients over packs and the files still have float32.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLayer
from torch import nn
from torch.nn import functional


class RoundedLinear(nn.Linear):
    """A linear layer in float32 that computes in the precision of its input."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "RoundedLinear":
        """The same layer, with the same weight."""
        assert getattr(linear, "bias", None) is None, "LoRA without biases"
        with torch.device("meta"):
            layer = cls(linear.in_features, linear.out_features, bias=False)
        layer.weight = linear.weight
        return layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., outputs] from [..., inputs]."""
        return functional.linear(inputs, self.weight.to(inputs.dtype))


def round_lora(model: nn.Module) -> None:
    """Spares LoRA's inputs the cast to float32 where the base has less; names of weights stay.

    DoRA, which takes norms of the whole weight, is left as PEFT computes it.
    """
    for layer in model.modules():
        if not isinstance(layer, LoraLayer) or _variants(layer):
            continue
        for name, down in layer.lora_A.items():
            if down.weight.dtype != layer.get_base_layer().weight.dtype and down.bias is None:
                layer.cast_input_dtype_enabled = False
                layer.lora_A[name] = RoundedLinear.of(down)
                layer.lora_B[name] = RoundedLinear.of(layer.lora_B[name])


def _variants(layer: Any) -> bool:
    return bool(getattr(layer, "lora_variant", None)) or any(getattr(layer, "use_dora", {}).values())
