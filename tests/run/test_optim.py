"""Schedules and clipping are the ones that are in use elsewhere."""

from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from vl_dist.run.optim import clip_gradients, gradient_norm, lr_factor, make_optimizer, set_lr
from vl_dist.settings import OptimConfig

UPSTREAM: dict[str, Any] = {
    "linear": get_linear_schedule_with_warmup,
    "cosine": get_cosine_schedule_with_warmup,
    "constant": lambda optimizer, warmup, _total: get_constant_schedule_with_warmup(optimizer, warmup),
}


@pytest.mark.parametrize("schedule", UPSTREAM)
@pytest.mark.parametrize(("warmup", "total"), [(0, 10), (3, 10), (10, 10), (0, 1)])
def test_schedules_equal_those_of_transformers(schedule: Any, warmup: int, total: int) -> None:
    settings = OptimConfig(lr=2.0, schedule=schedule, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
    upstream = UPSTREAM[schedule](optimizer, warmup, total)
    for step in range(total):
        assert 2.0 * lr_factor(settings, step, num_steps=total) == pytest.approx(upstream.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        upstream.step()


def test_the_optimizer_is_adamw_with_the_documented_constants() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = make_optimizer([parameter], OptimConfig(lr=0.1, weight_decay=0.01))
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["weight_decay"], group["fused"]) == ((0.9, 0.999), 1e-8, 0.01, True)
    set_lr(optimizer, 0.05)
    assert optimizer.param_groups[0]["lr"] == 0.05


@pytest.mark.parametrize("max_norm", [None, 0.5, 100.0])
def test_clipping_scales_to_the_norm_and_reports_the_one_before(max_norm: float | None) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.full((4,), 2.0)
    norm = gradient_norm(iter(parameters))
    assert float(norm) == pytest.approx(32**0.5)
    clip_gradients(iter(parameters), max_norm, norm)
    after = sum(float((p.grad**2).sum()) for p in parameters if p.grad is not None) ** 0.5
    assert after == pytest.approx(0.5 if max_norm == 0.5 else 32**0.5, rel=1e-4)
