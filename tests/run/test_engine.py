"""What the engines have beside the step; the step itself is compared in tests/dist/test_parity.py."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from tests.examples import SEVEN, gradients, packed_model
from vl_dist.data.collate import Collator
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks
from vl_dist.run.engine import PlainEngine, num_values
from vl_dist.run.idle import with_idle_image
from vl_dist.settings import LoraSettings, OptimConfig


@pytest.mark.parametrize("examples", [[SEVEN[1], SEVEN[6]], []], ids=["text only", "filler"])
def test_an_idle_image_runs_the_tower_and_changes_neither_loss_nor_gradient_at_all(
    tiny_model: Path, collator: Collator, examples: list[object]
) -> None:
    model = packed_model(tiny_model)
    calls: list[tuple[int, ...]] = []
    tower = model.peft_model.get_base_model().model.visual
    tower.patch_embed.register_forward_pre_hook(lambda _module, inputs: calls.append(tuple(inputs[0].shape)))
    pack = collator.pack(examples)  # type: ignore[arg-type]
    found = []
    for given in (pack, with_idle_image(pack, collator.shape.merge_size)):
        loss = model(given)
        loss.backward()
        found.append((loss.detach(), gradients(model)))
    assert [shape[0] for shape in calls] == [collator.shape.merge_size**2]  # the second time, and the smallest grid
    (loss, grads), (idle_loss, idle_grads) = found
    assert torch.equal(loss, idle_loss)
    assert all(torch.equal(idle_grads[name], gradient) for name, gradient in grads.items())


def test_an_idle_image_gives_zero_gradients_to_a_tower_that_trains(tiny_model: Path, collator: Collator) -> None:
    model = packed_model(tiny_model)
    weight = model.peft_model.get_base_model().model.visual.blocks[0].attn.qkv.weight
    weight.requires_grad_(True)
    again = type(model)(model.peft_model, "sdpa")
    again(with_idle_image(collator.pack([SEVEN[1]]), collator.shape.merge_size)).backward()
    assert weight.grad is not None and not weight.grad.any()


def test_a_pack_with_images_is_left_as_it_is(collator: Collator) -> None:
    pack = collator.pack(SEVEN[:1])
    assert with_idle_image(pack, collator.shape.merge_size) is pack


def test_a_parameter_in_shares_counts_whole() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    assert num_values(parameter) == 3
    parameter.ds_numel = 12  # type: ignore[attr-defined]
    assert num_values(parameter) == 12


def test_a_tower_that_trains_is_stepped_by_steps_without_images_too(tiny_model: Path, collator: Collator) -> None:
    """Else AdamW's moments of the tower would depend on which rank has the images."""
    base = load_base(tiny_model, torch.float32, "sdpa")
    model = PackedModel(attach_lora(base, LoraSettings(r=2, target_modules=("q_proj", "qkv"), tower=True), seed=0), "sdpa")
    assert any(".visual." in name for name in model.lora_parameters)
    engine = PlainEngine(model, Ranks(Accelerator(cpu=True)), OptimConfig())
    for examples in ([SEVEN[0]], [SEVEN[1]], []):
        engine.backward(engine(collator.pack(examples)))
        engine.clip_and_step()
    trained = engine.trained()
    assert trained is not None
    assert len(trained.moments) == 2 * len(trained.weights) == 2 * len(model.lora_parameters)
