"""Images: sizes as qwen_vl_utils has them, pixels too, and paths that stay where they belong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from qwen_vl_utils.vision_process import fetch_image
from qwen_vl_utils.vision_process import smart_resize as upstream_smart_resize

from vl_dist.data import images
from vl_dist.data.image_files import load_image, read_size, resolve_path
from vl_dist.data.images import (
    Grid,
    ImageError,
    PatchShape,
    PixelBudget,
    grid_of,
    patches_of,
    resize_image,
    smart_resize,
)


@settings(max_examples=400, deadline=None)
@given(
    height=st.integers(1, 6000),
    width=st.integers(1, 6000),
    low=st.integers(1, 100_000),
    extra=st.integers(0, 2_000_000),
    factor=st.sampled_from([28, 32]),
)
def test_sizes_are_those_of_qwen_vl_utils(height: int, width: int, low: int, extra: int, factor: int) -> None:
    try:
        expected = upstream_smart_resize(height, width, factor, low, low + extra)
    except ValueError:
        with pytest.raises(ImageError, match="200 times"):
            smart_resize(height, width, factor, low, low + extra)
        return
    assert smart_resize(height, width, factor, low, low + extra) == expected


@pytest.mark.parametrize(
    "budget",
    [PixelBudget(), PixelBudget(resized_height=280, resized_width=280), PixelBudget(min_pixels=3136, max_pixels=20_000)],
    ids=["default", "fixed", "bounded"],
)
def test_pixels_are_those_of_qwen_vl_utils_and_of_the_whole_processor(
    photos: Path, processor: Any, shape: PatchShape, budget: PixelBudget
) -> None:
    for path in sorted(photos.glob("*.jpg")):
        request = {name: getattr(budget, name) for name in PixelBudget.__slots__ if getattr(budget, name) is not None}
        expected = fetch_image({"image": str(path), **request})
        image = load_image(path)
        assert np.array_equal(np.asarray(resize_image(image, budget, shape)), np.asarray(expected))
        grid = grid_of(*read_size(path), budget, shape)
        pixels = patches_of([resize_image(image, budget, shape)], shape, processor.image_processor)
        whole = processor.image_processor(images=[expected], return_tensors="pt")
        if budget.max_pixels is not None or budget.resized_height is not None:
            assert [grid.t, grid.h, grid.w] == whole["image_grid_thw"][0].tolist()
            assert bool((pixels == whole["pixel_values"]).all())
        assert len(pixels) == grid.num_patches


def test_without_qwen_vl_utils_the_pixels_are_the_same(
    photos: Path, shape: PatchShape, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    transparent = Image.open(photos / "cat.jpg").convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(transparent.size))
    transparent.save(tmp_path / "alpha.png")
    budget = PixelBudget(max_pixels=20_000)
    found = [load_image(path) for path in (photos / "rocket.jpg", tmp_path / "alpha.png")]
    expected = [np.asarray(resize_image(image, budget, shape)) for image in found]
    monkeypatch.setattr(images, "_qwen_fetch_image", lambda: None)
    for image, pixels in zip(found, expected, strict=True):
        assert np.array_equal(np.asarray(resize_image(image, budget, shape)), pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_rotated_photo_is_turned_upright_and_its_header_says_so(tmp_path: Path, photos: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(photos / "rocket.jpg").save(tmp_path / "turned.jpg", exif=exif)
    image = load_image(tmp_path / "turned.jpg")
    assert read_size(tmp_path / "turned.jpg") == (image.height, image.width)
    assert (image.height > image.width) == (orientation >= 5)


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"not an image"])
def test_a_damaged_image_is_refused(tmp_path: Path, photos: Path, damage: Any) -> None:
    path = tmp_path / "damaged.jpg"
    path.write_bytes(damage((photos / "cat.jpg").read_bytes()))
    with pytest.raises(ImageError):
        load_image(path)


def test_paths_stay_under_the_image_root(tmp_path: Path, photos: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "in.jpg").write_bytes((photos / "cat.jpg").read_bytes())
    (root / "link.jpg").symlink_to(photos / "cat.jpg")
    assert resolve_path("in.jpg", root) == (root / "in.jpg").resolve()
    assert resolve_path(str(root / "in.jpg"), root) == (root / "in.jpg").resolve()
    for path, reason in [
        ("../photo.jpg", "outside"),
        ("link.jpg", "outside"),
        (str(photos / "cat.jpg"), "outside"),
        ("https://example.org/cat.jpg", "URL"),
        ("file:///cat.jpg", "URL"),
        ("absent.jpg", "no such file"),
    ]:
        with pytest.raises(ImageError, match=reason):
            resolve_path(path, root)


def test_a_grid_counts_its_patches_and_tokens() -> None:
    assert (Grid(1, 20, 20).num_patches, Grid(1, 20, 20).num_tokens(2)) == (400, 100)


def test_patches_of_many_images_are_those_of_each_alone_in_order(photos: Path, processor: Any, shape: PatchShape) -> None:
    budget = PixelBudget(max_pixels=20_000)
    resized = [resize_image(load_image(path), budget, shape) for path in sorted(photos.glob("*.jpg"))]
    assert len({image.size for image in resized}) > 1
    together = patches_of(resized, shape, processor.image_processor)
    alone = [patches_of([image], shape, processor.image_processor) for image in resized]
    assert bool((together == torch.cat(alone)).all())
