"""The cache changes nothing but the time a step takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.examples import SEVEN, assert_close, cached_collator, gradients, packed_model
from vl_dist.data.collate import Collator
from vl_dist.data.features import FeatureReader
from vl_dist.errors import UserError
from vl_dist.model.features import feature_space, spot_check
from vl_dist.model.load import load_base
from vl_dist.model.lora import attach_lora
from vl_dist.model.packed import PackedModel
from vl_dist.run.idle import with_idle_image
from vl_dist.settings import LoraSettings

IMAGES = ("rocket.jpg", "cat.jpg", "china.jpg", "flower.jpg", "coffee.jpg", "astronaut.jpg")


def losses_and_gradients(model: PackedModel, collator: Collator, *, idle: bool = False) -> dict[str, torch.Tensor]:
    pack = collator.pack(SEVEN)
    loss = model(with_idle_image(pack, collator.shape.merge_size) if idle else pack)
    loss.backward()
    return {"loss": loss.detach()} | gradients(model)


@pytest.mark.parametrize("cached", [(), IMAGES[2:4], IMAGES[:5], IMAGES])
def test_loss_and_every_gradient_are_the_same_with_any_part_of_the_images_cached(
    tiny_model: Path, collator: Collator, tmp_path: Path, cached: tuple[str, ...]
) -> None:
    model = packed_model(tiny_model)
    wanted = losses_and_gradients(model, collator)
    reading = cached_collator(collator, model, cached or IMAGES[:1], tmp_path) if cached else collator
    assert reading.pack(SEVEN).num_cached_images == len(cached)
    assert_close(losses_and_gradients(model, reading), wanted)
    assert_close(losses_and_gradients(model, reading, idle=True), wanted)


def test_the_tower_does_not_run_where_all_images_are_cached(
    tiny_model: Path, collator: Collator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed_model(tiny_model)
    reading = cached_collator(collator, model, IMAGES, tmp_path)
    monkeypatch.setattr("vl_dist.model.packed.encode_images", lambda *_: pytest.fail("the tower ran"))
    assert float(model(reading.pack(SEVEN)).detach()) > 0


def test_weights_precision_and_pixel_settings_each_name_another_directory(tiny_model: Path, processor: Any) -> None:
    images = processor.image_processor
    settings = {name: getattr(images, name) for name in dir(images) if not name.startswith("_")}
    first = packed_model(tiny_model)
    keys = {feature_space(first, images).key}
    assert feature_space(packed_model(tiny_model, seed=9), images).key in keys  # the adapter does not count
    keys.add(feature_space(first, SimpleNamespace(**settings | {"image_mean": [0.5, 0.5, 0.5]})).key)
    keys.add(feature_space(packed_model(tiny_model, dtype=torch.bfloat16), images).key)
    with torch.no_grad():
        next(first.tower.parameters()).view(-1)[0] += 1e-3
    keys.add(feature_space(first, images).key)
    assert len(keys) == 4


def test_a_tower_that_trains_is_refused(tiny_model: Path, processor: Any) -> None:
    base = load_base(tiny_model, torch.float32, "sdpa")
    trained = attach_lora(base, LoraSettings(r=2), seed=0)
    tower: Any = trained.get_base_model()
    tower.model.visual.merger.mlp[0].weight.requires_grad_(True)
    with pytest.raises(UserError, match=r"model\.feature_cache.*are trained.*feature_cache=null"):
        feature_space(PackedModel(trained, "sdpa"), processor.image_processor)


def test_features_that_the_tower_does_not_make_any_more_are_refused_with_the_figure(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model = packed_model(tiny_model)
    space = feature_space(model, collator.pictures.image_processor)
    images = [(0, name, None) for name in IMAGES]

    def check(changed: PackedModel) -> float | None:
        reader = FeatureReader(tmp_path / space.key, width=space.width, dtype=space.dtype)
        return spot_check(changed, collator, reader, images)

    assert check(model) is None
    cached_collator(collator, model, IMAGES[3:5], tmp_path)
    found = check(model)
    assert found is not None and found < 1e-5
    other = packed_model(tiny_model)
    with torch.no_grad():
        other.tower.get_submodule("blocks.0.mlp.fc1").weight *= 1.2
    with pytest.raises(UserError, match=rf"other features of flower\.jpg .*0\.\d+|\de-0\d apart.*Remove {tmp_path}"):
        check(other)


def test_what_the_tower_made_is_handed_over_with_the_names_of_its_images(
    tiny_model: Path, collator: Collator, tmp_path: Path
) -> None:
    model = packed_model(tiny_model)
    reading = cached_collator(collator, model, IMAGES[:2], tmp_path)
    kept: list[tuple[tuple[str, ...], torch.Tensor]] = []
    model.keep_features = lambda batch, features: kept.append((batch.image_keys, features))
    pack = reading.pack(SEVEN)
    model(replace(pack))
    [(keys, features)] = kept
    assert len(keys) == 4 and not features.requires_grad
    assert len(features) == sum(pack.image_patches) // 4
