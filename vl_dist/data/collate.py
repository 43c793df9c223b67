"""From a pack's examples to the tensors of one forward pass.

Every index that the model needs is computed here, from Python integers on the CPU, so that the step on the device computes
none and reads nothing back.

Legend: T tokens of the pack, D documents, N targets, V image tokens, P patches, I images, C values of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vl_dist.data.encode import Encoded, Encoder
from vl_dist.data.image_files import DEFAULT_LIMITS, ImageLimits, load_image, resolve_path
from vl_dist.data.images import Grid, ImageError, PatchShape, PixelBudget, grid_of, patches_of, to_user_error, within
from vl_dist.data.positions import mrope_positions
from vl_dist.data.records import Example, Message


@dataclass(frozen=True, slots=True)
class Batch:
    """One pack: a row of documents that do not see each other, the last of which may be padding.

    A filler is all padding: no example, no target, no image.
    """

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [3, T] int64, M-RoPE ids, restarting with each document
    document_ids: torch.Tensor  # [T] int64, which document a token belongs to
    target_rows: torch.Tensor  # [N] int64, the row whose output predicts target n (the row before it)
    target_ids: torch.Tensor  # [N] int64
    image_rows: torch.Tensor  # [V] int64, rows that image features replace
    pixel_values: torch.Tensor  # [P, C] float32
    image_grids: torch.Tensor  # [I, 3] int64: temporal, rows, columns in patches
    example_ids: tuple[str, ...]
    num_padding: int  # tokens at the end that belong to no example
    document_tokens: tuple[int, ...]  # tokens of each example
    image_patches: tuple[int, ...]  # patches of each image

    @property
    def num_tokens(self) -> int:
        """T; known on the host."""
        return len(self.input_ids)

    @property
    def num_targets(self) -> int:
        """N; known on the host."""
        return len(self.target_ids)

    @property
    def num_patches(self) -> int:
        """P; known on the host."""
        return len(self.pixel_values)

    @property
    def num_images(self) -> int:
        """I; known on the host."""
        return len(self.image_grids)

    def to(self, device: torch.device) -> "Batch":
        """The same pack on a device; copies from pinned memory do not block."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same pack in page-locked memory (called by torch's DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Any) -> "Batch":
        values = (getattr(self, item.name) for item in fields(self))
        return Batch(*(change(value) if isinstance(value, torch.Tensor) else value for value in values))


class Collator:
    """Decodes, encodes and packs examples. One copy lives in every loader worker."""

    def __init__(
        self,
        encoder: Encoder,
        image_processor: Any,
        *,
        root: Path,
        budget: PixelBudget,
        shape: PatchShape,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> None:
        """
        Args:
            encoder: text to tokens.
            image_processor: normalises and cuts images; its patch and merge sizes are `shape`'s.
            root: image paths are relative to it.
            budget: the size of every image, but of those whose example has a smaller one of its own.
            limits: which files are accepted.
        """
        self.encoder = encoder
        self.budget = budget
        self.shape = shape
        self._image_processor = image_processor
        self._root = root
        self._limits = limits
        temporal = image_processor.temporal_patch_size
        self._patch_values = 3 * temporal * shape.patch_size**2

    def pack(self, examples: Sequence[Example], *, length: int | None = None) -> Batch:
        """One pack of these examples, in order; none of them makes a filler.

        Args:
            length: tokens to pad up to; None: no padding, but one token for a filler.

        Raises:
            UserError: an image cannot be used; the message names the example.
        """
        documents, pixels = [], []
        for example in examples:
            budget = within(self.budget, example.max_pixels)
            images = [self._patches(path, example.id, budget) for path in example.image_paths]
            documents.append(self.encoder.encode(example, [grid for _, grid in images]))
            pixels += [values for values, _ in images]
        return self._join(documents, pixels, tuple(example.id for example in examples), length)

    def prompt(self, messages: Sequence[Message], image_paths: Sequence[str], name: str) -> tuple[Encoded, torch.Tensor]:
        """A prompt ready for generation, and its patches [P, C].

        Raises:
            UserError: an image cannot be used; the message has `name` in it.
        """
        images = [self._patches(path, name, self.budget) for path in image_paths]
        encoded = self.encoder.encode_prompt(messages, [grid for _, grid in images])
        return encoded, self._cat([values for values, _ in images])

    def _patches(self, path: str, example_id: str, budget: PixelBudget) -> tuple[torch.Tensor, Grid]:
        try:
            image = load_image(resolve_path(path, self._root, self._limits))
            pixels, grid = patches_of(image, budget, self.shape, self._image_processor)
        except ImageError as error:
            raise to_user_error(error, path, example_id) from None
        assert grid == grid_of(image.height, image.width, budget, self.shape), "header and image disagree"
        return pixels, grid

    def _cat(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat(list(pixels)) if pixels else torch.empty(0, self._patch_values)

    def _join(
        self, documents: list[Encoded], pixels: Sequence[torch.Tensor], ids: tuple[str, ...], length: int | None
    ) -> Batch:
        num_tokens = sum(document.num_tokens for document in documents)
        # A filler keeps ranks in step: it runs the same layers and adds exactly nothing to loss and gradient.
        num_padding = max(1 if num_tokens == 0 else 0, (length or 0) - num_tokens)
        if num_padding:
            none = np.zeros(num_padding, dtype=np.bool_)
            documents = [*documents, Encoded(np.zeros(num_padding, dtype=np.int64), none, none, ())]
        starts = np.cumsum([0, *(document.num_tokens for document in documents)])
        grids = [grid for document in documents for grid in document.grids]
        input_ids = np.concatenate([document.input_ids for document in documents])
        is_target = np.concatenate([_without_first(document.is_target) for document in documents])
        is_image = np.concatenate([document.is_image for document in documents])
        positions = [mrope_positions(d.is_image, d.grids, self.shape.merge_size) for d in documents]
        target_at = np.flatnonzero(is_target)
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            positions=torch.from_numpy(np.concatenate(positions, axis=1)),
            document_ids=torch.from_numpy(np.repeat(np.arange(len(documents)), np.diff(starts))),
            target_rows=torch.from_numpy(target_at - 1),
            target_ids=torch.from_numpy(input_ids[target_at]),
            image_rows=torch.from_numpy(np.flatnonzero(is_image)),
            pixel_values=self._cat(pixels),
            image_grids=torch.tensor([(grid.t, grid.h, grid.w) for grid in grids], dtype=torch.int64).reshape(-1, 3),
            example_ids=ids,
            num_padding=num_padding,
            document_tokens=tuple(document.num_tokens for document in documents[: len(ids)]),
            image_patches=tuple(grid.num_patches for grid in grids),
        )


def _without_first(is_target: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """A document's first token has no row before it in its own document, so it is never a target."""
    kept = is_target.copy()
    kept[0] = False
    return kept
