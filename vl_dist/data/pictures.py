"""Images as packs take them: pixels for the vision tower, or features that it made before.

Legend: P patches of the images to encode, C values of a patch, I images to encode, V image tokens, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vl_dist.data.features import FeatureReader, feature_key
from vl_dist.data.image_files import DEFAULT_LIMITS, ImageLimits, load_image, read_size, resolve_path
from vl_dist.data.images import (
    Grid,
    ImageError,
    PatchShape,
    PixelBudget,
    grid_of,
    grid_of_resized,
    named,
    patches_of,
    resize_image,
    within,
)
from vl_dist.data.positions import patch_positions
from vl_dist.data.records import Example

ImageKey = tuple[int, str, int | None]  # record file, path, bound on the area


@dataclass(frozen=True, slots=True)
class Picture:
    """One image: either its pixels or its features are there."""

    grid: Grid
    pixels: Image.Image | None  # in the target size
    features: torch.Tensor | None  # [V, H]
    key: str | None  # of its features; None: there is no cache


@dataclass(frozen=True, slots=True)
class ImageTensors:
    """The distinct images of a pack."""

    cached_features: torch.Tensor  # [K, H] of the images that need no tower
    num_cached_images: int
    pixel_values: torch.Tensor  # [P, C] float32 of the others
    patch_positions: torch.Tensor  # [2, P] int64, row and column of each patch in its image
    image_ends: torch.Tensor  # [I + 1] int32: 0, then where the patches of each image end
    image_grids: torch.Tensor  # [I, 3] int64: temporal, rows, columns in patches
    image_patches: tuple[int, ...]  # patches of each image
    image_keys: tuple[str, ...]  # names their features get in the cache; empty without one


class PictureLoader:
    """Opens, resizes and cuts images, and looks up their features."""

    def __init__(
        self,
        image_processor: Any,
        *,
        roots: Sequence[Path],
        budget: PixelBudget,
        shape: PatchShape,
        limits: ImageLimits = DEFAULT_LIMITS,
        reader: FeatureReader | None = None,
    ) -> None:
        """
        Args:
            image_processor: normalises and cuts images; its patch and merge sizes are `shape`'s.
            roots: of each record file, what its image paths are relative to.
            budget: the size of every image, but of those whose example has a smaller one of its own.
            limits: which files are accepted.
            reader: features that were made before.
        """
        self.image_processor = image_processor
        self.roots = tuple(roots)
        self.budget = budget
        self.shape = shape
        self.limits = limits
        self.reader = reader
        self._patch_values = 3 * image_processor.temporal_patch_size * shape.patch_size**2

    def open_image(self, path: str, file: int) -> Image.Image:
        """An image in its own size, upright and RGB, by its path in the record file of this number.

        Raises:
            ImageError: it cannot be used.
        """
        return load_image(self._resolve(path, file))

    def of_example(self, example: Example, loaded: dict[ImageKey, Picture | str]) -> list[Picture] | str:
        """Its images, or why one of them cannot be used.

        Args:
            loaded: the same of single images; grows.
        """
        found: list[Picture] = []
        for key in image_keys(example):
            picture = loaded[key] if key in loaded else self.load(key)
            loaded[key] = picture
            if isinstance(picture, str):
                return picture
            found.append(picture)
        return found

    def load(self, image: ImageKey) -> Picture | str:
        """One image, or why it cannot be used. An image whose features are there is not decoded."""
        file, path, max_pixels = image
        budget = within(self.budget, max_pixels)
        try:
            place = self._resolve(path, file)
            key = None
            if self.reader is not None:
                grid = grid_of(*read_size(place), budget, self.shape)
                key = feature_key(place.read_bytes(), grid)
                features = self.reader.get(key)
                if features is not None:
                    assert len(features) == grid.num_tokens(self.shape.merge_size), "features of another grid"
                    return Picture(grid, None, features, key)
            decoded = load_image(place)
            resized = resize_image(decoded, budget, self.shape)
            expected = grid_of(decoded.height, decoded.width, budget, self.shape)
        except ImageError as error:
            return named(error, path)
        except OSError as error:  # gone between two looks
            return named(ImageError(f"cannot be read ({error.strerror})"), path)
        assert grid_of_resized(resized, self.shape) == expected, "header and image disagree"
        return Picture(expected, resized, None, key)

    def patches(self, pictures: Sequence[Picture]) -> torch.Tensor:
        """[P, C] of images with pixels."""
        if not pictures:
            return torch.empty(0, self._patch_values)
        resized = [picture.pixels for picture in pictures]
        made: torch.Tensor = patches_of(resized, self.shape, self.image_processor)  # type: ignore[arg-type]
        return made

    def tensors(self, pictures: Sequence[Picture]) -> ImageTensors:
        """Distinct images as the model takes them; those with features first, else in order (`features_first`)."""
        ready = [picture.features for picture in pictures if picture.features is not None]
        others = [picture for picture in pictures if picture.features is None]
        grids = [picture.grid for picture in others]
        return ImageTensors(
            cached_features=torch.cat(ready) if ready else torch.empty(0, 0),
            num_cached_images=len(ready),
            pixel_values=self.patches(others),
            patch_positions=torch.from_numpy(patch_positions(grids, self.shape.merge_size)),
            image_ends=torch.from_numpy(np.cumsum([0, *(grid.num_patches for grid in grids)]).astype(np.int32)),
            image_grids=torch.tensor([(grid.t, grid.h, grid.w) for grid in grids], dtype=torch.int64).reshape(-1, 3),
            image_patches=tuple(grid.num_patches for grid in grids),
            image_keys=tuple(picture.key for picture in others if picture.key is not None),
        )

    def _resolve(self, path: str, file: int) -> Path:
        return resolve_path(path, self.roots[file], self.limits)


def image_keys(example: Example) -> list[ImageKey]:
    """What tells the pixels of its images from others: record file, path in it, and bound on the area."""
    return [(example.file, path, example.max_pixels) for path in example.image_paths]


def features_first(pictures: dict[ImageKey, Picture]) -> dict[ImageKey, Picture]:
    """The same images, those that need no tower first: an idle image at the end then moves no other's features."""
    return dict(sorted(pictures.items(), key=lambda item: item[1].features is None))
