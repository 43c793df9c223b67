"""Predicted memory against what is there: counted activations, counted weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.conftest import SMALL, TEXTS
from tests.examples import SEVEN
from vl_dist.data.collate import Batch, Collator
from vl_dist.forecast.memory import (
    GIB,
    PackSize,
    Training,
    frozen_parameters,
    kept_activations,
    lora_parameters,
    predict_memory,
)
from vl_dist.model import lora_linear
from vl_dist.model.attention import Backend
from vl_dist.model.flops import ModelShape, read_shape
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.settings import LoraSettings
from vl_dist.tiny import make_tiny_model

SOME = ("q_proj", "down_proj")
ALL = LoraSettings().target_modules


def kept_by_autograd(model: PackedModel, batch: Batch) -> int:
    """Bytes of all tensors that the backward of a pack needs, weights aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(batch)
    assert loss.requires_grad
    return sum(seen.values())


WAYS: dict[str, tuple[Backend, str]] = {
    "sdpa": ("sdpa", "none"),
    "eager": ("eager", "none"),
    "all": ("sdpa", "all"),
    "every_2": ("sdpa", "every_2"),
}


@pytest.fixture(scope="module")
def by_layers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models that differ in depth only."""
    found = {layers: tmp_path_factory.mktemp("layers") / str(layers) for layers in (2, 4)}
    for layers, directory in found.items():
        make_tiny_model(directory, TEXTS, seed=1, size=replace(SMALL, layers=layers))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize(
    ("targets", "way"), [(ALL, "sdpa"), (SOME, "sdpa"), (ALL, "eager"), (ALL, "all"), (SOME, "every_2"), (ALL, "every_2")]
)
def test_a_layer_keeps_what_is_predicted(
    by_layers: dict[int, Path],
    collator: Collator,
    dtype: torch.dtype,
    dropout: float,
    targets: tuple[str, ...],
    way: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lora_linear, "SparseDropout", nn.Dropout)  # keeps masks, as on CUDA
    backend, recompute = WAYS[way]
    batch = collator.pack([example for example in SEVEN if not example.image_paths] * 2)
    training = Training(
        rank=4,
        targets=targets,
        has_dropout=dropout > 0,
        base_bytes=dtype.itemsize,
        mask_bytes=dtype.itemsize,  # a CPU keeps a dropout mask as numbers
        eager=backend == "eager",
        recompute=recompute,
    )
    kept, predicted = [], []
    for directory in by_layers.values():
        settings = LoraSettings(r=4, alpha=8, dropout=dropout, target_modules=targets)
        adapted = attach_lora(load_base(directory, dtype, backend), settings, seed=0)
        kept.append(kept_by_autograd(PackedModel(adapted, backend, recompute=recompute).train(), batch))
        predicted.append(kept_activations(read_shape(directory), training, batch.num_tokens))
    assert kept[1] - kept[0] == pytest.approx(predicted[1] - predicted[0], rel=0.01)


def test_the_2b_and_a_tiny_model_have_the_predicted_number_of_weights(shape_2b: ModelShape, tiny_model: Path) -> None:
    assert frozen_parameters(shape_2b) == pytest.approx(2_208_985_600, rel=1e-3)
    base = load_base(tiny_model, torch.float32, "sdpa")
    counted = sum(p.numel() for p in base.parameters())
    assert frozen_parameters(read_shape(tiny_model)) == pytest.approx(counted, rel=1e-3)
    model = attach_lora(base, LoraSettings(r=4, alpha=8), seed=0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert lora_parameters(read_shape(tiny_model), 4, ALL) == trained


def test_each_zero_stage_spreads_more_and_nothing_is_lost(shape_2b: ModelShape) -> None:
    training = Training(rank=64, targets=ALL, has_dropout=True, base_bytes=2)
    pack = PackSize(tokens=2048, targets=256, patches=6400)
    by_stage = [predict_memory(shape_2b, training, pack, world_size=8, zero_stage=stage) for stage in range(4)]
    lora = lora_parameters(shape_2b, 64, ALL) * 4
    assert by_stage[0].lora == 4 * lora
    assert by_stage[3].lora == pytest.approx(4 * lora / 8)
    assert [one.lora for one in by_stage] == sorted((one.lora for one in by_stage), reverse=True)
    assert by_stage[0].weights == by_stage[2].weights == pytest.approx(4.11 * GIB, rel=0.01)
    assert by_stage[3].weights < 0.4 * by_stage[2].weights
    assert len({one.activations for one in by_stage}) == 1
    alone = predict_memory(shape_2b, training, pack, world_size=1, zero_stage=2)
    assert alone == predict_memory(shape_2b, training, pack, world_size=1, zero_stage=0)


def test_recomputation_gives_up_a_layers_activations_for_those_of_one_layer_at_a_time(shape_2b: ModelShape) -> None:
    pack = PackSize(tokens=8192, targets=256, patches=6400)
    found = {}
    for recompute in ("none", "every_2", "all"):
        training = Training(rank=64, targets=ALL, has_dropout=True, base_bytes=2, recompute=recompute)
        found[recompute] = predict_memory(shape_2b, training, pack, world_size=1, zero_stage=0)
    none, half, everything = found.values()
    assert half.activations == pytest.approx((none.activations + everything.activations) / 2)
    assert everything.activations == 28 * 8192 * 1536 * 2
    assert everything.working == half.working > none.working
    assert everything.total < half.total < none.total
    eager = predict_memory(shape_2b, replace(training, eager=True), pack, world_size=1, zero_stage=0)
    assert eager.total > everything.total + 12 * 8192**2 * 4
