"""Dropout for a CPU, by the places that are dropped instead of a random number for every value.

The gaps between dropped values of independent draws are geometric (Devroye, 1986, X.2), so that at a probability of 0.05 a
twentieth of the random numbers is enough, and the places are all that backward has to keep. torch draws on a CPU one number
after the other for every value, which takes a fifth of a step of LoRA at a small model; on CUDA its own kernel is used.
"""

import math
from typing import Any

import torch
from torch import nn

SPARE = 8.0  # standard deviations of the number of dropped values that are drawn beyond the mean


class SparseDropout(nn.Dropout):
    """As `nn.Dropout`, from other random numbers on a CPU."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 (torch's name)
        """The values, each 0 with probability `p` and else divided by 1 - p; as they are in evaluation mode."""
        if not self.training or self.p in (0.0, 1.0) or input.device.type != "cpu":
            return super().forward(input)
        dropped: torch.Tensor = _Drop.apply(input, dropped_places(input.numel(), self.p), 1.0 / (1.0 - self.p))
        return dropped


def dropped_places(num_values: int, p: float) -> torch.Tensor:
    """[K] int64, ascending: the places of `num_values` values that are dropped; beyond them, `num_values` itself.

    Nothing is read back to find how many there are: enough are drawn for all but one in 10^14 times.

    Args:
        p: probability of each value, above 0 and below 1.
    """
    wanted = num_values * p
    num_drawn = math.ceil(wanted + SPARE * math.sqrt(wanted * (1.0 - p)) + SPARE**2)
    # A geometric number by inversion; torch's `geometric_` is the same without vector instructions.
    kept = torch.rand(num_drawn, dtype=torch.float64).log_().mul_(1.0 / math.log1p(-p))  # values up to the next dropped one
    gaps = kept.clamp_(max=num_values).long().add_(1)
    return gaps.cumsum(0).sub_(1).clamp_(max=num_values)


class _Drop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, places: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.scale = scale
        return _drop(values, places, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _drop(gradients[0], places, ctx.scale), None, None


def _drop(values: torch.Tensor, places: torch.Tensor, scale: float) -> torch.Tensor:
    """Scaled values with zeros at the places; one past the end is a place to write to."""
    flat = values.new_empty(values.numel() + 1)
    torch.mul(values.reshape(-1), scale, out=flat[:-1])
    flat.index_fill_(0, places, 0.0)
    return flat[:-1].view(values.shape)
