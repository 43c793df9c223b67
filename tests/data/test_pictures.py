"""A pack reads the features of images that are in the cache, and decodes the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.examples import SEVEN, cached_collator, packed_model
from vl_dist.data import pictures
from vl_dist.data.collate import Batch, Collator

CACHED = ("cat.jpg", "flower.jpg")


@pytest.fixture
def reading(tiny_model: Path, collator: Collator, tmp_path: Path) -> Collator:
    return cached_collator(collator, packed_model(tiny_model), CACHED, tmp_path)


def test_a_cached_image_is_not_decoded_and_the_text_is_the_same(
    reading: Collator, collator: Collator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = collator.pack([SEVEN[2], SEVEN[1]])
    monkeypatch.setattr(pictures, "load_image", lambda _: pytest.fail("decoded"))
    pack = reading.pack([SEVEN[2], SEVEN[1]])
    for name in ("input_ids", "positions", "document_ids", "target_rows", "target_ids", "image_rows", "feature_rows"):
        assert torch.equal(getattr(pack, name), getattr(plain, name)), name
    assert (pack.num_images, pack.num_cached_images, pack.num_encoded_images, pack.num_patches) == (1, 1, 0, 0)
    assert len(pack.cached_features) == len(pack.image_rows)


def test_cached_and_other_images_of_a_pack_each_get_their_own_rows(reading: Collator, collator: Collator) -> None:
    """Whatever their order in the text: `both` shows an image of each kind, and `rocket` comes before."""
    examples = [SEVEN[0], SEVEN[3], SEVEN[2]]
    pack, plain = reading.pack(examples), collator.pack(examples)
    assert (pack.num_images, pack.num_cached_images, plain.num_cached_images) == (4, 2, 0)
    assert len(pack.image_keys) == pack.num_encoded_images == 2
    assert plain.image_keys == ()
    assert torch.equal(pack.image_rows, plain.image_rows)
    assert sorted(pack.feature_rows.tolist()) == list(range(len(plain.feature_rows)))
    # The patches that are left are those of the plain pack's other images, in order: rocket and china.
    parts = plain.pixel_values.split(list(plain.image_patches))
    assert torch.equal(pack.pixel_values, torch.cat([parts[0], parts[1]]))


def test_the_features_of_an_image_depend_on_its_size_in_the_pack(reading: Collator) -> None:
    assert reading.pack_images([(0, "cat.jpg", None)]).num_cached_images == 1
    smaller = reading.pack_images([(0, "cat.jpg", 56 * 56)])
    assert (smaller.num_cached_images, smaller.num_encoded_images) == (0, 1)


def test_an_image_under_another_name_is_found_and_one_of_other_content_is_not(
    reading: Collator, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "copy.jpg").write_bytes((photos / "cat.jpg").read_bytes())
    (tmp_path / "other" / "cat.jpg").write_bytes((photos / "rocket.jpg").read_bytes())
    reading.pictures.roots = (tmp_path / "other",)
    assert reading.pack_images([(0, "copy.jpg", None)]).num_cached_images == 1
    assert reading.pack_images([(0, "cat.jpg", None)]).num_cached_images == 0


def test_a_cached_image_that_is_gone_or_damaged_leaves_with_its_example(
    reading: Collator, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cat.jpg").write_bytes((photos / "cat.jpg").read_bytes()[:3000])
    reading.pictures.roots = (tmp_path / "other",)
    pack = reading.pack([SEVEN[2], SEVEN[0], SEVEN[1]])
    assert pack.example_ids == ("text",)
    assert [one.id for one in pack.dropped] == ["cat", "rocket"]
    images = reading.pack_images([(0, "cat.jpg", None), (0, "gone.jpg", None)])
    assert [one.id for one in images.dropped] == ["cat.jpg", "gone.jpg"]
    assert (images.num_images, images.num_targets) == (0, 0)


def test_moving_and_pinning_keep_cached_features(reading: Collator) -> None:
    pack: Batch = reading.pack([SEVEN[2]])
    moved = pack.to(torch.device("meta"))
    assert moved.cached_features.device.type == "meta"
    assert (moved.num_cached_images, moved.image_keys, moved.example_ids) == (1, (), ("cat",))
