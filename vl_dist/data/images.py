"""Images: from upright pixels to patches, with one pixel budget.

The size rule is that of `qwen_vl_utils.smart_resize`, restated here so that lengths can be computed from an image's
header alone, without torch. Pixels go through `qwen_vl_utils.fetch_image` itself where it is installed.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from vl_dist.errors import UserError

MIN_TOKENS_PER_IMAGE = 4  # qwen_vl_utils.vision_process.IMAGE_MIN_TOKEN_NUM
MAX_TOKENS_PER_IMAGE = 16384  # qwen_vl_utils.vision_process.IMAGE_MAX_TOKEN_NUM
MAX_ASPECT_RATIO = 200  # qwen_vl_utils.vision_process.MAX_RATIO
SHOWN_OF_PATH = 120  # characters of a path in a message: some "paths" are whole images in base64


class ImageError(ValueError):
    """This image cannot be used; the message says why, without its path."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PatchShape:
    """How the model cuts images; from the processor's own files.

    One language-model token stands for `merge_size` x `merge_size` patches of `patch_size` x `patch_size` pixels.
    """

    patch_size: int
    merge_size: int

    @property
    def factor(self) -> int:
        """Height and width are multiples of this, in pixels."""
        return self.patch_size * self.merge_size


@dataclass(frozen=True, slots=True, kw_only=True)
class PixelBudget:
    """How large images become: one fixed size, or bounds on their area in pixels."""

    resized_height: int | None = None
    resized_width: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None


def within(budget: PixelBudget, max_pixels: int | None) -> PixelBudget:
    """The budget with another upper bound; None: as it is."""
    return budget if max_pixels is None else replace(budget, max_pixels=max_pixels)


@dataclass(frozen=True, slots=True)
class Grid:
    """Patches of one image: temporal, rows, columns."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        """Tokens of the vision tower."""
        return self.t * self.h * self.w

    def num_tokens(self, merge_size: int) -> int:
        """Tokens of the language model."""
        return self.num_patches // merge_size**2


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width as multiples of `factor`, with the area in bounds and the shape kept as well as that allows.

    Source: `qwen_vl_utils.vision_process.smart_resize` (0.0.14), which a test compares over many sizes.

    Raises:
        ImageError: one side is more than 200 times the other.
    """
    _check_aspect(height, width)
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    elif rows * columns < min_pixels:
        enlarge = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * enlarge / factor) * factor
        columns = math.ceil(width * enlarge / factor) * factor
    return rows, columns


def target_size(height: int, width: int, budget: PixelBudget, shape: PatchShape) -> tuple[int, int]:
    """Height and width in pixels that an upright image of this size is resized to.

    Raises:
        ImageError: the size rule cannot be kept.
    """
    low, high = area_bounds(budget, shape)
    if budget.resized_height is not None and budget.resized_width is not None:
        _check_aspect(height, width)
        return smart_resize(budget.resized_height, budget.resized_width, shape.factor, low, high)
    rows, columns = smart_resize(height, width, shape.factor, low, high)
    if rows == 0 or columns == 0:
        raise ImageError(f"{width}x{height} pixels is too narrow for data.max_pixels={high}")
    return rows, columns


def area_bounds(budget: PixelBudget, shape: PatchShape) -> tuple[int, int]:
    """Least and most area of a resized image in pixels; qwen_vl_utils' own where the budget has none."""
    high = budget.max_pixels or MAX_TOKENS_PER_IMAGE * shape.factor**2
    low = budget.min_pixels or min(high, MIN_TOKENS_PER_IMAGE * shape.factor**2)
    return low, high


def grid_of(height: int, width: int, budget: PixelBudget, shape: PatchShape) -> Grid:
    """The patches of an upright image of this size under the budget.

    Raises:
        ImageError: the size rule cannot be kept.
    """
    rows, columns = target_size(height, width, budget, shape)
    return Grid(1, rows // shape.patch_size, columns // shape.patch_size)


def resize_image(image: Image.Image, budget: PixelBudget, shape: PatchShape) -> Image.Image:
    """The RGB image in its target size, pixel for pixel what `qwen_vl_utils.fetch_image` gives.

    Raises:
        ImageError: the size rule cannot be kept.
    """
    rows, columns = target_size(image.height, image.width, budget, shape)
    fetch = _qwen_fetch_image()
    if fetch is None:
        return image.resize((columns, rows), Image.Resampling.BICUBIC)
    if budget.resized_height is not None:
        wanted = {"resized_height": budget.resized_height, "resized_width": budget.resized_width}
    else:  # the bounds, not the size that follows from them: to that, the library would apply its own bounds again
        wanted = dict(zip(("min_pixels", "max_pixels"), area_bounds(budget, shape), strict=True))
    resized: Image.Image = fetch({"image": image, **wanted}, image_patch_size=shape.patch_size)
    assert resized.size == (columns, rows), f"qwen_vl_utils resized to {resized.size}, the rule says {(columns, rows)}"
    return resized


def grid_of_resized(image: Image.Image, shape: PatchShape) -> Grid:
    """The patches of an image in its target size."""
    return Grid(1, image.height // shape.patch_size, image.width // shape.patch_size)


def patches_of(resized: Sequence[Image.Image], shape: PatchShape, image_processor: Any) -> Any:
    """Normalised patches of images in their target size, one after the other; the processor's call costs less for many.

    Returns:
        float32 tensor [P, C * temporal * patch * patch], rows of an image in the model's merge order.
    """
    # do_resize=False: the budget was applied before, and must not be applied again with the processor's own bounds.
    made = image_processor(images=list(resized), do_resize=False, return_tensors="pt")
    expected = [(grid.t, grid.h, grid.w) for grid in (grid_of_resized(image, shape) for image in resized)]
    grids = [tuple(grid) for grid in made["image_grid_thw"].tolist()]
    assert grids == expected, f"the processor cut {grids}, the budget says {expected}"
    return made["pixel_values"]


def named(error: ImageError, path: str) -> str:
    """An image's fault with the path that the record gives."""
    shown = path if len(path) <= SHOWN_OF_PATH else path[:SHOWN_OF_PATH] + "..."
    return f"image {shown}: {error}"


def to_user_error(error: ImageError, path: str, example_id: str) -> UserError:
    """An image's fault as a message that names the image and the record."""
    return UserError(f"Example {example_id}: {named(error, path)}. Mend or remove the record.")


def _check_aspect(height: int, width: int) -> None:
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ImageError(f"{width}x{height} pixels: one side is more than {MAX_ASPECT_RATIO} times the other")


@functools.cache
def _qwen_fetch_image() -> Callable[..., Image.Image] | None:
    try:
        from qwen_vl_utils.vision_process import fetch_image
    except ImportError:  # some GPU images lack it; bicubic is the same operation
        return None
    return fetch_image  # type: ignore[no-any-return]
