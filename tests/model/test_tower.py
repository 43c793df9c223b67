"""The tower called part by part is transformers' own, frozen or trained, and each distinct image goes through it once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from tests.examples import SEVEN, assert_close
from vl_dist.data.collate import Collator
from vl_dist.data.images import Grid
from vl_dist.data.positions import patch_positions
from vl_dist.data.records import Example
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.settings import LoraSettings


def own_features(directory: Path, pixels: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
    whole = Qwen2VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    features: torch.Tensor = whole.model.visual(pixels, grid_thw=grids).pooler_output
    return features


def with_trained_tower(directory: Path) -> PackedModel:
    settings = LoraSettings(
        r=2, dropout=0.0, target_modules=("q_proj", "qkv", "proj", "fc1", "mlp.2"), tower=True, merger=True
    )
    model = PackedModel(attach_lora(load_base(directory, torch.float32, "sdpa"), settings, seed=0), "sdpa")
    with torch.no_grad():
        for n, parameter in enumerate(model.lora_parameters.values()):
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)) * 0.2)
    return model


@pytest.mark.parametrize("chosen", [[0, 2, 3, 4, 5], [0]], ids=["mixed grids", "one image"])
def test_features_are_those_of_the_models_own_tower(tiny_model: Path, collator: Collator, chosen: list[int]) -> None:
    batch = collator.pack([SEVEN[n] for n in chosen])
    assert len(chosen) == 1 or len(set(batch.image_patches)) > 1 < max(map(batch.image_patches.count, batch.image_patches))
    model = PackedModel(attach_lora(load_base(tiny_model, torch.float32, "sdpa"), LoraSettings(r=2), seed=0), "sdpa")
    wanted = own_features(tiny_model, batch.pixel_values, batch.image_grids)
    assert_close({"features": model.image_features(batch)}, {"features": wanted.detach()})


def test_lora_on_the_tower_gets_the_gradients_of_the_models_own_tower(tiny_model: Path, collator: Collator) -> None:
    model = with_trained_tower(tiny_model)
    batch = collator.pack([SEVEN[n] for n in (0, 2, 3)])
    tower = model.peft_model.get_base_model().model.visual
    weights = torch.randn(batch.num_patches // 4, 64, generator=torch.Generator().manual_seed(0))
    trained = {name: p for name, p in model.lora_parameters.items() if ".visual." in name}
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in trained} == {"qkv", "proj", "fc1", "2"}
    assert not any(".patch_embed." in name for name in trained), "its name ends in proj, but it is no linear layer"
    found = []
    for features in (model.image_features(batch), tower(batch.pixel_values, grid_thw=batch.image_grids).pooler_output):
        gradients = torch.autograd.grad((features * weights).sum(), list(trained.values()))
        found.append(dict(zip(trained, gradients, strict=True)))
    assert_close(*found)


def test_places_of_patches_are_those_that_transformers_computes() -> None:
    vision_utils = pytest.importorskip("transformers.vision_utils")
    grids = [Grid(1, 4, 6), Grid(1, 2, 2), Grid(2, 6, 4)]
    wanted = vision_utils.get_vision_position_ids(torch.tensor([(grid.t, grid.h, grid.w) for grid in grids]), 2)
    assert torch.equal(torch.from_numpy(patch_positions(grids, 2)), wanted.T)


def test_an_image_in_several_documents_is_encoded_once_and_trains_as_if_it_were_not(
    tiny_model: Path, collator: Collator
) -> None:
    both = SEVEN[3]
    smaller = replace(SEVEN[0], id="smaller", max_pixels=56 * 56)
    repeated: list[Example] = [
        SEVEN[0],
        both,
        replace(SEVEN[0], id="again", answer="Again."),
        replace(both, id="b"),
        smaller,
    ]
    batch = collator.pack(repeated)
    assert batch.num_images == 4 and len(batch.image_patches) == 4
    assert batch.image_grids[0].tolist() != batch.image_grids[3].tolist()
    model = with_trained_tower(tiny_model)
    names, parameters = zip(*model.lora_parameters.items(), strict=True)
    found = torch.autograd.grad(model(batch), parameters)
    alone = sum(model(collator.pack([example])) for example in repeated)
    assert isinstance(alone, torch.Tensor)
    wanted = torch.autograd.grad(alone, parameters)
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, wanted, strict=True)))


def test_an_image_is_not_encoded_for_a_document_that_left_the_pack(collator: Collator, photos: Path) -> None:
    broken = photos / "china.jpg"
    kept = broken.read_bytes()
    broken.write_bytes(b"")
    try:
        batch = collator.pack([replace(SEVEN[3], prompt=(*SEVEN[0].prompt, *SEVEN[3].prompt)), SEVEN[2]])
    finally:
        broken.write_bytes(kept)
    assert [one.id for one in batch.dropped] == ["both"]
    assert batch.num_images == 1
