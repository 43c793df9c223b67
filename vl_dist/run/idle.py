"""An idle image where a pack has none: so that all ranks run the tower, and all its parameters have a gradient."""

from collections.abc import Sequence
from dataclasses import replace

from vl_dist.data.collate import Batch
from vl_dist.model.packed import PackedModel
from vl_dist.run.distributed import Ranks


class Packs:
    """Packs as the engine runs them: with an idle image where the tower must run although there is no image."""

    def __init__(self, model: PackedModel) -> None:
        # Data parallel waits for the gradient of every parameter, and one that is zero is not the same to AdamW as one that
        # is not there.
        self.always_images = self._tower_trains = model.tower_trains
        self._merge_size: int = model.peft_model.get_base_model().model.visual.spatial_merge_size

    def all_or_none(self, packs: Sequence[Batch], ranks: Ranks) -> None:
        """In this step the tower runs in every pack, or in none on any rank (all ranks)."""
        self.always_images = self._tower_trains or ranks.any(any(pack.num_encoded_images for pack in packs))

    def __call__(self, pack: Batch) -> Batch:
        """The pack, or one with an idle image."""
        return with_idle_image(pack, self._merge_size) if self.always_images else pack


def with_idle_image(pack: Batch, merge_size: int) -> Batch:
    """The pack; without images to encode, with the smallest grid the tower takes, whose one feature replaces no row.

    Args:
        merge_size: patches to a side of one image token.
    """
    if pack.num_encoded_images:
        return pack
    return replace(
        pack,
        pixel_values=pack.pixel_values.new_zeros(merge_size**2, pack.pixel_values.shape[1]),
        patch_positions=pack.patch_positions.new_zeros(2, merge_size**2),
        image_grids=pack.image_grids.new_tensor([[1, merge_size, merge_size]]),
        image_ends=pack.image_ends.new_tensor([0, merge_size**2]),
        image_patches=(merge_size**2,),
    )
