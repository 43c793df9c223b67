"""Every switch that only says how to compute, on or off: the same summed loss, and the same gradient of every LoRA tensor.

In float32 to 1e-5. In bfloat16 within the noise: as near to float32 on the same weights as runs without the switch are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.examples import assert_close, gradients
from tests.model.test_shared_prefix import GROUPS
from vl_dist.data.collate import Batch, Collator
from vl_dist.model import lora
from vl_dist.model.attention import Backend
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.settings import LoraSettings

TARGETS = (*LoraSettings().target_modules, "qkv", "fc1")  # the tower trains too
EXAMPLES = [example for group in GROUPS for example in group]


def alone(collator: Collator) -> list[Batch]:
    return [collator.pack([example]) for example in EXAMPLES]


def together(collator: Collator) -> list[Batch]:
    return [collator.pack(EXAMPLES)]  # an image of four examples goes through the tower once


def shared(collator: Collator) -> list[Batch]:
    return [collator.pack_documents(GROUPS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way to compute the same."""

    packs: Callable[[Collator], list[Batch]] = together
    backend: Backend = "sdpa"
    recompute: str = "none"
    compiled: bool = False
    num_lengths: int | None = None
    convolution: bool = False  # the patch embedding as the model has it
    peft_casts: bool = False  # LoRA's inputs as PEFT reads them


REFERENCES = {"alone": Way(packs=alone), "alone, eager": Way(packs=alone, backend="eager")}
SWITCHES = {
    "packed, an image encoded once": Way(),
    "padded": Way(packs=lambda collator: [collator.pack(EXAMPLES, length=2048)]),
    "eager": Way(backend="eager"),
    "shared prefix": Way(packs=shared),
    "shared prefix, eager": Way(packs=shared, backend="eager"),
    "recompute all": Way(recompute="all"),
    "recompute every_2, shared prefix": Way(packs=shared, recompute="every_2"),
    "Conv3d instead of a linear patch embedding": Way(convolution=True),
    "PEFT's own casts": Way(peft_casts=True),
    "compiled": Way(compiled=True),
    "compiled, recompute every_2, shared prefix": Way(packs=shared, recompute="every_2", compiled=True),
}


def make(directory: Path, way: Way, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> PackedModel:
    """The weights are bfloat16 numbers in either precision, and the adapter is random on both sides."""
    base = load_base(directory, torch.bfloat16, way.backend).to(dtype)
    if way.convolution:
        linear = base.model.visual.patch_embed.proj
        convolution = nn.Conv3d(3, linear.out_channels, linear.kernel_size, linear.stride, bias=False)
        convolution.weight = linear.weight
        base.model.visual.patch_embed.proj = convolution
    with monkeypatch.context() as patch:
        if way.peft_casts:
            patch.setattr(lora, "fuse_lora", lambda _model: None)
        adapted = attach_lora(base, LoraSettings(r=4, alpha=8, dropout=0.0, target_modules=TARGETS, tower=True), seed=3)
    model = PackedModel(adapted, way.backend, recompute=way.recompute, compiled=way.compiled, num_lengths=way.num_lengths)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.lora_parameters.values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.train()


Found = tuple[float, dict[str, torch.Tensor]]


def run(directory: Path, collator: Collator, way: Way, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> Found:
    model, total = make(directory, way, dtype, monkeypatch), 0.0
    for pack in way.packs(collator):
        loss = model(pack)
        loss.backward()
        total += float(loss.detach())
    return total, gradients(model)


def distance(found: Found, truth: Found) -> tuple[float, float]:
    """Of the loss, and of all gradients as one vector; relative."""
    vectors = [torch.cat([gradient.flatten() for gradient in grads.values()]) for _, grads in (found, truth)]
    return abs(found[0] / truth[0] - 1), float((vectors[0] - vectors[1]).norm() / vectors[1].norm())


@pytest.fixture(scope="module")
def patch_of_module() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def exact(tiny_model: Path, photo_collator: Collator, patch_of_module: pytest.MonkeyPatch) -> Found:
    torch.set_num_threads(1)
    return run(tiny_model, photo_collator, REFERENCES["alone"], torch.float32, patch_of_module)


@pytest.fixture(scope="module")
def noise(
    tiny_model: Path, photo_collator: Collator, exact: Found, patch_of_module: pytest.MonkeyPatch
) -> tuple[float, float]:
    """How far two runs in bfloat16 that have no switch on are from float32: the larger of each."""
    torch.set_num_threads(1)
    ways = [replace(way, peft_casts=True) for way in REFERENCES.values()]
    found = [run(tiny_model, photo_collator, way, torch.bfloat16, patch_of_module) for way in ways]
    losses, grads = zip(*(distance(one, exact) for one in found), strict=True)
    return max(losses), max(grads)


@pytest.mark.parametrize("way", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_changes_neither_loss_nor_gradient(
    tiny_model: Path, collator: Collator, exact: Found, way: Way, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, grads = run(tiny_model, collator, way, torch.float32, monkeypatch)
    assert loss == pytest.approx(exact[0], rel=1e-5)
    assert_close(grads, exact[1])


@pytest.mark.parametrize("way", SWITCHES.values(), ids=SWITCHES)
def test_in_bfloat16_a_switch_is_no_further_from_float32_than_runs_without_it(
    tiny_model: Path,
    collator: Collator,
    exact: Found,
    noise: tuple[float, float],
    way: Way,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loss, gradient = distance(run(tiny_model, collator, way, torch.bfloat16, monkeypatch), exact)
    assert 0 < gradient <= 2 * noise[1]
    assert loss <= max(2 * noise[0], 2**-9)  # losses may agree by chance; one rounding of a number is 2^-9
