"""The optimizer and its schedule."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from vl_dist.model.targets import PARTS, part_of
from vl_dist.settings import OptimConfig

Group = dict[str, Any]  # of parameters, as torch's optimizers take it


def rate_ratios(settings: OptimConfig) -> dict[str, float]:
    """What the learning rate of each part of the model is, in `optim.lr`."""
    own = {"tower": settings.lr_tower, "merger": settings.lr_merger}
    given = {part: own.get(part) for part in PARTS}
    return {part: 1.0 if rate is None else rate / settings.lr for part, rate in given.items()}


def parameter_groups(parameters: Mapping[str, torch.nn.Parameter], settings: OptimConfig) -> list[Group]:
    """Parameters that share a learning rate, with its ratio to `optim.lr`; one group unless parts have their own."""
    ratios = rate_ratios(settings)
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(ratios[part_of(name)], []).append(parameter)
    return [{"params": members, "lr": settings.lr * ratio, "lr_ratio": ratio} for ratio, members in groups.items()]


def make_optimizer(parameters: Iterable[torch.nn.Parameter] | list[Group], settings: OptimConfig) -> torch.optim.AdamW:
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
    """The learning rate of the next step. A plain number: the schedule keeps no state that could drift between ranks.

    Args:
        lr: the language model's; other groups keep their ratio to it.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def part_rates(settings: OptimConfig, factor: float) -> dict[str, float]:
    """Columns of metrics.jsonl for the parts that have a learning rate of their own.

    Args:
        factor: of `lr_factor`.
    """
    rates = {"train/lr_tower": settings.lr_tower, "train/lr_merger": settings.lr_merger}
    return {column: rate * factor for column, rate in rates.items() if rate is not None}
