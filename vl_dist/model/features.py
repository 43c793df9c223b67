"""What the features of an image depend on beside the image, and whether those of a cache are still what the tower makes."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vl_dist.data.collate import Collator
from vl_dist.data.features import FeatureReader, bytes_of
from vl_dist.data.pictures import ImageKey, Picture
from vl_dist.errors import UserError
from vl_dist.model.packed import PackedModel

FORMAT = 1  # of the shards, and of everything between an image file and its patches that is not in the key
PIXEL_SETTINGS = (
    "do_convert_rgb",
    "do_normalize",
    "do_rescale",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "rescale_factor",
    "resample",
    "temporal_patch_size",
)  # of the processor; its own bounds on the area do not count, because the budget is applied before
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # relative; kernels and devices differ by a tenth of it


@dataclass(frozen=True, slots=True)
class FeatureSpace:
    """All features of one tower under one set of pixel settings."""

    key: str  # names their directory
    width: int  # H
    dtype: torch.dtype
    settings: dict[str, Any]  # what the key stands for, readable

    def bytes_of(self, num_tokens: int) -> int:
        """What so many image tokens take."""
        return num_tokens * self.width * self.dtype.itemsize


def feature_space(model: PackedModel, image_processor: Any) -> FeatureSpace:
    """The features that this model's tower makes.

    Raises:
        UserError: the tower trains, so that what it makes of an image changes with every step.
    """
    if model.tower_trains:
        raise UserError(
            "model.feature_cache keeps what the vision tower makes of an image, but LoRA layers of the tower or its merger "
            "are trained, which changes it with every step. Set model.feature_cache=null, or train the language model only."
        )
    tower: Any = model.tower
    settings = {
        "format": FORMAT,
        "tower": _hash_of_weights(tower),
        "dtype": str(tower.dtype).removeprefix("torch."),
        "pixels": {name: getattr(image_processor, name, None) for name in PIXEL_SETTINGS},
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return FeatureSpace(key, int(tower.config.hidden_size), tower.dtype, settings)


def _hash_of_weights(tower: torch.nn.Module) -> str:
    found = hashlib.sha256()
    for name, parameter in sorted(tower.named_parameters()):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        found.update(bytes_of(parameter.detach().cpu()))
    return found.hexdigest()


def spot_check(
    model: PackedModel, collator: Collator, reader: FeatureReader, images: Sequence[ImageKey], *, num_images: int = 3
) -> float | None:
    """Compares a few cached features with a live pass through the tower.

    Args:
        model: on its device.
        collator: without a cache.
        reader: of the cache.
        images: among which to look for cached ones.
        num_images: at most so many are compared.

    Returns:
        The largest relative difference; None: none of these images is in the cache.

    Raises:
        UserError: the cache holds something else than the tower makes, with the figure.
    """
    differences = []
    for image, cached in _cached(collator.reading(reader), images):
        live_pack = collator.pack_images([image]).to(next(model.parameters()).device)
        with torch.no_grad():
            live = model.image_features(live_pack).float().cpu()
        difference = float((cached.float() - live).norm() / live.norm())
        allowed = TOLERANCES[cached.dtype]
        if not difference <= allowed:
            raise UserError(
                f"The feature cache has other features of {image[1]} than the vision tower makes of it now: they are "
                f"{difference:.0e} apart, of which {allowed:.0e} is allowed. Libraries that decode or resize images may "
                f"have changed. Remove {reader.directory}, and it will be filled anew."
            )
        differences.append(difference)
        if len(differences) == num_images:
            break
    return max(differences, default=None)


def _cached(collator: Collator, images: Sequence[ImageKey]) -> Iterator[tuple[ImageKey, torch.Tensor]]:
    for image in images:
        picture = collator.pictures.load(image)
        if isinstance(picture, Picture) and picture.features is not None:
            yield image, picture.features
