"""Schedules and clipping are the ones that are in use elsewhere."""

from typing import Any

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from vl_dist.run.optim import (
    clip_gradients,
    gradient_norm,
    lr_factor,
    make_optimizer,
    parameter_groups,
    part_rates,
    set_lr,
)
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


NAMES = ("a.language_model.layers.0.q_proj.x", "a.visual.blocks.0.attn.qkv.x", "a.visual.merger.mlp.0.x")


def test_each_part_has_its_own_rate_and_the_schedule_moves_all_alike() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(1)) for name in NAMES}
    settings = OptimConfig(lr=0.1, lr_tower=0.05, lr_merger=0.3)
    optimizer = make_optimizer(parameter_groups(parameters, settings), settings)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05, 0.3])
    set_lr(optimizer, 0.1 * 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.025, 0.0125, 0.075])
    assert part_rates(settings, 0.25) == pytest.approx({"train/lr_tower": 0.0125, "train/lr_merger": 0.075})


def test_parts_without_a_rate_of_their_own_share_one_group_in_the_models_order_and_have_no_column() -> None:
    parameters = {name: torch.nn.Parameter(torch.ones(1)) for name in NAMES}
    (group,) = parameter_groups(parameters, OptimConfig(lr=0.1))
    assert all(a is b for a, b in zip(group["params"], parameters.values(), strict=True))
    assert part_rates(OptimConfig(lr=0.1), 0.5) == {}
    two = parameter_groups(parameters, OptimConfig(lr=0.1, lr_tower=0.1, lr_merger=0.2))
    assert [len(group["params"]) for group in two] == [2, 1]
