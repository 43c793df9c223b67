"""Filling the cache while training: all of it arrives, and no trouble with it stops a run."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.examples import SEVEN, packed_model
from vl_dist.data.collate import Batch, Collator
from vl_dist.data.examples import in_memory
from vl_dist.data.features import FeatureReader, write_shard
from vl_dist.data.lengths import HeaderReader, measure
from vl_dist.data.loader import LoadedData
from vl_dist.model.features import feature_space
from vl_dist.model.packed import PackedModel
from vl_dist.run.features import NUM_WAITING, FeatureFill, distinct_images

WIDTH = 64


@pytest.fixture
def model(tiny_model: Path) -> PackedModel:
    return packed_model(tiny_model)


@pytest.fixture
def reader(model: PackedModel, collator: Collator, tmp_path: Path) -> FeatureReader:
    space = feature_space(model, collator.pictures.image_processor)
    return FeatureReader(tmp_path, width=space.width, dtype=space.dtype)


def encode(model: PackedModel, pack: Batch, fill: FeatureFill) -> None:
    model.keep_features = fill
    model.encode_only(pack)


def no_warning(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("shard_bytes", [1, 2**30])
def test_all_that_the_tower_makes_is_found_again_image_by_image(
    model: PackedModel, collator: Collator, reader: FeatureReader, tmp_path: Path, shard_bytes: int
) -> None:
    reading = collator.reading(reader)
    packs = [reading.pack(SEVEN[:4]), reading.pack(SEVEN[3:]), reading.pack(SEVEN[:2])]
    with FeatureFill(tmp_path, no_warning, shard_bytes=shard_bytes) as fill:
        for pack in packs:
            encode(model, pack, fill)
    keys = {key for pack in packs for key in pack.image_keys}
    assert reader.keys() == keys and len(keys) == 6
    assert len(list(tmp_path.iterdir())) == (2 if shard_bytes == 1 else 1)  # the third pack brought nothing new
    for example in SEVEN:
        again, live = reading.pack([example]), collator.pack([example])
        assert again.num_encoded_images == 0
        torch.testing.assert_close(model.image_features(again), model.image_features(live), rtol=1e-4, atol=1e-5)


def test_what_waits_too_long_is_written_before_a_shard_is_full(
    model: PackedModel, collator: Collator, reader: FeatureReader, tmp_path: Path
) -> None:
    reading = collator.reading(reader)
    with FeatureFill(tmp_path, no_warning, shard_s=0.0) as fill:
        encode(model, reading.pack(SEVEN[:1]), fill)
        end = time.monotonic() + 30
        while not reader.keys() and time.monotonic() < end:
            time.sleep(0.01)
        assert len(reader.keys()) == 1


def test_a_full_disk_is_one_warning_and_the_rest_goes_on_without_it(
    model: PackedModel, collator: Collator, reader: FeatureReader, tmp_path: Path
) -> None:
    warnings: list[str] = []
    asked: list[int] = []

    def full(_: Path, images: Sequence[tuple[str, torch.Tensor]]) -> None:
        asked.append(len(images))
        raise OSError(errno.ENOSPC, "No space left on device")

    reading = collator.reading(reader)
    with FeatureFill(tmp_path, warnings.append, shard_bytes=1, write=full) as fill:
        for example in SEVEN:
            encode(model, reading.pack([example]), fill)
            while len(fill._waiting) > 1 and not all(one.done() for one in fill._waiting):
                time.sleep(0.001)
    assert len(warnings) == 1
    assert "No space left on device" in warnings[0] and str(tmp_path) in warnings[0]
    assert asked == [1], "the disk was asked again"


def test_training_waits_for_a_slow_disk_rather_than_for_memory(
    model: PackedModel, collator: Collator, reader: FeatureReader, tmp_path: Path
) -> None:
    gate = threading.Event()

    def slow(directory: Path, images: Sequence[tuple[str, torch.Tensor]]) -> Any:
        gate.wait(60)
        return write_shard(directory, images)

    fill = FeatureFill(tmp_path, no_warning, shard_bytes=1, write=slow)
    pack = collator.reading(reader).pack(SEVEN[:1])
    done: list[int] = []

    def train() -> None:
        for n in range(NUM_WAITING + 3):
            fill._seen.clear()  # as if each were of another image
            encode(model, pack, fill)
            done.append(n)

    with fill:
        trainer = threading.Thread(target=train)
        trainer.start()
        end = time.monotonic() + 30
        while len(done) < NUM_WAITING and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)
        assert len(done) == NUM_WAITING
        gate.set()
        trainer.join(60)
    assert len(done) == NUM_WAITING + 3
    assert len(list(tmp_path.iterdir())) == NUM_WAITING + 3


def test_a_mistake_of_ours_in_the_thread_is_not_swallowed(
    model: PackedModel, collator: Collator, reader: FeatureReader, tmp_path: Path
) -> None:
    def wrong(_: Path, images: Sequence[tuple[str, torch.Tensor]]) -> None:
        raise AssertionError("ours")

    fill = FeatureFill(tmp_path, no_warning, write=wrong)
    encode(model, collator.reading(reader).pack(SEVEN[:1]), fill)
    with pytest.raises(AssertionError, match="ours"):
        fill.__exit__(None, None, None)


@pytest.mark.parametrize("max_patches", [1, 60, 10_000])
def test_every_image_is_in_one_portion_and_portions_are_small(collator: Collator, photos: Path, max_patches: int) -> None:
    lengths = measure(SEVEN * 2, collator.encoder, HeaderReader(photos, collator.budget, collator.shape))
    portions, num_tokens = distinct_images(LoadedData(in_memory(SEVEN * 2), lengths, collator), max_patches)
    images = [image for portion in portions for image in portion]
    assert len(images) == len(set(images)) == 6
    packs = [collator.pack_images(portion) for portion in portions]
    assert sum(pack.num_patches for pack in packs) == num_tokens * 4
    assert all(pack.num_patches <= max_patches for pack, portion in zip(packs, portions, strict=True) if len(portion) > 2)
    assert len(portions) == (1 if max_patches == 10_000 else len(portions)) and (max_patches > 60 or len(portions) > 3)
