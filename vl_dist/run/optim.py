"""The optimizer and its schedule."""

import math
from collections.abc import Iterable

import torch

from vl_dist.settings import OptimConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], settings: OptimConfig) -> torch.optim.AdamW:
    """AdamW with decoupled weight decay (Loshchilov and Hutter, 2019). Fused: it reads nothing back from the device."""
    return torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=settings.weight_decay, fused=True
    )


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """The total norm of all gradients, a scalar that is not read."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def clip_gradients(parameters: Iterable[torch.nn.Parameter], max_norm: float | None, norm: torch.Tensor) -> None:
    """Scales gradients down from their total norm to `max_norm`, if given and smaller."""
    if max_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)


def lr_factor(settings: OptimConfig, step: int, *, num_steps: int) -> float:
    """What the highest learning rate is multiplied by in optimizer step `step`, counted from 0.

    Warm-up rises linearly from 0; then `linear` and `cosine` fall to 0 at `num_steps`. Source of the forms:
    `get_linear_schedule_with_warmup` and `get_cosine_schedule_with_warmup` of transformers, which a test compares.
    """
    if step < settings.warmup_steps:
        return step / settings.warmup_steps
    if settings.schedule == "constant":
        return 1.0
    progress = (step - settings.warmup_steps) / max(1, num_steps - settings.warmup_steps)
    if settings.schedule == "linear":
        return max(0.0, 1.0 - progress)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The learning rate of the next step. A plain number: the schedule keeps no state that could drift between ranks."""
    for group in optimizer.param_groups:
        group["lr"] = lr
